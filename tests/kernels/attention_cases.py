"""Inputs for the attention twin, in processes of their own (`in_process.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from ops.tolerance import BACKWARD, FORWARD, assert_as_accurate
from torch import Tensor

from spanbert_fast import ops
from spanbert_fast.ops.dispatch import twins_on_cpu, use_backend

SEED = -1234567890123456789
NAMES = ("output", "log_sum_exp", "grad_query", "grad_key", "grad_value")


class Case(NamedTuple):
    """One call, forward and backward."""

    lengths: tuple[int, ...]
    num_heads: int
    head_size: int
    dtype: torch.dtype
    dropout: float = 0.0
    window: int | None = None
    unaligned: bool = False
    """Rows start one element after a 16-byte boundary."""
    lse_has_gradient: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)

    @property
    def options(self) -> dict[str, Any]:
        # Ids beyond 32 bits: only their product with the heads mod 2^32 counts.
        count = len(self.lengths)
        return {
            "scale": self.head_size**-0.5,
            "window": self.window,
            "dropout_p": self.dropout,
            "seed": torch.tensor(SEED),
            "sequence_ids": torch.arange(count) * (2**31 + 7) + 3,
            "site": 16,
        }

    def projections(self) -> list[Tensor]:
        """Query, key and value as views of one fused product, as the model has them."""
        generator = torch.Generator().manual_seed(self.num_tokens + self.head_size)
        shape = (self.num_tokens, 3, self.num_heads, self.head_size)
        values = torch.randn(shape, generator=generator).to(self.dtype)
        if self.unaligned:
            storage = values.new_empty(values.numel() + 1)
            values = storage[1:].view(shape).copy_(values)
        return list(values.unbind(1))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients from above: of the output, and of the log-sum-exp."""
        generator = torch.Generator().manual_seed(self.num_tokens)
        shape = (self.num_tokens, self.num_heads, self.head_size)
        output = torch.randn(shape, generator=generator).to(self.dtype)
        return output, torch.randn(shape[:2], generator=generator)


def run(case: Case, backend: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What `NAMES` says, computed in `dtype`, by default the case's."""
    leaves = [rows.detach().to(dtype or rows.dtype).requires_grad_() for rows in case.projections()]
    with use_backend(backend), twins_on_cpu():
        output, lse = ops.varlen_attention_with_lse(
            *leaves, case.cu_seqlens, max(case.lengths, default=0), **case.options
        )
        above, lse_above = case.gradients()
        total = (output * above.to(output.dtype)).sum()
        if case.lse_has_gradient:
            total = total + (lse * lse_above.to(lse.dtype)).sum()
        return [output.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]


def assert_obeys_rule(case: Case, ours: Sequence[Tensor]) -> None:
    exact, plain = run(case, "torch", torch.float64), run(case, "torch")
    for name, result, other, truth in zip(NAMES, ours, plain, exact, strict=True):
        assert result.shape == other.shape, name
        assert result.dtype is other.dtype, name
        assert not result.isnan().any(), f"{name} has elements that were not written"
        if result.numel():
            factor = BACKWARD if name.startswith("grad") else FORWARD
            assert_as_accurate(result, other, truth, factor, name)
