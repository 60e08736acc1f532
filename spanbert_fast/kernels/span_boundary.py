"""Triton twin of `ops.span_boundary`: all of the first SBO layer but its matrix products.

The products stay with the vendor's library, on the boundary states of each span and the vectors of
each slot; one kernel forward and one backward do the rest. A kernel with the product inside would
have to own whole rows, for the norm: some 30 programs a step, each streaming the whole matrix, 2.5
to 4 times the modelled time (`benchmarks/kernels/roofline.md`).

A program holds the boundary part of a few spans in registers and walks over their slots, so the
part is read once per span, not once per target, and its gradient is summed in registers. The slots'
gradient is summed over the spans of a program and then over programs. A token bounds at most two
spans; the two gradients meet in a sum over sorted keys (`kernels.segments`). No atomics anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from spanbert_fast.kernels.common import COUNTS, launch_on
from spanbert_fast.kernels.rows import (
    check_dtypes,
    gelu,
    gelu_slope,
    layer_norm_gradient,
    row_statistics,
)
from spanbert_fast.kernels.segments import segment_sum

_COUNTS = (*COUNTS, "num_spans")
# Elements of a tile. More spans to a program would mean fewer partial sums of the slots, but the
# tile, its gradient and two sums of parameters live in registers through the whole loop.
_TILE = 4096
_NUM_WARPS = 8


@triton.jit
def _load_spans(cu_ptr, num_spans, SPANS: tl.constexpr, NUM_SLOTS: tl.constexpr):
    """Spans of this program, first target of each, their targets, and the longest's targets."""
    spans = tl.program_id(0).to(tl.int64) * SPANS + tl.arange(0, SPANS)
    first = tl.load(cu_ptr + spans, mask=spans < num_spans, other=0)
    lengths = tl.load(cu_ptr + spans + 1, mask=spans < num_spans, other=0) - first
    return spans, first.to(tl.int64), lengths, tl.minimum(tl.max(lengths, axis=0), NUM_SLOTS)


@triton.jit
def _load_slot(by_offset_ptr, slot, bias, columns, SIZE: tl.constexpr):
    part = tl.load(by_offset_ptr + slot * SIZE + columns, mask=columns < SIZE, other=0.0)
    return part.to(tl.float32) + bias


@triton.jit(do_not_specialize=_COUNTS)
def _forward(
    by_span_ptr,
    by_offset_ptr,
    cu_ptr,
    bias_ptr,
    weight_ptr,
    ln_bias_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    num_spans,
    eps,
    SIZE: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    SPANS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    spans, first, lengths, longest = _load_spans(cu_ptr, num_spans, SPANS, NUM_SLOTS)
    mask = (spans < num_spans)[:, None] & (columns < SIZE)[None, :]
    by_span = tl.load(by_span_ptr + spans[:, None] * SIZE + columns[None, :], mask=mask, other=0.0)
    for slot in range(longest):
        part = _load_slot(by_offset_ptr, slot, bias, columns, SIZE)
        is_target = slot < lengths
        mask = is_target[:, None] & (columns < SIZE)[None, :]
        activated = tl.where(mask, gelu(by_span.to(tl.float32) + part[None, :]), 0.0)
        mean, rstd = row_statistics(activated, mask, eps, SIZE)
        out = (activated - mean[:, None]) * rstd[:, None] * weight[None, :] + ln_bias[None, :]
        rows = first + slot
        offsets = rows[:, None] * SIZE + columns[None, :]
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + rows, mean, mask=is_target)
        tl.store(rstd_ptr + rows, rstd, mask=is_target)


