"""Triton twin of `ops.norm`: dropout, residual and layer normalisation in one pass each way.

Bytes per token in a 16-bit dtype: forward 6 D (branch and residual in, result out), backward 10 D
(gradient, branch and residual in, two gradients out; 8 D without dropout, where both are one). The
sum that is normalised is formed again in the backward rather than stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spanbert_fast.kernels.common import COUNTS, keep_scale, launch_on
from spanbert_fast.kernels.rows import (
    check_dtypes,
    hidden_dropout_arguments,
    hidden_keep,
    hidden_threshold,
    layer_norm_gradient,
    row_statistics,
    row_tiles,
)


@triton.jit(do_not_specialize=COUNTS)
def _forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    sequence_ids_ptr,
    cu_ptr,
    num_rows,
    rows_per_program,
    num_sequences,
    search_steps,
    site,
    threshold,
    eps,
    SIZE: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
        offsets = rows[:, None] * SIZE + columns[None, :]
        total = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = hidden_keep(
                rows,
                seed_ptr,
                sequence_ids_ptr,
                cu_ptr,
                num_sequences,
                search_steps,
                site,
                threshold,
                ROWS,
                BLOCK,
            )
            total = tl.where(keep, total * keep_scale(threshold), 0.0)
        total += residual
        mean, rstd = row_statistics(total, mask, eps, SIZE)
        out = (total - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit(do_not_specialize=COUNTS)
def _backward(
    dy_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    partial_ptr,
    seed_ptr,
    sequence_ids_ptr,
    cu_ptr,
    num_rows,
    rows_per_program,
    num_sequences,
    search_steps,
    site,
    threshold,
    SIZE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
        offsets = rows[:, None] * SIZE + columns[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        total = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        if DROPOUT:
            keep = hidden_keep(
                rows,
                seed_ptr,
                sequence_ids_ptr,
                cu_ptr,
                num_sequences,
                search_steps,
                site,
                threshold,
                ROWS,
                BLOCK,
            )
            total = tl.where(keep, total * keep_scale(threshold), 0.0)
        total += residual
        normalised = tl.where(mask, (total - mean[:, None]) * rstd[:, None], 0.0)
        weight_sum += dy * normalised
        bias_sum += dy
        gradient = layer_norm_gradient(dy, normalised, weight, rstd, SIZE)
        if BOTH:
            tl.store(
                dresidual_ptr + offsets, gradient.to(dresidual_ptr.dtype.element_ty), mask=mask
            )
        if DROPOUT:
            gradient = tl.where(keep, gradient * keep_scale(threshold), 0.0)
        tl.store(dx_ptr + offsets, gradient.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * SIZE) + columns
    tl.store(partial, tl.sum(weight_sum, axis=0), mask=columns < SIZE)
    tl.store(partial + SIZE, tl.sum(bias_sum, axis=0), mask=columns < SIZE)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """LayerNorm(dropout(x) + residual): [T, D], dtype of `x`; see `ops.norm`."""
    check_dtypes("dropout_add_layer_norm", x=x, residual=residual, weight=weight, bias=bias)
    threshold = hidden_threshold(dropout_p, seed, sequence_ids, cu_seqlens)
    out: Tensor = _forward_op(
        x, residual, weight, bias, eps, threshold, site, seed, sequence_ids, cu_seqlens
    )[0]
    return out


@torch.library.custom_op("spanbert_fast_triton::dropout_add_layer_norm", mutates_args=())
def _forward_op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    threshold: int,
    site: int,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and float32 mean and reciprocal standard deviation of each row."""
    size = x.shape[1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    tiles = row_tiles(x.shape[0], size, num_operands=2)
    with launch_on(x):
        _forward[(tiles.num_programs,)](
            x.contiguous(),
            residual.contiguous(),
            weight,
            bias,
            out,
            mean,
            rstd,
            num_rows=x.shape[0],
            rows_per_program=tiles.rows_per_program,
            eps=eps,
            SIZE=size,
            DROPOUT=threshold > 0,
            ROWS=tiles.rows,
            BLOCK=tiles.block,
            num_warps=tiles.num_warps,
            num_stages=1,
            enable_fp_fusion=True,
            **hidden_dropout_arguments(threshold, site, seed, sequence_ids, cu_seqlens),
        )
    return out, mean, rstd


@_forward_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, statistics, torch.empty_like(statistics)


@torch.library.custom_op("spanbert_fast_triton::dropout_add_layer_norm_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threshold: int,
    site: int,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of residual (empty if it is that of x), and of weight and bias [2, D]."""
    num_rows, size = x.shape
    both = _gradients_differ(x, residual, threshold)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dresidual = residual.new_empty(residual.shape if both else (0, size))
    tiles = row_tiles(num_rows, size, num_operands=3)
    partial = dy.new_empty((tiles.num_programs, 2, size), dtype=torch.float32)
    with launch_on(x):
        _backward[(tiles.num_programs,)](
            dy.contiguous(),
            x.contiguous(),
            residual.contiguous(),
            weight,
            mean,
            rstd,
            dx,
            dresidual,
            partial,
            num_rows=num_rows,
            rows_per_program=tiles.rows_per_program,
            SIZE=size,
            DROPOUT=threshold > 0,
            BOTH=both,
            ROWS=tiles.rows,
            BLOCK=tiles.block,
            num_warps=tiles.num_warps,
            num_stages=1,
            enable_fp_fusion=True,
            **hidden_dropout_arguments(threshold, site, seed, sequence_ids, cu_seqlens),
        )
    return dx, dresidual, partial.sum(0)


@_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threshold: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    both = _gradients_differ(x, residual, threshold)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        residual.new_empty(residual.shape if both else (0, x.shape[1])),
        x.new_empty((2, x.shape[1]), dtype=torch.float32),
    )


def _gradients_differ(x: Tensor, residual: Tensor, threshold: int) -> bool:
    """Without dropout the sum hands one gradient to both; storing it once saves a fifth."""
    return threshold > 0 or x.dtype is not residual.dtype


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, _, threshold, site, *dropout = inputs
    ctx.save_for_backward(x, residual, weight, output[1], output[2], *dropout)
    ctx.threshold, ctx.site, ctx.bias_dtype = threshold, site, bias.dtype
    ctx.mark_non_differentiable(output[1], output[2])


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, residual, weight, mean, rstd, *dropout = ctx.saved_tensors
    dx, dresidual, parameters = _backward_op(
        dy, x, residual, weight, mean, rstd, ctx.threshold, ctx.site, *dropout
    )
    if not _gradients_differ(x, residual, ctx.threshold):
        dresidual = dx
    dweight, dbias = parameters[0].to(weight.dtype), parameters[1].to(ctx.bias_dtype)
    return dx, dresidual, dweight, dbias, *(None,) * 6


_forward_op.register_autograd(_differentiate, setup_context=_save)
