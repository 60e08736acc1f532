"""Triton twin of `ops.embedding`: three gathers, their sum, norm and dropout in one pass.

The backward first turns the gradient of the result into that of the sum, row by row, then adds the
rows of each table entry in sorted order (`kernels.segments`). The gradient of the sum is kept in
the tables' dtype, so that float32 tables under autocast get float32 sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spanbert_fast.kernels.common import COUNTS, keep_scale, launch_on, product_dtype
from spanbert_fast.kernels.rows import (
    check_dtypes,
    hidden_dropout_arguments,
    hidden_keep,
    hidden_threshold,
    layer_norm_gradient,
    row_statistics,
    row_tiles,
)
from spanbert_fast.kernels.segments import segment_sum


@triton.jit
def _gather(table_ptr, ids_ptr, rows, is_row, columns, mask, SIZE: tl.constexpr):
    """The entry of each row in one table: a float32 tile."""
    ids = tl.load(ids_ptr + rows, mask=is_row, other=0)
    offsets = ids[:, None] * SIZE + columns[None, :]
    return tl.load(table_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def _forward(
    ids_ptr,
    positions_ptr,
    types_ptr,
    word_ptr,
    position_ptr,
    type_ptr,
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
        is_row = rows < num_rows
        mask = is_row[:, None] & (columns < SIZE)[None, :]
        total = _gather(word_ptr, ids_ptr, rows, is_row, columns, mask, SIZE)
        total += _gather(position_ptr, positions_ptr, rows, is_row, columns, mask, SIZE)
        total += _gather(type_ptr, types_ptr, rows, is_row, columns, mask, SIZE)
        mean, rstd = row_statistics(total, mask, eps, SIZE)
        out = (total - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
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
            out = tl.where(keep, out * keep_scale(threshold), 0.0)
        offsets = rows[:, None] * SIZE + columns[None, :]
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + rows, mean, mask=is_row)
        tl.store(rstd_ptr + rows, rstd, mask=is_row)


@triton.jit(do_not_specialize=COUNTS)
def _backward(
    dy_ptr,
    ids_ptr,
    positions_ptr,
    types_ptr,
    word_ptr,
    position_ptr,
    type_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dtotal_ptr,
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
        is_row = rows < num_rows
        mask = is_row[:, None] & (columns < SIZE)[None, :]
        offsets = rows[:, None] * SIZE + columns[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        total = _gather(word_ptr, ids_ptr, rows, is_row, columns, mask, SIZE)
        total += _gather(position_ptr, positions_ptr, rows, is_row, columns, mask, SIZE)
        total += _gather(type_ptr, types_ptr, rows, is_row, columns, mask, SIZE)
        mean = tl.load(mean_ptr + rows, mask=is_row, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=is_row, other=0.0)
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
            dy = tl.where(keep, dy * keep_scale(threshold), 0.0)
        normalised = tl.where(mask, (total - mean[:, None]) * rstd[:, None], 0.0)
        weight_sum += dy * normalised
        bias_sum += dy
        dtotal = layer_norm_gradient(dy, normalised, weight, rstd, SIZE)
        tl.store(dtotal_ptr + offsets, dtotal.to(dtotal_ptr.dtype.element_ty), mask=mask)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * SIZE) + columns
    tl.store(partial, tl.sum(weight_sum, axis=0), mask=columns < SIZE)
    tl.store(partial + SIZE, tl.sum(bias_sum, axis=0), mask=columns < SIZE)


def bert_embedding(
    ids: Tensor,
    positions: Tensor,
    types: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    type_table: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """dropout(LayerNorm(word + position + type)): [T, D]; see `ops.embedding`."""
    tables = (word_table, position_table, type_table)
    names = ("word_table", "position_table", "type_table")
    check_dtypes("bert_embedding", **dict(zip(names, tables, strict=True)))
    check_dtypes("bert_embedding", ln_weight=ln_weight, ln_bias=ln_bias)
    threshold = hidden_threshold(dropout_p, seed, sequence_ids, cu_seqlens)
    out: Tensor = _forward_op(
        ids,
        positions,
        types,
        *tables,
        ln_weight,
        ln_bias,
        eps,
        product_dtype(word_table),
        threshold,
        site,
        seed,
        sequence_ids,
        cu_seqlens,
    )[0]
    return out


@torch.library.custom_op("spanbert_fast_triton::bert_embedding", mutates_args=())
def _forward_op(
    ids: Tensor,
    positions: Tensor,
    types: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    type_table: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    threshold: int,
    site: int,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and float32 mean and reciprocal standard deviation of each row."""
    num_rows, size = ids.shape[0], word_table.shape[1]
    out = word_table.new_empty((num_rows, size), dtype=dtype)
    mean = word_table.new_empty(num_rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    tiles = row_tiles(num_rows, size, num_operands=2)
    with launch_on(word_table):
        _forward[(tiles.num_programs,)](
            ids.contiguous(),
            positions.contiguous(),
            types.contiguous(),
            word_table.contiguous(),
            position_table.contiguous(),
            type_table.contiguous(),
            ln_weight,
            ln_bias,
            out,
            mean,
            rstd,
            num_rows=num_rows,
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
def _(
    ids: Tensor,
    positions: Tensor,
    types: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    type_table: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = word_table.new_empty(ids.shape[0], dtype=torch.float32)
    out = word_table.new_empty((ids.shape[0], word_table.shape[1]), dtype=dtype)
    return out, statistics, torch.empty_like(statistics)


@torch.library.custom_op("spanbert_fast_triton::bert_embedding_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    ids: Tensor,
    positions: Tensor,
    types: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    type_table: Tensor,
    ln_weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threshold: int,
    site: int,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the three tables, and of ln_weight and ln_bias [2, D]."""
    num_rows, size = dy.shape
    total_dtype = torch.promote_types(
        torch.promote_types(word_table.dtype, position_table.dtype), type_table.dtype
    )
    dtotal = torch.empty((num_rows, size), dtype=total_dtype, device=dy.device)
    tiles = row_tiles(num_rows, size, num_operands=4)
    partial = dy.new_empty((tiles.num_programs, 2, size), dtype=torch.float32)
    with launch_on(dy):
        _backward[(tiles.num_programs,)](
            dy.contiguous(),
            ids.contiguous(),
            positions.contiguous(),
            types.contiguous(),
            word_table.contiguous(),
            position_table.contiguous(),
            type_table.contiguous(),
            ln_weight,
            mean,
            rstd,
            dtotal,
            partial,
            num_rows=num_rows,
            rows_per_program=tiles.rows_per_program,
            SIZE=size,
            DROPOUT=threshold > 0,
            ROWS=tiles.rows,
            BLOCK=tiles.block,
            num_warps=tiles.num_warps,
            num_stages=1,
            enable_fp_fusion=True,
            **hidden_dropout_arguments(threshold, site, seed, sequence_ids, cu_seqlens),
        )
    return (
        segment_sum(dtotal, ids, word_table.shape[0], word_table.dtype),
        segment_sum(dtotal, positions, position_table.shape[0], position_table.dtype),
        segment_sum(dtotal, types, type_table.shape[0], type_table.dtype),
        partial.sum(0),
    )


@_backward_op.register_fake
def _(
    dy: Tensor,
    ids: Tensor,
    positions: Tensor,
    types: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    type_table: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tables = (word_table, position_table, type_table)
    word, position, kind = (
        torch.empty_like(table, memory_format=torch.contiguous_format) for table in tables
    )
    return word, position, kind, dy.new_empty((2, dy.shape[1]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ln_bias, _, _, threshold, site, seed, sequence_ids, cu_seqlens = inputs
    dropout = (seed, sequence_ids, cu_seqlens)
    ctx.save_for_backward(*tensors, output[1], output[2], *dropout)
    ctx.threshold, ctx.site, ctx.ln_bias_dtype = threshold, site, ln_bias.dtype
    ctx.mark_non_differentiable(output[1], output[2])


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed, sequence_ids, cu_seqlens = ctx.saved_tensors
    word, position, kind, parameters = _backward_op(
        dy, *tensors, ctx.threshold, ctx.site, seed, sequence_ids, cu_seqlens
    )
    ln_weight = tensors[6]
    dweight, dbias = parameters[0].to(ln_weight.dtype), parameters[1].to(ctx.ln_bias_dtype)
    return None, None, None, word, position, kind, dweight, dbias, *(None,) * 7


_forward_op.register_autograd(_differentiate, setup_context=_save)