@triton.jit(do_not_specialize=_COUNTS)
def _backward(
    dy_ptr,
    by_span_ptr,
    by_offset_ptr,
    cu_ptr,
    bias_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dspan_ptr,
    slots_ptr,
    partial_ptr,
    num_spans,
    SIZE: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    SPANS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    is_column = columns < SIZE
    bias = tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    spans, first, lengths, longest = _load_spans(cu_ptr, num_spans, SPANS, NUM_SLOTS)
    is_span = (spans < num_spans)[:, None] & is_column[None, :]
    offsets = spans[:, None] * SIZE + columns[None, :]
    by_span = tl.load(by_span_ptr + offsets, mask=is_span, other=0.0)
    span_sum = tl.zeros((SPANS, BLOCK), tl.float32)
    weight_sum = tl.zeros((SPANS, BLOCK), tl.float32)
    ln_bias_sum = tl.zeros((SPANS, BLOCK), tl.float32)
    slots = slots_ptr + tl.program_id(0).to(tl.int64) * (NUM_SLOTS * SIZE) + columns
    for slot in range(longest):
        total = by_span.to(tl.float32)
        total += _load_slot(by_offset_ptr, slot, bias, columns, SIZE)[None, :]
        is_target = slot < lengths
        mask = is_target[:, None] & is_column[None, :]
        rows = first + slot
        dy = tl.load(dy_ptr + rows[:, None] * SIZE + columns[None, :], mask=mask, other=0.0)
        dy = dy.to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=is_target, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=is_target, other=0.0)
        normalised = tl.where(mask, (gelu(total) - mean[:, None]) * rstd[:, None], 0.0)
        weight_sum += dy * normalised
        ln_bias_sum += dy
        # Spans that have no such slot have no reciprocal deviation: their gradient is zero.
        dtotal = layer_norm_gradient(dy, normalised, weight, rstd, SIZE) * gelu_slope(total)
        span_sum += dtotal
        tl.store(slots + slot * SIZE, tl.sum(dtotal, axis=0), mask=is_column)
    for slot in range(longest, NUM_SLOTS):
        tl.store(slots + slot * SIZE, tl.zeros((BLOCK,), tl.float32), mask=is_column)
    tl.store(dspan_ptr + offsets, span_sum.to(dspan_ptr.dtype.element_ty), mask=is_span)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * SIZE) + columns
    tl.store(partial, tl.sum(weight_sum, axis=0), mask=is_column)
    tl.store(partial + SIZE, tl.sum(ln_bias_sum, axis=0), mask=is_column)


def span_boundary_hidden(
    hidden: Tensor,
    left: Tensor,
    right: Tensor,
    cu: Tensor,
    position_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    *,
    num_rows: int,
) -> Tensor:
    """LayerNorm(GELU(W [h_left; h_right; p_offset] + b)): [N, D]; see `ops.span_boundary`."""
    name = "span_boundary_hidden"
    check_dtypes(name, hidden=hidden, position_table=position_table, weight=weight)
    check_dtypes(name, bias=bias, ln_weight=ln_weight, ln_bias=ln_bias)
    size = 2 * hidden.shape[1]
    by_span = functional.linear(_boundary_op(hidden, left, right), weight[:, :size])
    by_offset = functional.linear(position_table, weight[:, size:])
    out: Tensor = _forward_op(by_span, by_offset, cu, bias, ln_weight, ln_bias, eps, num_rows)[0]
    return out


