"""The input embedding."""

from __future__ import annotations

from collections.abc import Callable
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


@pytest.fixture
def rows(cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randint(0, 11, (20,)), token_places(cu_seqlens, 20)[1], torch.arange(20) % 2


def plain(rows: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
    *tables, weight, bias = parameters
    total = sum(functional.embedding(ids, table) for ids, table in zip(rows, tables, strict=True))
    return functional.layer_norm(total, weight.shape, weight, bias, EPS)


def parameters(size: int) -> list[Tensor]:
    return [torch.randn(count, size) for count in (11, 9, 2)] + [torch.randn(size)] * 2


def test_gradients(
    rows: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    sequence_ids: Tensor,
    seed: Tensor,
    doubles: Callable[..., Tensor],
) -> None:
    inputs = [doubles(11, 4), doubles(9, 4), doubles(2, 4), doubles(4), doubles(4)]
    assert gradcheck(lambda *p: ops.bert_embedding(*rows, *p, EPS), inputs)
    options: dict[str, Any] = {"seed": seed, "sequence_ids": sequence_ids, "site": 0}
    options |= {"cu_seqlens": cu_seqlens, "dropout_p": 0.3}
    assert gradcheck(lambda *p: ops.bert_embedding(*rows, *p, EPS, **options), inputs)
    sequences, positions = token_places(cu_seqlens, 20)
    keep = hidden_keep_mask(positions, sequence_ids[sequences], 4, 0.3, seed, 0)
    torch.testing.assert_close(
        ops.bert_embedding(*rows, *inputs, EPS, **options),
        plain(rows, *inputs) * keep * dropout_scale(0.3),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy(rows: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    assert_obeys_rule(
        lambda *p: ops.bert_embedding(*rows, *p, EPS),
        lambda *p: plain(rows, *p),
        parameters(96),
        dtype,
    )


def test_starts_the_stream_in_autocasts_dtype(rows: tuple[Tensor, ...]) -> None:
    inputs = parameters(8)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = ops.bert_embedding(*rows, *inputs, EPS)
    assert torch.equal(narrow, ops.bert_embedding(*rows, *inputs, EPS).bfloat16())
    doubles = [value.double() for value in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.bert_embedding(*rows, *doubles, EPS).dtype is torch.float64
