"""How many floating point operations the mathematics of attention needs, for FLOP counters."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def num_scores(cu_seqlens: Tensor, num_tokens: int, max_seqlen: int, window: int | None) -> int:
    """Pairs of a query and a key it sees, in one head; an upper bound if lengths are not known."""
    if isinstance(cu_seqlens, FakeTensor) or cu_seqlens.is_meta:
        width = max_seqlen if window is None else min(max_seqlen, 2 * window + 1)
        return num_tokens * width
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens.tolist())]
    return sum(_num_pairs(length, window) for length in lengths)


def _num_pairs(length: int, window: int | None) -> int:
    if window is None or window >= length:
        return length * length
    # Each query sees itself and up to `window` on each side; the ends lack a triangle.
    return length * (2 * window + 1) - window * (window + 1)


def forward_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    *_: Any,
    **__: Any,
) -> int:
    """Operations of the forward pass: two products of scores and heads."""
    num_tokens, num_heads, head_size = query.shape
    scores = num_heads * num_scores(cu_seqlens, num_tokens, max_seqlen, window)
    return FORWARD_PRODUCTS * 2 * head_size * scores


def backward_flops(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    *_: Any,
    **__: Any,
) -> int:
    """Operations of the backward pass: five products, though two kernels compute seven."""
    forward = forward_flops(query, key, value, cu_seqlens, max_seqlen, scale, window)
    return forward // FORWARD_PRODUCTS * BACKWARD_PRODUCTS
