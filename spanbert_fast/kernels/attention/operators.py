"""The attention kernels as registered operators, and the two functions that `ops` calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from spanbert_fast.kernels.attention.backward import (
    attention_backward_key_value,
    attention_backward_query,
)
from spanbert_fast.kernels.attention.flops import backward_flops, forward_flops
from spanbert_fast.kernels.attention.forward import attention_forward
from spanbert_fast.kernels.attention.settings import Pass, Settings, launch_settings
from spanbert_fast.kernels.common import (
    architecture,
    check_dtype,
    dropout_threshold,
    launch_on,
    product_dtype,
)

HEAD_SIZES = (32, 64, 128)


class AttentionResult(NamedTuple):
    """Attention and the statistics of its softmax."""

    output: Tensor
    """[T, H, K], dtype of the query."""
    log_sum_exp: Tensor
    """float32 [T, H]: log of the sum of exp(scaled score) over the keys, before dropout."""


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
        query: [T, H, K], K one of `HEAD_SIZES`, as `key` and `value`.
        key: See `query`.
        value: See `query`.
        cu_seqlens: int32 [B + 1], from 0 to T; sequences may be empty. Not read on the host.
        max_seqlen: At least the length of the longest sequence.
        scale: Factor of the scores, above 0.
        window: A query sees keys at a distance of at most this; None: all keys.
        dropout_p: Probability of dropping a probability; 0 needs none of the following.
        seed: int64 scalar.
        sequence_ids: int64 [B].
        site: Which dropout of the model this is.

    Raises:
        TypeError: A dtype is none that the kernels compute in.
        ValueError: A shape or number is out of range, or what dropout needs is missing.
    """
    return varlen_attention_with_lse(
        query,
        key,
        value,
        cu_seqlens,
        max_seqlen,
        scale=scale,
        window=window,
        dropout_p=dropout_p,
        seed=seed,
        sequence_ids=sequence_ids,
        site=site,
    ).output


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
    query, key, value = (rows.to(product_dtype(rows)) for rows in (query, key, value))
    threshold = dropout_threshold(dropout_p)
    _check(query, key, value, cu_seqlens, scale, window)
    if threshold and (seed is None or sequence_ids is None):
        raise ValueError(f"dropout_p is {dropout_p}, so seed and sequence_ids have to be given")
    if threshold == 0:
        seed = sequence_ids = None
    output, lse = _forward_op(
        query,
        key,
        value,
        cu_seqlens,
        max_seqlen,
        scale,
        window,
        threshold,
        seed,
        sequence_ids,
        site,
    )
    return AttentionResult(output, lse.t())


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
) -> None:
    if query.dim() != 3 or key.shape != query.shape or value.shape != query.shape:
        shapes = [tuple(rows.shape) for rows in (query, key, value)]
        raise ValueError(f"query, key, value have shapes {shapes}, allowed is [T, H, K] for all")
    check_dtype("query", query)
    for name, rows in (("key", key), ("value", value)):
        if rows.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {rows.dtype}, allowed is the query's, {query.dtype}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}, allowed is torch.int32")
    if query.shape[2] not in HEAD_SIZES:
        raise ValueError(f"head size is {query.shape[2]}, allowed are {HEAD_SIZES}")
    if not scale > 0.0:
        raise ValueError(f"scale is {scale}, allowed is a number above 0")
    if window is not None and window < 0:
        raise ValueError(f"window is {window}, allowed is None or a number >= 0")


def _dense(rows: Tensor) -> Tensor:
    """The same rows with neighbouring elements of a head next to each other, as kernels want."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _strides(**rows: Tensor) -> dict[str, int]:
    """Token and head stride of each, as the kernels' arguments."""
    strides = {}
    for name, tensor in rows.items():
        strides[f"{name}_token_stride"] = tensor.stride(0)
        strides[f"{name}_head_stride"] = tensor.stride(1)
    return strides


