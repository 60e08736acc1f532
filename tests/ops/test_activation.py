"""Exact GELU with a bias, alone and in front of a layer norm."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tolerance import assert_obeys_rule
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from spanbert_fast import ops

EPS = 1e-12


def gelu_norm(x: Tensor, bias: Tensor, weight: Tensor, ln_bias: Tensor) -> Tensor:
    return ops.bias_gelu_layer_norm(x, bias, weight, ln_bias, EPS)


def plain_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias)


def plain_gelu_norm(x: Tensor, bias: Tensor, weight: Tensor, ln_bias: Tensor) -> Tensor:
    return functional.layer_norm(functional.gelu(x + bias), weight.shape, weight, ln_bias, EPS)


def test_is_the_exact_gelu() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    expected = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in (x + 0.5).tolist()]
    result = ops.bias_gelu(x[:, None], torch.tensor([0.5], dtype=torch.float64))[:, 0]
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


def test_gradients(doubles: Callable[..., Tensor]) -> None:
    assert gradcheck(ops.bias_gelu, [doubles(4, 5), doubles(5)])
    assert gradcheck(gelu_norm, [doubles(4, 5), doubles(5), doubles(5), doubles(5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy(dtype: torch.dtype) -> None:
    inputs = [torch.randn(20, 96) * 2, torch.randn(96), torch.randn(96), torch.randn(96)]
    assert_obeys_rule(ops.bias_gelu, plain_gelu, inputs[:2], dtype)
    assert_obeys_rule(gelu_norm, plain_gelu_norm, inputs, dtype)


def test_no_rows() -> None:
    x = torch.zeros(0, 8, requires_grad=True)
    bias = torch.zeros(8, requires_grad=True)
    (ops.bias_gelu(x, bias).sum() + gelu_norm(x, bias, bias, bias).sum()).backward()
    assert torch.equal(bias.grad, torch.zeros(8))
