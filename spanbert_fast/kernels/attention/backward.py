"""The backward kernels: one sums over keys, one over queries, so neither needs an atomic.

Seven products instead of the five of a single kernel, for gradients that are equal in every run.
The first kernel also writes `delta`, the sum of output * its gradient over a head less the gradient
of the log-sum-exp, under dropout times the probability of keeping; the second reads it.
"""

import triton
import triton.language as tl

from spanbert_fast.kernels.attention.tiles import (
    dropped_value,
    in_window,
    keep_tile,
    keys_of_columns,
    place,
    plane_counter,
    seen_range,
    visible_tile,
)
from spanbert_fast.kernels.common import COUNTS, keep_probability, keep_scale


@triton.jit
def score_gradients(weights, applied, grad_weights, delta, SPREAD: tl.constexpr):
    """Gradients of scores, [queries, keys]; `applied` are the weights that dropout keeps.

    With tcgen05 the gradient of the weights arrives late, and predicates kept until then would be
    packed and unpacked; so the mask is in `applied` alone. With mma.sync and wgmma a second tile of
    weights would spill registers, and the mask is in `grad_weights`.
    """
    if SPREAD == 1:
        return applied * grad_weights - weights * delta[:, None]
    return weights * (grad_weights - delta[:, None])


@triton.jit(do_not_specialize=COUNTS)
def attention_backward_query(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    grad_output_ptr,
    lse_ptr,
    grad_lse_ptr,
    delta_ptr,
    grad_query_ptr,
    cu_ptr,
    seed_ptr,
    ids_ptr,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    output_token_stride,
    output_head_stride,
    grad_output_token_stride,
    grad_output_head_stride,
    num_tokens,
    num_heads,
    num_blocks,
    scale,
    window,
    threshold,
    site,
    HEAD_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPREAD: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
):
    """A block of queries of one head: gradient of the query, laid out as the output; `delta`."""
    block, head, sequence, start, length = place(cu_ptr, num_heads, num_blocks)
    first = block * BLOCK_Q
    if first >= length:
        return
    queries = first + tl.arange(0, BLOCK_Q)
    is_query = queries < length
    elements = tl.arange(0, HEAD_SIZE)
    tokens = (start + queries)[:, None]
    mask = is_query[:, None]
    rows = tokens * query_token_stride + head * query_head_stride + elements[None, :]
    query = tl.load(query_ptr + rows, mask=mask, other=0.0)
    rows = tokens * grad_output_token_stride + head * grad_output_head_stride + elements[None, :]
    grad_output = tl.load(grad_output_ptr + rows, mask=mask, other=0.0)
    output_rows = tokens * output_token_stride + head * output_head_stride + elements[None, :]
    output = tl.load(output_ptr + output_rows, mask=mask, other=0.0)
    delta = tl.sum(output.to(tl.float32) * grad_output.to(tl.float32), axis=1)
    places = head.to(tl.int64) * num_tokens + start + queries
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + places, mask=is_query, other=0.0)
    if DROPOUT:
        # Scores' gradients are formed without the factor of what is kept and get it in the end.
        delta *= keep_probability(threshold)
    tl.store(delta_ptr + places, delta, mask=is_query)
    log2_lse = tl.load(lse_ptr + places, mask=is_query, other=0.0) * 1.4426950408889634
    log2_scale = scale * 1.4426950408889634
    columns = keys_of_columns(BLOCK_K, SPREAD, DROPOUT)
    begin, end = seen_range(first, length, window, BLOCK_Q, BLOCK_K, HAS_WINDOW)
    tokens = (start + begin + columns)[None, :]
    key_rows = key_ptr + tokens * key_token_stride + head * key_head_stride + elements[:, None]
    value_rows = value_ptr + tokens * value_token_stride + head * value_head_stride
    value_rows += elements[:, None]
    if DROPOUT:
        seed = tl.load(seed_ptr)
        plane = plane_counter(ids_ptr, sequence, head, num_heads)
    grad_query = tl.zeros((BLOCK_Q, HEAD_SIZE), tl.float32)
    for first_key in range(begin, end, BLOCK_K):
        keys = first_key + columns
        is_key = (keys < length)[None, :]
        key = tl.load(key_rows, mask=is_key, other=0.0)
        value = tl.load(value_rows, mask=is_key, other=0.0)
        scores = tl.dot(query, key, input_precision="ieee")
        visible = visible_tile(queries[:, None], keys[None, :], length, window, HAS_WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        weights = tl.math.exp2(scores * log2_scale - log2_lse[:, None])
        grad_weights = tl.dot(grad_output, value, input_precision="ieee")
        applied = weights
        if DROPOUT:
            keep = keep_tile(
                seed, first_key, queries, plane, site, threshold, BLOCK_Q, BLOCK_K, SPREAD
            )
            if SPREAD == 1:
                applied = tl.where(keep, weights, 0.0)
            else:
                grad_weights = tl.where(keep, grad_weights, 0.0)
        grad_scores = score_gradients(weights, applied, grad_weights, delta, SPREAD)
        grad_query = tl.dot(
            grad_scores.to(key.dtype), tl.trans(key), grad_query, input_precision="ieee"
        )
        key_rows += BLOCK_K * key_token_stride
        value_rows += BLOCK_K * value_token_stride
    factor = scale
    if DROPOUT:
        factor *= keep_scale(threshold)
    grad_query = (grad_query * factor).to(grad_query_ptr.dtype.element_ty)
    tl.store(grad_query_ptr + output_rows, grad_query, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def attention_backward_key_value(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_output_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    cu_ptr,
    seed_ptr,
    ids_ptr,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    output_token_stride,
    output_head_stride,
    grad_output_token_stride,
    grad_output_head_stride,
    num_tokens,
    num_heads,
    num_blocks,
    scale,
    window,
    threshold,
    site,
    HEAD_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPREAD: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """A block of keys of one head: gradients of key and value, laid out as the output.

    A key past the end gives its column of the tile arbitrary numbers; they reach no other column.
    A query past the end has a weight of zero.
    """
    block, head, sequence, start, length = place(cu_ptr, num_heads, num_blocks)
    first = block * BLOCK_K
    if first >= length:
        return
    keys = first + keys_of_columns(BLOCK_K, SPREAD, DROPOUT)
    elements = tl.arange(0, HEAD_SIZE)
    mask = (keys < length)[:, None]
    tokens = (start + keys)[:, None]
    rows = tokens * key_token_stride + head * key_head_stride + elements[None, :]
    key = tl.load(key_ptr + rows, mask=mask, other=0.0)
    rows = tokens * value_token_stride + head * value_head_stride + elements[None, :]
    value = tl.load(value_ptr + rows, mask=mask, other=0.0)
    begin, end = seen_range(first, length, window, BLOCK_K, BLOCK_Q, HAS_WINDOW)
    lines = tl.arange(0, BLOCK_Q)
    tokens = (start + begin + lines)[:, None]
    query_rows = query_ptr + tokens * query_token_stride + head * query_head_stride
    query_rows += elements[None, :]
    above_rows = grad_output_ptr + tokens * grad_output_token_stride
    above_rows += head * grad_output_head_stride + elements[None, :]
    places = head.to(tl.int64) * num_tokens + start
    log2_scale = scale * 1.4426950408889634
    if DROPOUT:
        seed = tl.load(seed_ptr)
        plane = plane_counter(ids_ptr, sequence, head, num_heads)
        nothing = dropped_value(threshold, SPREAD)
    grad_key = tl.zeros((BLOCK_K, HEAD_SIZE), tl.float32)
    grad_value = tl.zeros((BLOCK_K, HEAD_SIZE), tl.float32)
    for first_query in range(begin, end, BLOCK_Q):
        queries = first_query + lines
        is_query = queries < length
        query = tl.load(query_rows, mask=is_query[:, None], other=0.0)
        grad_output = tl.load(above_rows, mask=is_query[:, None], other=0.0)
        lse = tl.load(lse_ptr + places + queries, mask=is_query, other=float("inf"))
        delta = tl.load(delta_ptr + places + queries, mask=is_query, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if HAS_WINDOW:
            visible = in_window(queries[:, None], keys[None, :], window)
            scores = tl.where(visible, scores, float("-inf"))
        weights = tl.math.exp2(scores * log2_scale - lse[:, None] * 1.4426950408889634)
        grad_weights = tl.dot(grad_output, tl.trans(value), input_precision="ieee")
        applied = weights
        if DROPOUT:
            keep = keep_tile(seed, first, queries, plane, site, threshold, BLOCK_Q, BLOCK_K, SPREAD)
            applied = tl.where(keep, weights, nothing)
            if SPREAD > 1:
                grad_weights = tl.where(keep, grad_weights, 0.0)
        grad_value = tl.dot(
            tl.trans(applied.to(query.dtype)), grad_output, grad_value, input_precision="ieee"
        )
        grad_scores = score_gradients(weights, applied, grad_weights, delta, SPREAD)
        grad_scores = grad_scores.to(query.dtype)
        grad_key = tl.dot(tl.trans(grad_scores), query, grad_key, input_precision="ieee")
        query_rows += BLOCK_Q * query_token_stride
        above_rows += BLOCK_Q * grad_output_token_stride
    factor = scale
    if DROPOUT:
        kept_scale = keep_scale(threshold)
        grad_value *= kept_scale
        factor *= kept_scale
    tokens = (start + keys)[:, None]
    output_rows = tokens * output_token_stride + head * output_head_stride + elements[None, :]
    grad_key = (grad_key * factor).to(grad_key_ptr.dtype.element_ty)
    tl.store(grad_key_ptr + output_rows, grad_key, mask=mask)
    tl.store(
        grad_value_ptr + output_rows, grad_value.to(grad_value_ptr.dtype.element_ty), mask=mask
    )
