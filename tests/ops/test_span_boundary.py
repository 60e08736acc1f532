"""The factored first layer of the span boundary head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tolerance import assert_obeys_rule
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from spanbert_fast import ops

EPS = 1e-12
# Spans of 3, 0 and 4 targets; token 8 bounds two of them.
LEFT, RIGHT = torch.tensor([0, 5, 8]), torch.tensor([4, 8, 12])
CU = torch.tensor([0, 3, 3, 7], dtype=torch.int32)


def op(*inputs: Tensor) -> Tensor:
    hidden, *parameters = inputs
    return ops.span_boundary_hidden(hidden, LEFT, RIGHT, CU, *parameters, EPS, num_rows=7)


def plain(*inputs: Tensor) -> Tensor:
    """The layer as the paper writes it: concatenate, multiply, activate, normalise."""
    hidden, table, weight, bias, ln_weight, ln_bias = inputs
    rows = [
        torch.cat([hidden[LEFT[span]], hidden[RIGHT[span]], table[offset]])
        for span, count in enumerate(CU.diff().tolist())
        for offset in range(count)
    ]
    activated = functional.gelu(functional.linear(torch.stack(rows), weight, bias))
    return functional.layer_norm(activated, ln_bias.shape, ln_weight, ln_bias, EPS)


def shapes(size: int, position_size: int) -> list[tuple[int, ...]]:
    width = 2 * size + position_size
    return [(13, size), (5, position_size), (size, width), (size,), (size,), (size,)]


def test_gradients(doubles: Callable[..., Tensor]) -> None:
    inputs = [doubles(*shape) for shape in shapes(4, 3)]
    assert gradcheck(op, inputs)
    torch.testing.assert_close(op(*inputs), plain(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy(dtype: torch.dtype) -> None:
    inputs = [torch.randn(*shape) for shape in shapes(64, 24)]
    inputs[2] *= 0.08
    assert_obeys_rule(op, plain, inputs, dtype)


def test_autocast() -> None:
    inputs = [torch.randn(*shape) for shape in shapes(8, 3)]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = op(*inputs)
    assert narrow.dtype is torch.bfloat16
    torch.testing.assert_close(narrow.float(), op(*inputs), rtol=0.05, atol=0.05)


def test_no_spans() -> None:
    hidden, *parameters = [torch.randn(*shape, requires_grad=True) for shape in shapes(4, 3)]
    none, cu = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    rows = ops.span_boundary_hidden(hidden, none, none, cu, *parameters, EPS, num_rows=0)
    rows.sum().backward()
    assert rows.shape == (0, 4)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in (hidden, *parameters))
