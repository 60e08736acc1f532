"""Attention probabilities between near tokens, recomputed from what a whole attention left."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from spanbert_fast.ops.dispatch import accelerated
from spanbert_fast.ops.precision import wide_dtype
from spanbert_fast.ops.random import token_places


@accelerated
def banded_attention(
    query: Tensor,
    key: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    band: int,
) -> Tensor:
    """exp(scale * query_t . key_(t+d) - log_sum_exp_t) for |d| <= band: wide [T, 2 band + 1].

    The mean over the heads. Column c stands for the distance d = c - band; a key outside of the
    query's sequence has probability 0. Time O(T band H K), memory O(T (band + H K)): nothing of
    the size of all pairs is made. `varlen_attention_with_lse` gives the log-sum-exp; under a
    narrower attention window its keys beyond the window have no meaning here.

    Args:
        query: [T, H, K], as `key`.
        key: See `query`.
        log_sum_exp: [T, H], over all keys of the sequence.
        cu_seqlens: int32 [B + 1].
        scale: Factor of the scores, the one that the log-sum-exp was computed with.
        band: Largest distance, at least 0.

    Raises:
        ValueError: A shape does not fit, or `band` is negative.
    """
    if query.dim() != 3 or key.shape != query.shape or log_sum_exp.shape != query.shape[:2]:
        shapes = [tuple(rows.shape) for rows in (query, key, log_sum_exp)]
        raise ValueError(
            f"query, key, log_sum_exp have shapes {shapes}, allowed is [T, H, K] twice and [T, H]"
        )
    if band < 0:
        raise ValueError(f"band is {band}, allowed is a number >= 0")
    num_tokens = query.shape[0]
    wide = wide_dtype(query.dtype)
    query, key, log_sum_exp = query.to(wide), key.to(wide), log_sum_exp.to(wide)
    sequences = token_places(cu_seqlens, num_tokens)[0]
    columns = []
    for distance in range(-band, band + 1):
        first, count = max(0, -distance), max(0, num_tokens - abs(distance))
        # Where the text is shorter than the band, nothing is that far away.
        first = min(first, num_tokens)
        rows = slice(first, first + count)
        others = slice(first + distance, first + distance + count) if count else slice(0, 0)
        scores = scale * (query[rows] * key[others]).sum(-1) - log_sum_exp[rows]
        near = (sequences[rows] == sequences[others])[:, None]
        # Masked before exp: a stranger's score may overflow it.
        kept = scores.masked_fill(~near, float("-inf")).exp().mean(-1)
        columns.append(functional.pad(kept, (first, num_tokens - first - count)))
    return torch.stack(columns, dim=1)
