"""The forward kernel: softmax over tiles of keys with a running maximum, dropout inside."""

import triton
import triton.language as tl

from spanbert_fast.kernels.attention.tiles import (
    dropped_value,
    keep_tile,
    keys_of_columns,
    place,
    plane_counter,
    seen_range,
    visible_tile,
)
from spanbert_fast.kernels.common import COUNTS, keep_probability


@triton.jit(do_not_specialize=COUNTS)
def attention_forward(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    lse_ptr,
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
    """A block of queries of one head: output, and natural log-sum-exp to `lse` [H, T]."""
    block, head, sequence, start, length = place(cu_ptr, num_heads, num_blocks)
    first = block * BLOCK_Q
    if first >= length:
        return
    queries = first + tl.arange(0, BLOCK_Q)
    columns = keys_of_columns(BLOCK_K, SPREAD, DROPOUT)
    elements = tl.arange(0, HEAD_SIZE)
    query_rows = (start + queries)[:, None] * query_token_stride + head * query_head_stride
    query = tl.load(
        query_ptr + query_rows + elements[None, :], mask=(queries < length)[:, None], other=0.0
    )
    begin, end = seen_range(first, length, window, BLOCK_Q, BLOCK_K, HAS_WINDOW)
    rows = start + begin + columns
    key_rows = key_ptr + rows[None, :] * key_token_stride + head * key_head_stride
    key_rows += elements[:, None]
    value_rows = value_ptr + rows[:, None] * value_token_stride + head * value_head_stride
    value_rows += elements[None, :]
    if DROPOUT:
        seed = tl.load(seed_ptr)
        plane = plane_counter(ids_ptr, sequence, head, num_heads)
        nothing = dropped_value(threshold, SPREAD)
    # Scores in units of log 2: exp2 is what the hardware has.
    log2_scale = scale * 1.4426950408889634
    maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    output = tl.zeros((BLOCK_Q, HEAD_SIZE), tl.float32)
    for first_key in range(begin, end, BLOCK_K):
        keys = first_key + columns
        key = tl.load(key_rows, mask=(keys < length)[None, :], other=0.0)
        scores = tl.dot(query, key, input_precision="ieee")
        visible = visible_tile(queries[:, None], keys[None, :], length, window, HAS_WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * log2_scale)
        offset = new_maximum
        if HAS_WINDOW:
            # A row that has seen no key yet; without a window the first tile shows it one.
            offset = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.math.exp2(scores * log2_scale - offset[:, None])
        shrink = tl.math.exp2(maximum - offset)
        total = total * shrink + tl.sum(weights, axis=1)
        output = output * shrink[:, None]
        maximum = new_maximum
        if DROPOUT:
            keep = keep_tile(
                seed, first_key, queries, plane, site, threshold, BLOCK_Q, BLOCK_K, SPREAD
            )
            weights = tl.where(keep, weights, nothing)
        value = tl.load(value_rows, mask=(keys < length)[:, None], other=0.0)
        output = tl.dot(weights.to(value.dtype), value, output, input_precision="ieee")
        key_rows += BLOCK_K * key_token_stride
        value_rows += BLOCK_K * value_token_stride
    if HAS_WINDOW:
        # Rows past the end may have seen no key; they are not stored.
        total = tl.where(queries < length, total, 1.0)
    factor = 1.0 / total
    if DROPOUT:
        factor = 1.0 / (total * keep_probability(threshold))
    output_rows = (start + queries)[:, None] * output_token_stride + head * output_head_stride
    tl.store(
        output_ptr + output_rows + elements[None, :],
        (output * factor[:, None]).to(output_ptr.dtype.element_ty),
        mask=(queries < length)[:, None],
    )
    lse_rows = head.to(tl.int64) * num_tokens + start + queries
    lse = (maximum + tl.math.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + lse_rows, lse, mask=queries < length)
