"""Every op gives the same bits again, with two threads and PyTorch told to be deterministic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from spanbert_fast import ops

EPS = 1e-12
LENGTHS = [40, 30, 40, 0, 20]
T, D, V = sum(LENGTHS), 64, 50


@pytest.fixture(autouse=True)
def _two_threads_and_strict() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def step(inputs: list[Tensor], dropout_p: float) -> list[Tensor]:
    """Loss and gradients of one step through every op, ids and boundaries full of repetitions."""
    table, weight, vector = (value.clone().requires_grad_() for value in inputs)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": torch.tensor(5)}
    options["sequence_ids"] = torch.arange(len(LENGTHS))
    ids, types = torch.arange(T) % 7, torch.arange(T) % 2
    norm = (vector, vector, EPS)
    packed = {**options, "cu_seqlens": bounds}
    rows = ops.bert_embedding(ids, types, types, table, table, table, *norm, **packed, site=0)
    heads = rows.unflatten(-1, (4, 16))
    mixed = ops.varlen_attention(heads, heads, heads, bounds, 40, scale=0.25, **options, site=1)
    rows = ops.dropout_add_layer_norm(mixed.flatten(-2), rows, *norm, **packed, site=2)
    rows = ops.bias_gelu_layer_norm(ops.bias_gelu(rows, vector), vector, *norm)
    left, right = torch.arange(20) // 3, torch.arange(20) // 3 + 1
    cu = torch.arange(0, 61, 3, dtype=torch.int32)
    extra = ops.span_boundary_hidden(
        rows, left, right, cu, table, weight, vector, *norm, num_rows=60
    )
    bias = table[:, 0]
    both = torch.cat([rows, extra])
    loss = ops.linear_cross_entropy(both, table, bias, bias, T, torch.arange(T + 60) % V).loss
    return [loss, *torch.autograd.grad(loss.sum(), (table, weight, vector))]


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_same_bits_every_time(dropout_p: float) -> None:
    inputs = [torch.randn(V, D), torch.randn(D, 3 * D) * 0.1, torch.randn(D)]
    first = step(inputs, dropout_p)
    assert all(value.isfinite().all() for value in first)
    for _ in range(2):
        assert all(map(torch.equal, first, step(inputs, dropout_p)))
