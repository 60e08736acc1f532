"""Attention inside each sequence of a packed batch.

The reference is a registered operator: a loop over `cu_seqlens` cannot be traced. Its numbers are
computed in `attention_reference`. While exporting, a padded form in plain operators runs instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from spanbert_fast.ops import attention_reference
from spanbert_fast.ops.attention_planes import Dropout
from spanbert_fast.ops.dispatch import accelerated
from spanbert_fast.ops.precision import product_dtype, wide_dtype
from spanbert_fast.ops.random import dropout_threshold, token_places


class AttentionResult(NamedTuple):
    """Attention and the statistics of its softmax."""

    output: Tensor
    """[T, H, K], dtype of the query."""
    log_sum_exp: Tensor
    """[T, H], wide: log of the sum of exp(scaled score) over the keys, before dropout."""


@accelerated
def varlen_attention(
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
) -> Tensor:
    """dropout(softmax(scale * query key^T)) value inside each sequence: [T, H, K].

    Args:
        query: [T, H, K], as `key` and `value`.
        key: See `query`.
        value: See `query`.
        cu_seqlens: int32 [B + 1]; sequences may be empty. The reference reads it on the host.
        max_seqlen: At least the length of the longest sequence.
        scale: Factor of the scores.
        window: A query sees keys at a distance of at most this; None: all keys.
        dropout_p: Probability of dropping a probability; 0 needs none of the following.
        seed: int64 scalar.
        sequence_ids: int64 [B].
        site: Which dropout of the model this is.

    Raises:
        ValueError: A shape, `window` or `dropout_p` is out of range, or what dropout needs is
            missing.
    """
    _check(query, key, value, window, dropout_p, seed, sequence_ids)
    query, key, value = (rows.to(product_dtype(rows)) for rows in (query, key, value))
    if torch.compiler.is_exporting() and dropout_p == 0.0:
        return _grid_attention(query, key, value, cu_seqlens, max_seqlen, scale, window)
    threshold = dropout_threshold(dropout_p)
    output: Tensor = _attention(
        query, key, value, cu_seqlens, scale, window, threshold, seed, sequence_ids, site
    )[0]
    return output


@accelerated
def varlen_attention_with_lse(
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
) -> AttentionResult:
    """`varlen_attention` and the log-sum-exp of its scores, which has a gradient as well."""
    _check(query, key, value, window, dropout_p, seed, sequence_ids)
    query, key, value = (rows.to(product_dtype(rows)) for rows in (query, key, value))
    threshold = dropout_threshold(dropout_p)
    return AttentionResult(
        *_attention(
            query, key, value, cu_seqlens, scale, window, threshold, seed, sequence_ids, site
        )
    )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    dropout_p: float,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
) -> None:
    if query.dim() != 3 or key.shape != query.shape or value.shape != query.shape:
        shapes = [tuple(rows.shape) for rows in (query, key, value)]
        raise ValueError(f"query, key, value have shapes {shapes}, allowed is [T, H, K] for all")
    if window is not None and window < 0:
        raise ValueError(f"window is {window}, allowed is None or a number >= 0")
    if dropout_p != 0.0 and (seed is None or sequence_ids is None):
        raise ValueError(f"dropout_p is {dropout_p}, so seed and sequence_ids have to be given")


def _grid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """The same in plain operators: pack into [B, H, S, K], attend under a key mask, unpack."""
    num_tokens = query.shape[0]
    starts = cu_seqlens[:-1, None].to(torch.int64)
    columns = torch.arange(max_seqlen, device=query.device)
    valid = columns < cu_seqlens.diff()[:, None]
    source = torch.where(valid, starts + columns, 0).flatten()
    shape = (-1, max_seqlen, *query.shape[1:])
    q, k, v = (
        rows.index_select(0, source).view(shape).transpose(1, 2) for rows in (query, key, value)
    )
    # ONNX's operator for attention wants a row of the mask for each query.
    visible = valid[:, None, None, :].expand(-1, 1, max_seqlen, -1)
    if window is not None:
        visible = visible & ((columns[:, None] - columns).abs() <= window)
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    sequences, positions = token_places(cu_seqlens, num_tokens)
    rows = mixed.transpose(1, 2).flatten(0, 1)
    return rows.index_select(0, sequences * max_seqlen + positions)


@torch.library.custom_op("spanbert_fast::varlen_attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    threshold: int,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    dropout = _dropout(threshold, seed, sequence_ids, site)
    return attention_reference.forward(query, key, value, cu_seqlens, scale, window, dropout)


@torch.library.custom_op("spanbert_fast::varlen_attention_backward", mutates_args=())
def _attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    threshold: int,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dropout = _dropout(threshold, seed, sequence_ids, site)
    saved = (query, key, value, output, lse)
    return attention_reference.backward(
        grad_output, grad_lse, *saved, cu_seqlens, scale, window, dropout
    )


def _dropout(
    threshold: int, seed: Tensor | None, sequence_ids: Tensor | None, site: int
) -> Dropout | None:
    if threshold == 0:
        return None
    assert seed is not None
    assert sequence_ids is not None
    return Dropout(threshold, seed, sequence_ids, site)


@_attention.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:2], dtype=wide_dtype(query.dtype))
    return query.new_empty(query.shape), lse


@_attention_backward.register_fake
def _(
    grad_output: Tensor, grad_lse: Tensor | None, query: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = query.shape
    return query.new_empty(shape), query.new_empty(shape), query.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, scale, window, threshold, seed, sequence_ids, site = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens, seed, sequence_ids)
    ctx.settings = (scale, window, threshold)
    ctx.site = site
    # A log-sum-exp that nobody used has no gradient, and backward has a faster path for that.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *saved, seed, sequence_ids = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(saved[3])
    grads = _attention_backward(
        grad_output, grad_lse, *saved, *ctx.settings, seed, sequence_ids, ctx.site
    )
    return (*grads, None, None, None, None, None, None, None)


_attention.register_autograd(_backward, setup_context=_setup_context)
