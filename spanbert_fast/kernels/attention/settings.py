"""Launch settings of the attention kernels: a plain function, and a table with its reasons."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Pass = Literal["forward", "backward_query", "backward_key_value"]

SHORT = 128
"""Batches whose longest sequence is at most this form the short bucket."""


class Settings(NamedTuple):
    """How one kernel is compiled."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    spread: int = 4
    """Threads that share neighbouring columns of a tile; see `tiles.py`."""


# Every row compiles without a spill, which a test repeats; the reasons say why not another.
_WIDE = Settings(128, 64, 8, 2)
_WIDE_UNSTAGED = Settings(128, 64, 8, 1)
_TABLE: dict[tuple[Pass, int, bool, bool], Settings] = {
    # (kernel, generation, head size 128, dropout)
    # mma.sync keeps both operands in registers: 128 x 128 spills under dropout, and 4 warps too.
    ("forward", 80, False, False): Settings(128, 64, 8, 3),
    ("forward", 80, False, True): Settings(128, 64, 8, 3),
    ("forward", 80, True, False): Settings(128, 32, 8, 2),
    ("forward", 80, True, True): Settings(128, 32, 8, 2),
    # A thread holds rows of the query, of its gradient and of the output's: 64 keys would spill.
    ("backward_query", 80, False, False): Settings(128, 32, 8, 2),
    ("backward_query", 80, False, True): Settings(128, 32, 8, 2),
    ("backward_query", 80, True, False): Settings(64, 32, 4, 2),
    ("backward_query", 80, True, True): Settings(64, 32, 4, 2),
    # Key and value of the block stay in registers, shared by 8 warps of queries.
    ("backward_key_value", 80, False, False): _WIDE,
    ("backward_key_value", 80, False, True): _WIDE,
    ("backward_key_value", 80, True, False): Settings(64, 64, 8, 2),
    ("backward_key_value", 80, True, True): Settings(64, 64, 8, 2),
    # wgmma reads operands from shared memory, so there is room for a square tile.
    ("forward", 90, False, False): Settings(128, 128, 8, 2),
    ("forward", 90, False, True): Settings(128, 128, 8, 2),
    ("forward", 90, True, False): _WIDE,
    ("forward", 90, True, True): _WIDE,
    ("backward_query", 90, False, False): _WIDE,
    ("backward_query", 90, False, True): _WIDE,
    ("backward_query", 90, True, False): _WIDE,
    ("backward_query", 90, True, True): _WIDE,
    # Square tiles spill, and so would a second stage of 128-wide heads.
    ("backward_key_value", 90, False, False): _WIDE,
    ("backward_key_value", 90, False, True): _WIDE,
    ("backward_key_value", 90, True, False): _WIDE_UNSTAGED,
    ("backward_key_value", 90, True, True): _WIDE_UNSTAGED,
}
_SHORT_TABLE: dict[tuple[Pass, int], Settings] = {
    # Half of a tile of 128 would be padding, and more programs fill the GPU.
    ("forward", 80): Settings(64, 64, 4, 3),
    ("forward", 90): Settings(64, 64, 4, 3),
    ("backward_query", 90): Settings(64, 64, 4, 2),
    ("backward_key_value", 90): Settings(64, 64, 4, 2),
}


def launch_settings(
    which: Pass,
    arch: int,
    dtype: torch.dtype,
    head_size: int,
    max_seqlen: int,
    has_dropout: bool,
    has_window: bool,
) -> Settings:
    """The settings of a kernel.

    Args:
        which: The kernel.
        arch: Compute capability, such as 80, 90 or 100.
        dtype: Of the query.
        head_size: 32, 64 or 128.
        max_seqlen: At least the length of the longest sequence; only its bucket matters.
        has_dropout: Whether probabilities are dropped.
        has_window: Whether a query sees only keys nearby.
    """
    if dtype == torch.float32:
        # No tensor core multiplies float32 exactly, and operands are twice as wide.
        return Settings(32, 32, 4, 1)
    if 100 <= arch < 120:
        # tcgen05 takes 64 or 128 rows; a thread holds a row, of which it can keep 32 columns.
        # With two stages of 128-wide heads, addresses alone would make it spill.
        # It owns a run of keys, so their natural order keeps a counter's eight in one thread.
        return (_WIDE_UNSTAGED if head_size == 128 else _WIDE)._replace(spread=1)
    # Later ones without tcgen05 and earlier ones without wgmma have mma.sync alone.
    generation = 90 if arch == 90 else 80
    if max_seqlen <= SHORT and head_size <= 64 and (which, generation) in _SHORT_TABLE:
        return _SHORT_TABLE[which, generation]
    if has_window and (which, generation, head_size) == ("backward_key_value", 80, 64):
        # The comparisons of a window need registers: those of the second stage's addresses or,
        # without dropout, where that is not enough, those of half a tile.
        return _WIDE_UNSTAGED if has_dropout else Settings(64, 32, 4, 2)
    return _TABLE[which, generation, head_size == 128, has_dropout]
