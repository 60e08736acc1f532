"""Attention written out, for those who want to see its probabilities: the "eager" one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from spanbert_fast.model.inputs import PackedInputs
from spanbert_fast.ops.attention import varlen_attention
from spanbert_fast.ops.random import attention_keep_mask, dropout_threshold


def mix_values(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    is_eager: bool,
    inputs: PackedInputs | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Mixed values [T, H, K] and, with `is_eager`, probabilities [B, H, S, S].

    Args:
        query: As all others, see `eager_attention`.
        key: See `query`.
        value: See `query`.
        cu_seqlens: See `query`.
        max_seqlen: See `query`.
        is_eager: Whether the probabilities are wanted.
        inputs: The padded batch by whose columns they are returned; None: by place in the sequence.
        arguments: Scale, window and dropout.
    """
    if not is_eager:
        return varlen_attention(query, key, value, cu_seqlens, max_seqlen, **arguments), None
    if inputs is None or not inputs.has_one_sequence_per_row:
        return eager_attention(query, key, value, cu_seqlens, max_seqlen, **arguments)
    # The product is of the very probabilities that are returned, so that `retain_grad` on them
    # works as in Hugging Face.
    probabilities = eager_probabilities(query, key, cu_seqlens, max_seqlen, **arguments)
    weights = inputs.unpack_attention(probabilities).to(query.dtype)
    mixed = (weights @ inputs.unpack(value).transpose(1, 2)).transpose(1, 2)
    return inputs.pack(mixed), weights


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """Mixed values [T, H, K] and probabilities [B, H, S, S], zero outside sequence and window.

    The same numbers as `ops.attention.varlen_attention`, dropout included, one sequence at a time;
    the probabilities are those that were applied, so with dropout in them, as Hugging Face returns
    them.

    Args:
        query: [T, H, K], as `key` and `value`.
        key: See `query`.
        value: See `query`.
        cu_seqlens: int32 [B + 1].
        max_seqlen: S, at least the length of the longest sequence.
        scale: Factor of the scores.
        window: A query sees keys at a distance of at most this; None: all keys.
        dropout_p: Probability that a probability is dropped.
        seed: int64 scalar, needed if `dropout_p` is not zero.
        sequence_ids: int64 [B], needed if `dropout_p` is not zero.
        site: Place of this dropout in the model.
    """
    weights = eager_probabilities(
        query,
        key,
        cu_seqlens,
        max_seqlen,
        scale=scale,
        window=window,
        dropout_p=dropout_p,
        seed=seed,
        sequence_ids=sequence_ids,
        site=site,
    )
    mixed = [
        (own[:, : end - start, : end - start] @ value[start:end].transpose(0, 1).to(own.dtype))
        .transpose(0, 1)
        .to(query.dtype)
        for own, (start, end) in zip(weights, pairwise(cu_seqlens.tolist()), strict=True)
    ]
    return torch.cat([query[:0], *mixed]), weights.to(query.dtype)


def eager_probabilities(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None,
    dropout_p: float,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    site: int,
) -> Tensor:
    """The probabilities of `eager_attention` alone, wide."""
    bounds = cu_seqlens.tolist()
    num_sequences, num_heads = len(bounds) - 1, query.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    padded = []
    for index, (start, end) in enumerate(pairwise(bounds)):
        q, k = (tensor[start:end].transpose(0, 1).to(wide) for tensor in (query, key))
        scores = q @ k.transpose(1, 2) * scale
        if window is not None:
            places = torch.arange(end - start, device=query.device)
            far = (places[:, None] - places).abs() > window
            scores = scores.masked_fill(far, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        if dropout_p:
            assert seed is not None
            assert sequence_ids is not None
            length, threshold = end - start, dropout_threshold(dropout_p)
            keep = attention_keep_mask(
                num_heads, length, length, int(sequence_ids[index]), dropout_p, seed, site
            )
            weights = weights * keep * (65536 / (65536 - threshold))
        margin = max_seqlen - (end - start)
        padded.append(torch.nn.functional.pad(weights, (0, margin, 0, margin)))
    shape = (num_sequences, num_heads, max_seqlen, max_seqlen)
    return torch.stack(padded) if padded else query.new_zeros(shape, dtype=wide)
