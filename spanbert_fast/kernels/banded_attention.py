"""Triton twin of `ops.banded_attention`: probabilities near the diagonal, forward and backward.

The band is stored as [T, 2 band + 1] with one row to a query, so query t and key u meet at element
t (2 band + 1) + (u - t + band) = t (2 band) + u + band: a tile of queries and keys is a tile of the
band, whose rows lie 2 band apart, and neighbouring keys of a query are neighbours in memory.

Blocks are cut from the packed rows, whatever sequences those belong to, so that no block is padding
and `cu_seqlens` is not read on the host. Bytes per token in a 16-bit dtype, H heads of K elements:
forward 4 H K (query and key in), 4 H (log-sum-exp in), 8 band + 4 (out). A program owns a tile of
the band and adds up its heads; in backward, heads are independent. No atomics anywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spanbert_fast.kernels.common import COUNTS, architecture, check_dtype, launch_on
from spanbert_fast.kernels.rows import find_sequences

HEAD_SIZES = (32, 64, 128)
"""Those of the attention kernels, which the log-sum-exp comes from."""

# The band follows from the words of a batch, so no value of it may compile another variant.
_COUNTS = (*COUNTS, "band")


class Settings(NamedTuple):
    """How a kernel is compiled."""

    block: int
    """Rows of the block that a program owns: queries, or keys in their gradient."""
    reach: int
    """Rows of a block of those that they meet."""
    num_warps: int
    num_stages: int


def launch_settings(is_forward: bool, arch: int, dtype: torch.dtype, head_size: int) -> Settings:
    """The settings of a kernel.

    | settings | reason |
    | --- | --- |
    | 64 rows | the least that wgmma and tcgen05 multiply |
    | 64 of those they meet | 128 leave one program of 8 warps to a multiprocessor of sm_80 |
    | 8 warps | a tile of the band, its mask and its addresses: with 4, the backward spills |
    | forward, 2 stages | the next head's rows arrive during the product of this one |
    | backward, 1 stage | there are few steps, and addresses of a second stage take registers |
    | 32 in heads of 128 | mma.sync has both operands of the gradient in registers: 64 spill |
    | float32 | no tensor core multiplies it exactly, and operands are twice as wide |

    Args:
        is_forward: Whether it is the forward kernel.
        arch: Compute capability, such as 80, 90 or 100.
        dtype: Of query and key.
        head_size: 32, 64 or 128.
    """
    if dtype == torch.float32:
        return Settings(32, 32, 8, 1)
    if is_forward:
        return Settings(64, 64, 8, 2)
    # Later ones without tcgen05 and earlier ones without wgmma have mma.sync alone.
    has_large_products = 90 <= arch < 120
    return Settings(64, 32 if head_size == 128 and not has_large_products else 64, 8, 1)


@triton.jit
def _near_range(rows, cu_ptr, num_tokens, num_sequences, search_steps, band):
    """First and end of the packed rows that each row meets: of its sequence, within the band."""
    inside = tl.minimum(rows, num_tokens - 1)
    sequences, positions = find_sequences(inside, cu_ptr, num_sequences, search_steps)
    end = tl.load(cu_ptr + sequences + 1)
    # Rows past the end meet nothing: `rows - band` may lie inside, but no row is at its end.
    end = tl.where(rows < num_tokens, tl.minimum(end, rows + band + 1), 0)
    return tl.maximum(inside - positions, rows - band), end


@triton.jit(do_not_specialize=_COUNTS)
def banded_forward(
    query_ptr,
    key_ptr,
    lse_ptr,
    cu_ptr,
    near_ptr,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    num_tokens,
    num_heads,
    num_sequences,
    num_blocks,
    search_steps,
    scale,
    band,
    HEAD_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the band: mean over heads of the probabilities of a block of queries and keys."""
    # Tiles of one block of queries are neighbours, so that they find the queries in the cache.
    first = tl.program_id(0) // num_blocks * BLOCK_Q
    queries = first + tl.arange(0, BLOCK_Q)
    keys = first - band + tl.program_id(0) % num_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    elements = tl.arange(0, HEAD_SIZE)
    is_query = queries < num_tokens
    is_key = (keys >= 0) & (keys < num_tokens)
    query_rows = query_ptr + queries.to(tl.int64)[:, None] * query_token_stride + elements[None, :]
    key_rows = key_ptr + keys.to(tl.int64)[None, :] * key_token_stride + elements[:, None]
    lse_rows = lse_ptr + queries
    total = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for _ in range(num_heads):
        query = tl.load(query_rows, mask=is_query[:, None], other=0.0)
        key = tl.load(key_rows, mask=is_key[None, :], other=0.0)
        lse = tl.load(lse_rows, mask=is_query, other=0.0)
        scores = tl.dot(query, key, input_precision="ieee")
        # Not in units of log 2: two roundings of numbers larger than their difference would follow.
        total += tl.exp(scores * scale - lse[:, None])
        query_rows += query_head_stride
        key_rows += key_head_stride
        lse_rows += num_tokens
    begin, end = _near_range(queries, cu_ptr, num_tokens, num_sequences, search_steps, band)
    met = (keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None])
    # Strangers' scores may have overflowed: their sums are dropped, not multiplied by zero.
    near = tl.where(met, total / num_heads, 0.0)
    columns = keys[None, :] - queries[:, None] + band
    mask = is_query[:, None] & (columns >= 0) & (columns <= 2 * band)
    rows = queries.to(tl.int64) * (2 * band.to(tl.int64))
    places = rows[:, None] + (keys.to(tl.int64) + band)[None, :]
    tl.store(near_ptr + places, near, mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def banded_backward(
    own_ptr,
    other_ptr,
    lse_ptr,
    cu_ptr,
    grad_near_ptr,
    grad_own_ptr,
    grad_lse_ptr,
    own_token_stride,
    own_head_stride,
    other_token_stride,
    other_head_stride,
    num_tokens,
    num_heads,
    num_sequences,
    search_steps,
    scale,
    band,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REACH: tl.constexpr,
    OF_KEYS: tl.constexpr,
):
    """A block of rows of one head: gradient of the queries (and log-sum-exp), or of the keys."""
    first = tl.program_id(0) * BLOCK
    head = tl.program_id(1).to(tl.int64)
    own = first + tl.arange(0, BLOCK)
    elements = tl.arange(0, HEAD_SIZE)
    is_own = own < num_tokens
    wide_own = own.to(tl.int64)
    own_rows = own_ptr + head * own_head_stride + wide_own[:, None] * own_token_stride
    rows = tl.load(own_rows + elements[None, :], mask=is_own[:, None], other=0.0)
    begin, end = _near_range(own, cu_ptr, num_tokens, num_sequences, search_steps, band)
    lse_rows = lse_ptr + head * num_tokens
    share = 1.0 / num_heads
    grad = tl.zeros((BLOCK, HEAD_SIZE), tl.float32)
    grad_lse = tl.zeros((BLOCK,), tl.float32)
    distance = 2 * band.to(tl.int64)
    stop = tl.minimum(first + BLOCK + band, num_tokens)
    if not OF_KEYS:
        own_lse = tl.load(lse_rows + own, mask=is_own, other=0.0)
    for first_other in range(tl.maximum(first - band, 0), stop, REACH):
        others = first_other + tl.arange(0, REACH)
        is_other = others < num_tokens
        wide = others.to(tl.int64)
        other_rows = other_ptr + head * other_head_stride + wide[:, None] * other_token_stride
        other = tl.load(other_rows + elements[None, :], mask=is_other[:, None], other=0.0)
        # In this order; the other way the rows would live in registers, too many in float32.
        scores = tl.trans(tl.dot(other, tl.trans(rows), input_precision="ieee"))
        met = (others[None, :] >= begin[:, None]) & (others[None, :] < end[:, None])
        if OF_KEYS:
            lse = tl.load(lse_rows + others, mask=is_other, other=0.0)[None, :]
            places = wide[None, :] * distance + (wide_own + band)[:, None]
        else:
            lse = own_lse[:, None]
            places = wide_own[:, None] * distance + (wide + band)[None, :]
        above = tl.load(grad_near_ptr + places, mask=met, other=0.0) * share
        weights = tl.exp(scores * scale - lse)
        slope = tl.where(met, weights * above, 0.0)
        if not OF_KEYS:
            grad_lse -= tl.sum(slope, axis=1)
        # Scaled before it is rounded, so that it is about as large as the gradient itself.
        grad = tl.dot((slope * scale).to(other.dtype), other, grad, input_precision="ieee")
    grad_rows = grad_own_ptr + (wide_own[:, None] * num_heads + head) * HEAD_SIZE
    grad = grad.to(grad_own_ptr.dtype.element_ty)
    tl.store(grad_rows + elements[None, :], grad, mask=is_own[:, None])
    if not OF_KEYS:
        tl.store(grad_lse_ptr + head * num_tokens + own, grad_lse, mask=is_own)


def banded_attention(
    query: Tensor,
    key: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    band: int,
) -> Tensor:
    """exp(scale * query_t . key_(t+d) - log_sum_exp_t) for |d| <= band: float32 [T, 2 band + 1].

    The mean over the heads; see `ops.banded_attention`.

    Args:
        query: [T, H, K], K one of `HEAD_SIZES`, as `key`.
        key: See `query`.
        log_sum_exp: [T, H], over all keys of the sequence.
        cu_seqlens: int32 [B + 1], from 0 to T; sequences may be empty. Not read on the host.
        scale: Factor of the scores, the one that the log-sum-exp was computed with.
        band: Largest distance, at least 0.

    Raises:
        TypeError: A dtype is none that the kernels compute in.
        ValueError: A shape or number is out of range.
    """
    _check(query, key, log_sum_exp, cu_seqlens, band)
    # The twin of attention made it [H, T] and lent it transposed, so nothing is copied then.
    by_head = log_sum_exp.to(torch.float32).t()
    near: Tensor = _forward_op(query, key, by_head, cu_seqlens, scale, band)
    return near


def _check(query: Tensor, key: Tensor, log_sum_exp: Tensor, cu_seqlens: Tensor, band: int) -> None:
    if query.dim() != 3 or key.shape != query.shape or log_sum_exp.shape != query.shape[:2]:
        shapes = [tuple(rows.shape) for rows in (query, key, log_sum_exp)]
        raise ValueError(
            f"query, key, log_sum_exp have shapes {shapes}, allowed is [T, H, K] twice and [T, H]"
        )
    check_dtype("query", query)
    if key.dtype != query.dtype:
        raise TypeError(f"key has dtype {key.dtype}, allowed is the query's, {query.dtype}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}, allowed is torch.int32")
    if query.shape[2] not in HEAD_SIZES:
        raise ValueError(f"head size is {query.shape[2]}, allowed are {HEAD_SIZES}")
    if band < 0:
        raise ValueError(f"band is {band}, allowed is a number >= 0")


def _dense(rows: Tensor) -> Tensor:
    """The same rows with neighbouring elements of a head next to each other, as kernels want."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    settings: Settings,
    query: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    band: int,
    **arguments: Any,
) -> None:
    """Starts a kernel with what all of them share."""
    num_tokens, num_heads, head_size = query.shape
    if num_tokens * num_heads == 0:
        return
    num_sequences = cu_seqlens.shape[0] - 1
    with launch_on(query):
        kernel[grid](
            cu_ptr=cu_seqlens.contiguous(),
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_sequences=num_sequences,
            search_steps=max(num_sequences - 1, 0).bit_length(),
            scale=scale,
            # A wider one meets no more, but the rows of its result lie further apart.
            band=band,
            HEAD_SIZE=head_size,
            num_warps=settings.num_warps,
            num_stages=settings.num_stages,
            enable_fp_fusion=True,
            **arguments,
        )


@torch.library.custom_op("spanbert_fast_triton::banded_attention", mutates_args=())
def _forward_op(
    query: Tensor, key: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float, band: int
) -> Tensor:
    """The band; `lse` is float32 [H, T] so that a block of queries reads it in one piece."""
    query, key = _dense(query), _dense(key)
    num_tokens = query.shape[0]
    near = query.new_empty((num_tokens, 2 * band + 1), dtype=torch.float32)
    settings = launch_settings(True, architecture(query.device), query.dtype, query.shape[2])
    num_blocks = triton.cdiv(settings.block + 2 * band, settings.reach)
    _launch(
        banded_forward,
        (triton.cdiv(num_tokens, settings.block) * num_blocks,),
        settings,
        query,
        cu_seqlens,
        scale,
        band,
        query_ptr=query,
        key_ptr=key,
        lse_ptr=lse.contiguous(),
        near_ptr=near,
        query_token_stride=query.stride(0),
        query_head_stride=query.stride(1),
        key_token_stride=key.stride(0),
        key_head_stride=key.stride(1),
        num_blocks=num_blocks,
        BLOCK_Q=settings.block,
        BLOCK_K=settings.reach,
    )
    return near


@torch.library.custom_op("spanbert_fast_triton::banded_attention_backward", mutates_args=())
def _backward_op(
    grad_near: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    band: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and log-sum-exp [H, T]."""
    query, key = _dense(query), _dense(key)
    num_tokens, num_heads, head_size = query.shape
    grads = query.new_empty(query.shape), key.new_empty(key.shape)
    lse, grad_near = lse.contiguous(), grad_near.contiguous()
    grad_lse = torch.empty_like(lse)
    settings = launch_settings(False, architecture(query.device), query.dtype, head_size)
    grid = (triton.cdiv(num_tokens, settings.block), num_heads)
    for of_keys, own, other in ((False, query, key), (True, key, query)):
        _launch(
            banded_backward,
            grid,
            settings,
            query,
            cu_seqlens,
            scale,
            band,
            own_ptr=own,
            other_ptr=other,
            lse_ptr=lse,
            grad_near_ptr=grad_near,
            grad_own_ptr=grads[of_keys],
            grad_lse_ptr=None if of_keys else grad_lse,
            own_token_stride=own.stride(0),
            own_head_stride=own.stride(1),
            other_token_stride=other.stride(0),
            other_head_stride=other.stride(1),
            BLOCK=settings.block,
            REACH=settings.reach,
            OF_KEYS=of_keys,
        )
    return grads[0], grads[1], grad_lse


@_forward_op.register_fake
def _(
    query: Tensor, key: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float, band: int
) -> Tensor:
    return query.new_empty((query.shape[0], 2 * band + 1), dtype=torch.float32)


@_backward_op.register_fake
def _(
    grad_near: Tensor, query: Tensor, key: Tensor, lse: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_lse = lse.new_empty(lse.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), grad_lse


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, lse, cu_seqlens, scale, band = inputs
    ctx.save_for_backward(query, key, lse, cu_seqlens)
    ctx.settings = (scale, band)


def _differentiate(ctx: Any, grad_near: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward_op(grad_near, *ctx.saved_tensors, *ctx.settings)
    return (*grads, None, None, None)


_forward_op.register_autograd(_differentiate, setup_context=_save)