@torch.library.custom_op("spanbert_fast_triton::boundary_states", mutates_args=())
def _boundary_op(hidden: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Left and right boundary state of each span: [R, 2D]."""
    both = hidden.index_select(0, torch.stack([left, right], dim=1).flatten())
    return both.view(left.shape[0], 2 * hidden.shape[1])


@_boundary_op.register_fake
def _(hidden: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return hidden.new_empty((left.shape[0], 2 * hidden.shape[1]))


@torch.library.custom_op("spanbert_fast_triton::boundary_states_backward", mutates_args=())
def _boundary_backward_op(dy: Tensor, left: Tensor, right: Tensor, num_tokens: int) -> Tensor:
    keys = torch.stack([left, right], dim=1).flatten()
    return segment_sum(dy.reshape(-1, dy.shape[1] // 2), keys, num_tokens, dy.dtype)


@_boundary_backward_op.register_fake
def _(dy: Tensor, left: Tensor, right: Tensor, num_tokens: int) -> Tensor:
    return dy.new_empty((num_tokens, dy.shape[1] // 2))


def _save_boundary(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, left, right = inputs
    ctx.save_for_backward(left, right)
    ctx.num_tokens = hidden.shape[0]


def _differentiate_boundary(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _boundary_backward_op(dy, *ctx.saved_tensors, ctx.num_tokens), None, None


_boundary_op.register_autograd(_differentiate_boundary, setup_context=_save_boundary)


def _settings(by_span: Tensor, by_offset: Tensor) -> dict[str, Any]:
    """The arguments that both kernels share."""
    size = by_span.shape[1]
    block = max(triton.next_power_of_2(size), 16)
    return {
        "num_spans": by_span.shape[0],
        "SIZE": size,
        "NUM_SLOTS": by_offset.shape[0],
        "SPANS": max(_TILE // block, 1) if block >= 256 else 16,
        "BLOCK": block,
        "num_warps": _NUM_WARPS if block >= 256 else 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


@torch.library.custom_op("spanbert_fast_triton::span_boundary_hidden", mutates_args=())
def _forward_op(
    by_span: Tensor,
    by_offset: Tensor,
    cu: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and float32 mean and reciprocal standard deviation of each target."""
    out = by_span.new_empty((num_rows, by_span.shape[1]))
    mean = by_span.new_empty(num_rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    settings = _settings(by_span, by_offset)
    with launch_on(by_span):
        _forward[(triton.cdiv(by_span.shape[0], settings["SPANS"]),)](
            by_span.contiguous(),
            by_offset.contiguous(),
            cu.contiguous(),
            bias,
            ln_weight,
            ln_bias,
            out,
            mean,
            rstd,
            eps=eps,
            **settings,
        )
    return out, mean, rstd


@_forward_op.register_fake
def _(
    by_span: Tensor,
    by_offset: Tensor,
    cu: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = by_span.new_empty(num_rows, dtype=torch.float32)
    out = by_span.new_empty((num_rows, by_span.shape[1]))
    return out, statistics, torch.empty_like(statistics)


@torch.library.custom_op("spanbert_fast_triton::span_boundary_hidden_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    by_span: Tensor,
    by_offset: Tensor,
    cu: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of by_span; of by_offset, float32; and of ln_weight and ln_bias [2, D]."""
    settings = _settings(by_span, by_offset)
    num_programs = triton.cdiv(by_span.shape[0], settings["SPANS"])
    dspan = torch.empty_like(by_span, memory_format=torch.contiguous_format)
    slots = dy.new_empty((num_programs, *by_offset.shape), dtype=torch.float32)
    partial = dy.new_empty((num_programs, 2, dy.shape[1]), dtype=torch.float32)
    with launch_on(by_span):
        _backward[(num_programs,)](
            dy.contiguous(),
            by_span.contiguous(),
            by_offset.contiguous(),
            cu.contiguous(),
            bias,
            ln_weight,
            mean,
            rstd,
            dspan,
            slots,
            partial,
            **settings,
        )
    return dspan, slots.sum(0), partial.sum(0)


@_backward_op.register_fake
def _(dy: Tensor, by_span: Tensor, by_offset: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(by_span, memory_format=torch.contiguous_format),
        by_offset.new_empty(by_offset.shape, dtype=torch.float32),
        dy.new_empty((2, dy.shape[1]), dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    by_span, by_offset, cu, bias, ln_weight, ln_bias, _, _ = inputs
    ctx.save_for_backward(by_span, by_offset, cu, bias, ln_weight, output[1], output[2])
    ctx.ln_bias_dtype = ln_bias.dtype
    ctx.mark_non_differentiable(output[1], output[2])


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    _, by_offset, _, bias, ln_weight, _, _ = ctx.saved_tensors
    dspan, slots, parameters = _backward_op(dy, *ctx.saved_tensors)
    dbias = slots.sum(0).to(bias.dtype)
    dweight, dln_bias = parameters[0].to(ln_weight.dtype), parameters[1].to(ctx.ln_bias_dtype)
    return dspan, slots.to(by_offset.dtype), None, dbias, dweight, dln_bias, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)
