"""Attention of packed sequences against PyTorch's own on the same planes, forward and backward.

With dropout PyTorch falls back to written-out mathematics on a CPU; ours draws reproducible bits.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional

from spanbert_fast import ops

NUM_SEQUENCES, LENGTH, NUM_HEADS, HEAD_SIZE = 4, 512, 12, 64
SCALE = HEAD_SIZE**-0.5


def packed(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    """[T, H, K] by our op."""
    cu_seqlens = torch.arange(NUM_SEQUENCES + 1, dtype=torch.int32) * LENGTH
    return ops.varlen_attention(
        query,
        key,
        value,
        cu_seqlens,
        LENGTH,
        scale=SCALE,
        dropout_p=dropout_p,
        seed=torch.tensor(1),
        sequence_ids=torch.arange(NUM_SEQUENCES),
        site=1,
    )


def padded(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    """[T, H, K] by PyTorch's op on [B, H, S, K]; the sequences are equally long: no padding."""
    planes = (
        rows.view(NUM_SEQUENCES, LENGTH, NUM_HEADS, HEAD_SIZE).transpose(1, 2)
        for rows in (query, key, value)
    )
    mixed = functional.scaled_dot_product_attention(*planes, dropout_p=dropout_p, scale=SCALE)
    return mixed.transpose(1, 2).flatten(0, 1)


@pytest.fixture
def inputs(request: pytest.FixtureRequest) -> list[Tensor]:
    """Query, key and value [T, H, K] with gradients."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_SEQUENCES * LENGTH, NUM_HEADS, HEAD_SIZE)
    rows = [torch.randn(shape, generator=generator) for _ in range(3)]
    return [row.to(request.param).requires_grad_() for row in rows]


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16], ids=str, indirect=True)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("attend", [packed, padded])
def test_forward_and_backward(
    benchmark: BenchmarkFixture,
    attend: Callable[..., Tensor],
    dropout_p: float,
    inputs: list[Tensor],
) -> None:
    tolerance = 1e-5 if inputs[0].dtype == torch.float32 else 2e-2
    difference = packed(*inputs, 0.0) - padded(*inputs, 0.0)
    assert float(difference.detach().abs().max()) < tolerance

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*inputs, dropout_p).sum(), inputs)

    benchmark.group = f"dropout {dropout_p}, {inputs[0].dtype}"
    benchmark.pedantic(step, warmup_rounds=1, rounds=5)
