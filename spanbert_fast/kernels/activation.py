"""Triton twins of `ops.activation`: bias and exact GELU in one pass each way, with or without norm.

Both read the product they follow and write the result, nothing else: the backward forms the sum
with the bias again. Bytes per element in a 16-bit dtype: forward 4, backward 6.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spanbert_fast.kernels.common import COUNTS, launch_on
from spanbert_fast.kernels.rows import (
    Tiles,
    check_dtypes,
    gelu,
    gelu_slope,
    layer_norm_gradient,
    row_statistics,
    row_tiles,
)

# A row of the feed-forward layer needs no sum over itself, so it is cut into blocks of columns:
# 1,024 divides the usual 3,072 and 4,096, and no thread is idle.
_MAX_COLUMNS = 1024


@triton.jit(do_not_specialize=COUNTS)
def _gelu_forward(
    x_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    rows_per_program,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
        offsets = rows[:, None] * SIZE + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        out = gelu(x + bias[None, :])
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _gelu_backward(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,
    num_rows,
    rows_per_program,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
        offsets = rows[:, None] * SIZE + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dx = dy * gelu_slope(x + bias[None, :])
        bias_sum += dx
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * SIZE + columns
    tl.store(partial, tl.sum(bias_sum, axis=0), mask=columns < SIZE)


@triton.jit(do_not_specialize=COUNTS)
def _gelu_norm_forward(
    x_ptr,
    bias_ptr,
    weight_ptr,
    ln_bias_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    rows_per_program,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
        offsets = rows[:, None] * SIZE + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # Rows past the end are the bias alone, whose deviation would be taken for zero.
        activated = tl.where(mask, gelu(x + bias[None, :]), 0.0)
        mean, rstd = row_statistics(activated, mask, eps, SIZE)
        out = (activated - mean[:, None]) * rstd[:, None] * weight[None, :] + ln_bias[None, :]
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
        tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit(do_not_specialize=COUNTS)
def _gelu_norm_backward(
    dy_ptr,
    x_ptr,
    bias_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    num_rows,
    rows_per_program,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    ln_bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(0, rows_per_program, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
        offsets = rows[:, None] * SIZE + columns[None, :]
        total = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        normalised = tl.where(mask, (gelu(total) - mean[:, None]) * rstd[:, None], 0.0)
        weight_sum += dy * normalised
        ln_bias_sum += dy
        dx = layer_norm_gradient(dy, normalised, weight, rstd, SIZE) * gelu_slope(total)
        # Rows past the end have no reciprocal deviation, so theirs is zero already.
        bias_sum += dx
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (3 * SIZE) + columns
    tl.store(partial, tl.sum(bias_sum, axis=0), mask=columns < SIZE)
    tl.store(partial + SIZE, tl.sum(weight_sum, axis=0), mask=columns < SIZE)
    tl.store(partial + 2 * SIZE, tl.sum(ln_bias_sum, axis=0), mask=columns < SIZE)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias): [T, F], dtype of `x`; see `ops.activation`."""
    check_dtypes("bias_gelu", x=x, bias=bias)
    out: Tensor = _gelu_op(x, bias)
    return out


def bias_gelu_layer_norm(
    x: Tensor, bias: Tensor, weight: Tensor, ln_bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm(GELU(x + bias)): [T, D], dtype of `x`; see `ops.activation`."""
    check_dtypes("bias_gelu_layer_norm", x=x, bias=bias, weight=weight, ln_bias=ln_bias)
    out: Tensor = _gelu_norm_op(x, bias, weight, ln_bias, eps)[0]
    return out


def _settings(tiles: Tiles, x: Tensor) -> dict[str, Any]:
    """The arguments that all four kernels share."""
    return {
        "num_rows": x.shape[0],
        "rows_per_program": tiles.rows_per_program,
        "SIZE": x.shape[1],
        "ROWS": tiles.rows,
        "BLOCK": tiles.block,
        "num_warps": tiles.num_warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


@torch.library.custom_op("spanbert_fast_triton::bias_gelu", mutates_args=())
def _gelu_op(x: Tensor, bias: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tiles = row_tiles(x.shape[0], min(x.shape[1], _MAX_COLUMNS), num_operands=2)
    grid = (tiles.num_programs, triton.cdiv(x.shape[1], tiles.block))
    with launch_on(x):
        _gelu_forward[grid](x.contiguous(), bias, out, **_settings(tiles, x))
    return out


@_gelu_op.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("spanbert_fast_triton::bias_gelu_backward", mutates_args=())
def _gelu_backward_op(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    tiles = row_tiles(x.shape[0], min(x.shape[1], _MAX_COLUMNS), num_operands=2)
    grid = (tiles.num_programs, triton.cdiv(x.shape[1], tiles.block))
    partial = x.new_empty((tiles.num_programs, x.shape[1]), dtype=torch.float32)
    with launch_on(x):
        _gelu_backward[grid](
            dy.contiguous(), x.contiguous(), bias, dx, partial, **_settings(tiles, x)
        )
    return dx, partial.sum(0).to(bias.dtype)


@_gelu_backward_op.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


def _save_gelu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_gelu(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    dx, dbias = _gelu_backward_op(dy, *ctx.saved_tensors)
    return dx, dbias


_gelu_op.register_autograd(_differentiate_gelu, setup_context=_save_gelu)


@torch.library.custom_op("spanbert_fast_triton::bias_gelu_layer_norm", mutates_args=())
def _gelu_norm_op(
    x: Tensor, bias: Tensor, weight: Tensor, ln_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and float32 mean and reciprocal standard deviation of each row."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    tiles = row_tiles(x.shape[0], x.shape[1], num_operands=2)
    with launch_on(x):
        _gelu_norm_forward[(tiles.num_programs,)](
            x.contiguous(),
            bias,
            weight,
            ln_bias,
            out,
            mean,
            rstd,
            eps=eps,
            **_settings(tiles, x),
        )
    return out, mean, rstd


@_gelu_norm_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, statistics, torch.empty_like(statistics)


@torch.library.custom_op("spanbert_fast_triton::bias_gelu_layer_norm_backward", mutates_args=())
def _gelu_norm_backward_op(
    dy: Tensor, x: Tensor, bias: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of bias, weight and ln_bias [3, D]."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    tiles = row_tiles(x.shape[0], x.shape[1], num_operands=3)
    partial = x.new_empty((tiles.num_programs, 3, x.shape[1]), dtype=torch.float32)
    with launch_on(x):
        _gelu_norm_backward[(tiles.num_programs,)](
            dy.contiguous(),
            x.contiguous(),
            bias,
            weight,
            mean,
            rstd,
            dx,
            partial,
            **_settings(tiles, x),
        )
    return dx, partial.sum(0)


@_gelu_norm_backward_op.register_fake
def _(dy: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty((3, x.shape[1]), dtype=torch.float32)


def _save_gelu_norm(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, bias, weight, ln_bias, _ = inputs
    ctx.save_for_backward(x, bias, weight, output[1], output[2])
    ctx.ln_bias_dtype = ln_bias.dtype
    ctx.mark_non_differentiable(output[1], output[2])


def _differentiate_gelu_norm(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    _, bias, weight, *_ = ctx.saved_tensors
    dx, parameters = _gelu_norm_backward_op(dy, *ctx.saved_tensors)
    dtypes = (bias.dtype, weight.dtype, ctx.ln_bias_dtype)
    gradients = (row.to(dtype) for row, dtype in zip(parameters, dtypes, strict=True))
    return dx, *gradients, None


_gelu_norm_op.register_autograd(_differentiate_gelu_norm, setup_context=_save_gelu_norm)
