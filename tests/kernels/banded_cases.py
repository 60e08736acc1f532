"""Inputs for the twin of the banded op, in processes of their own (`in_process.py`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from ops.tolerance import BACKWARD, FORWARD, assert_as_accurate
from torch import Tensor

from spanbert_fast import ops
from spanbert_fast.ops.dispatch import twins_on_cpu, use_backend

NAMES = ("band", "grad_query", "grad_key", "grad_log_sum_exp")


class Case(NamedTuple):
    """One call, forward and backward."""

    lengths: tuple[int, ...]
    num_heads: int
    head_size: int
    dtype: torch.dtype
    band: int
    unaligned: bool = False
    """Rows start one element after a 16-byte boundary."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    def operands(self) -> list[Tensor]:
        """Query and key as views of one fused product; the log-sum-exp [T, H] as the twin lends it.

        The latter is that of each query's own keys, so that probabilities are what they say.
        """
        generator = torch.Generator().manual_seed(self.num_tokens + self.head_size)
        shape = (self.num_tokens, 3, self.num_heads, self.head_size)
        values = torch.randn(shape, generator=generator).to(self.dtype)
        if self.unaligned:
            storage = values.new_empty(values.numel() + 1)
            values = storage[1:].view(shape).copy_(values)
        query, key, _ = values.unbind(1)
        lse = torch.empty(self.num_heads, self.num_tokens).t()
        for rows in torch.arange(self.num_tokens).split(self.lengths):
            scores = torch.einsum("ihk,jhk->ihj", query[rows].double(), key[rows].double())
            lse[rows] = (scores * self.scale).logsumexp(-1).float()
        return [query, key, lse]

    def gradient(self) -> Tensor:
        """Gradient from above."""
        generator = torch.Generator().manual_seed(self.num_tokens)
        return torch.randn(self.num_tokens, 2 * self.band + 1, generator=generator)


def run(case: Case, backend: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What `NAMES` says, computed in `dtype`, by default the case's."""

    def near(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        with use_backend(backend), twins_on_cpu():
            return ops.banded_attention(
                query, key, lse, case.cu_seqlens, scale=case.scale, band=case.band
            )

    return _differentiated(case, near, dtype)


def _differentiated(
    case: Case, function: Callable[..., Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    leaves = [
        rows.detach().to(dtype or rows.dtype, memory_format=torch.preserve_format).requires_grad_()
        for rows in case.operands()
    ]
    near = function(*leaves)
    return [near.detach(), *torch.autograd.grad(near, leaves, case.gradient().to(near.dtype))]


def of_whole_map(case: Case, query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
    """The band of the map of all pairs: matrix products sum in another order than the reference."""
    pairs = torch.einsum("ihk,jhk->hij", query.float(), key.float())
    weights = (case.scale * pairs - lse.t()[:, :, None]).exp().mean(0)
    owners = torch.arange(len(case.lengths)).repeat_interleave(torch.tensor(case.lengths).long())
    rows = torch.arange(case.num_tokens)[:, None]
    others = rows + torch.arange(-case.band, case.band + 1)
    inside = others.clamp(0, max(case.num_tokens - 1, 0))
    met = (others == inside) & (owners[inside] == owners[rows])
    return torch.where(met, weights[rows, inside], 0.0)


def assert_obeys_rule(case: Case, ours: Sequence[Tensor]) -> None:
    exact = run(case, "torch", torch.float64)
    plain = _differentiated(case, functools.partial(of_whole_map, case))
    for name, result, other, truth in zip(NAMES, ours, plain, exact, strict=True):
        assert result.shape == other.shape, name
        assert result.dtype is other.dtype, name
        assert not result.isnan().any(), f"{name} has elements that were not written"
        if result.numel():
            factor = BACKWARD if name.startswith("grad") else FORWARD
            assert_as_accurate(result, other, truth, factor, name)
