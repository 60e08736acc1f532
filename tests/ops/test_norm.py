"""Dropout, residual addition and layer norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tolerance import assert_obeys_rule
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from spanbert_fast import ops
from spanbert_fast.ops.random import dropout_scale, hidden_keep_mask, token_places

EPS = 1e-12


@pytest.fixture(params=[0.0, 0.3])
def options(
    request: pytest.FixtureRequest, seed: Tensor, sequence_ids: Tensor, cu_seqlens: Tensor
) -> dict[str, Any]:
    return {
        "dropout_p": request.param,
        "seed": seed,
        "sequence_ids": sequence_ids,
        "cu_seqlens": cu_seqlens,
        "site": 2,
    }


def plain(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout_p: float,
    seed: Tensor,
    sequence_ids: Tensor,
    cu_seqlens: Tensor,
    site: int,
) -> Tensor:
    sequences, positions = token_places(cu_seqlens, len(x))
    names = sequence_ids[sequences]
    keep = hidden_keep_mask(positions, names, x.shape[1], dropout_p, seed, site)
    branch = x * keep * dropout_scale(dropout_p)
    return functional.layer_norm(branch + residual, (x.shape[1],), weight, bias, EPS)


def op(*inputs: Tensor, **options: Any) -> Tensor:
    return ops.dropout_add_layer_norm(*inputs, EPS, **options)


def test_gradients(options: dict[str, Any], doubles: Callable[..., Tensor]) -> None:
    inputs = [doubles(20, 5), doubles(20, 5), doubles(5), doubles(5)]
    assert gradcheck(partial(op, **options), inputs)
    torch.testing.assert_close(op(*inputs, **options), plain(*inputs, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy(options: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = [torch.randn(20, 96), torch.randn(20, 96) + 3, torch.randn(96), torch.randn(96)]
    assert_obeys_rule(partial(op, **options), partial(plain, **options), inputs, dtype)


def test_mask_does_not_depend_on_the_batch(
    options: dict[str, Any], cu_seqlens: Tensor, sequence_ids: Tensor
) -> None:
    """The same sequence in another batch, at another place: the same rows."""
    x, residual = torch.randn(2, 20, 8)
    weight, bias = torch.ones(8), torch.zeros(8)
    together = op(x, residual, weight, bias, **options)
    own = {
        **options,
        "sequence_ids": sequence_ids[[5, 3]],
        "cu_seqlens": torch.tensor([0, 7, 10], dtype=torch.int32),
    }
    rows = [*range(13, 20), *range(10, 13)]
    assert torch.equal(together[rows], op(x[rows], residual[rows], weight, bias, **own))


def test_low_precision_stream_with_wide_parameters(options: dict[str, Any]) -> None:
    x, residual = torch.randn(2, 20, 8)
    weight, bias = torch.randn(8, requires_grad=True), torch.randn(8)
    wide = op(x.bfloat16().float(), residual, weight, bias, **options)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            narrow = op(x.bfloat16(), residual, weight, bias, **options)
        assert torch.equal(narrow, wide.bfloat16())
    narrow.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32


def test_missing_arguments_are_named() -> None:
    rows, vector = torch.zeros(4, 8), torch.ones(8)
    with pytest.raises(
        ValueError, match=r"dropout_p is 0\.1, so seed, sequence_ids and cu_seqlens"
    ):
        op(rows, rows, vector, vector, dropout_p=0.1)