def _launch(
    kernel: Any,
    which: Pass,
    query: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    threshold: int,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    site: int,
    **arguments: Any,
) -> None:
    """Starts a kernel with one program for each block of each head of each sequence."""
    num_tokens, num_heads, head_size = query.shape
    num_sequences = cu_seqlens.shape[0] - 1
    arch = architecture(query.device)
    settings: Settings = launch_settings(
        which, arch, query.dtype, head_size, max_seqlen, threshold > 0, window is not None
    )
    block = settings.block_k if which == "backward_key_value" else settings.block_q
    num_blocks = triton.cdiv(max_seqlen, block)
    if num_tokens == 0 or num_blocks * num_heads * num_sequences == 0:
        return
    with launch_on(query):
        kernel[(num_blocks * num_heads * num_sequences,)](
            query_ptr=query,
            cu_ptr=cu_seqlens,
            # Without dropout nothing is read there; any pointer will do.
            seed_ptr=cu_seqlens if seed is None else seed,
            ids_ptr=cu_seqlens if sequence_ids is None else sequence_ids,
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_blocks=num_blocks,
            scale=scale,
            # A wider one sees no more, and might leave int32.
            window=0 if window is None else min(window, max_seqlen),
            threshold=threshold,
            site=site,
            HEAD_SIZE=head_size,
            BLOCK_Q=settings.block_q,
            BLOCK_K=settings.block_k,
            SPREAD=settings.spread,
            HAS_WINDOW=window is not None,
            DROPOUT=threshold > 0,
            num_warps=settings.num_warps,
            num_stages=settings.num_stages,
            enable_fp_fusion=True,
            **arguments,
        )


@torch.library.custom_op("spanbert_fast::triton_varlen_attention", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    threshold: int,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, K], and log-sum-exp [H, T] so that a block of queries reads it in one piece."""
    query, key, value = _dense(query), _dense(key), _dense(value)
    output = query.new_empty(query.shape)
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    _launch(
        attention_forward,
        "forward",
        query,
        cu_seqlens,
        max_seqlen,
        scale,
        window,
        threshold,
        seed,
        sequence_ids,
        site,
        key_ptr=key,
        value_ptr=value,
        output_ptr=output,
        lse_ptr=lse,
        **_strides(query=query, key=key, value=value, output=output),
    )
    return output, lse


@torch.library.custom_op("spanbert_fast::triton_varlen_attention_backward", mutates_args=())
def _backward_op(
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
    threshold: int,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, grad_output = (_dense(rows) for rows in (query, key, value, grad_output))
    grads = [query.new_empty(query.shape) for _ in range(3)]
    delta = torch.empty_like(lse)
    shared: dict[str, Any] = {
        "query": query,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "scale": scale,
        "window": window,
        "threshold": threshold,
        "seed": seed,
        "sequence_ids": sequence_ids,
        "site": site,
        "key_ptr": key,
        "value_ptr": value,
        "grad_output_ptr": grad_output,
        "lse_ptr": lse,
        "delta_ptr": delta,
        **_strides(query=query, key=key, value=value, output=output, grad_output=grad_output),
    }
    _launch(
        attention_backward_query,
        "backward_query",
        output_ptr=output,
        grad_lse_ptr=lse if grad_lse is None else grad_lse.contiguous(),
        grad_query_ptr=grads[0],
        HAS_GRAD_LSE=grad_lse is not None,
        **shared,
    )
    _launch(
        attention_backward_key_value,
        "backward_key_value",
        grad_key_ptr=grads[1],
        grad_value_ptr=grads[2],
        **shared,
    )
    return grads[0], grads[1], grads[2]


@_forward_op.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    return query.new_empty(query.shape), lse


@_backward_op.register_fake
def _(
    grad_output: Tensor, grad_lse: Tensor | None, query: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = query.shape
    return query.new_empty(shape), query.new_empty(shape), query.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, max_seqlen, scale, window, threshold, seed, ids, site = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens, seed, ids)
    ctx.settings = (max_seqlen, scale, window, threshold)
    ctx.site = site
    # A log-sum-exp that nobody used has no gradient, and the kernel need not read one.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *saved, seed, ids = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(saved[3])
    grads = _backward_op(grad_output, grad_lse, *saved, *ctx.settings, seed, ids, ctx.site)
    return (*grads, *[None] * 8)


_forward_op.register_autograd(_backward, setup_context=_setup_context)

register_flop_formula(torch.ops.spanbert_fast.triton_varlen_attention, get_raw=True)(forward_flops)
register_flop_formula(torch.ops.spanbert_fast.triton_varlen_attention_backward, get_raw=True)(
    backward_flops
)
