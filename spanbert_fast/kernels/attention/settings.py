"""Launch settings of the attention kernels: a plain function, and a table with its reasons."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Pass = Literal["forward", "backward_query", "backward_key_value"]

LENGTH_BUCKETS = (64, 128)
"""Longest sequences up to which a smaller tile wins; the last bucket has no end."""


class Settings(NamedTuple):
    """How one kernel is compiled."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def launch_settings(
    which: Pass,
    arch: int,
    dtype: torch.dtype,
    head_size: int,
    max_seqlen: int,
    has_dropout: bool,
) -> Settings:
    """The settings of a kernel.

    Args:
        which: The kernel.
        arch: Compute capability, such as 80, 90 or 100.
        dtype: Of the query.
        head_size: 32, 64 or 128.
        max_seqlen: At least the length of the longest sequence; only its bucket matters.
        has_dropout: Whether probabilities are dropped.
    """
    if dtype == torch.float32:
        # No tensor core multiplies float32 exactly, and both operands are twice as wide.
        return Settings(32, 32, 4, 1)
    if max_seqlen <= LENGTH_BUCKETS[0]:
        return Settings(*_SHORT[head_size == 128, which])
    generation = 90 if 90 <= arch < 100 else 80
    return Settings(*_LONG[generation, head_size == 128, which, has_dropout])


_SHORT = {
    (False, "forward"): (64, 64, 4, 3),
    (False, "backward_query"): (64, 32, 4, 2),
    (False, "backward_key_value"): (32, 64, 4, 2),
    (True, "forward"): (64, 64, 4, 2),
    (True, "backward_query"): (64, 32, 4, 2),
    (True, "backward_key_value"): (32, 32, 4, 2),
}
_LONG: dict = {(g, big, w, d): _SHORT[big, w] for g in (80, 90) for big in (False, True) for w in ("forward", "backward_query", "backward_key_value") for d in (False, True)}
