"""Triton twin of `ops.cross_entropy`: the product with the vocabulary and its cross-entropy.

Forward: a program takes a block of rows through a part of the vocabulary and keeps, of each logit,
only what it adds to a running log-sum-exp, to the best class and to the target's logit; a second
kernel merges the parts. Backward, for a chunk of the vocabulary at a time: the logits are formed
again and become slopes in the dtype of the rows (their difference, probability minus target, is
taken in float32), then two products turn slopes into gradients, in float32 sums. A chunk of slopes
is all that is ever stored. Four products in all, where three would do if all logits were kept.

A target outside the vocabulary cannot raise without waiting for the GPU; its loss is NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from spanbert_fast.kernels.common import architecture, launch_on, product_dtype
from spanbert_fast.kernels.rows import check_dtypes
from spanbert_fast.kernels.vocabulary import (
    gradient_of_rows,
    gradient_of_weight,
    merge_parts,
    score_vocabulary,
    slope_of_logits,
)

# What the slopes of a chunk may occupy: about the second-level cache of an H100, between the kernel
# that writes them and the two that read them, and a quarter of the logits of a usual step.
_SLOPE_BYTES = 1 << 26
# Programs that fill the GPU twice over (132 processors, two programs on each).
_PROGRAMS = 264


class CrossEntropy(NamedTuple):
    """One loss per row, and whether the row was predicted right; see `ops.cross_entropy`."""

    loss: Tensor
    correct: Tensor


class _Tiles(NamedTuple):
    """Launch settings: a product of [rows, inner] and [inner, columns] and its pipeline."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


def _logit_tiles(sm: int, dtype: torch.dtype) -> _Tiles:
    """Launch settings of the kernels that reduce logits as soon as they are formed.

    | tile | reason |
    | --- | --- |
    | 16 bit, sm_100 up: 128 x 64 x 64, 8 warps, 3 stages | with 128 columns 77 spills |
    | 16 bit, sm_90: 128 x 128 x 64, 8 warps, 3 stages | two warp groups of `wgmma`, 96 KiB |
    | 16 bit, below: 128 x 128 x 32, 8 warps, 4 stages | `mma` with 64 sums a thread, 64 KiB |
    | float32: 64 x 32 x 32, 4 warps, 2 stages | exact products take no tensor core |
    """
    if dtype is torch.float32:
        return _Tiles(64, 32, 32, num_warps=4, num_stages=2)
    if sm >= 100:
        return _Tiles(128, 64, 64, num_warps=8, num_stages=3)
    return _product_tiles(sm, dtype)


def _product_tiles(sm: int, dtype: torch.dtype) -> _Tiles:
    """Launch settings of the products of slopes; the reasons are those of `_logit_tiles`."""
    if dtype is torch.float32:
        return _Tiles(64, 64, 32, num_warps=4, num_stages=2)
    if sm >= 90:
        return _Tiles(128, 128, 64, num_warps=8, num_stages=3)
    return _Tiles(128, 128, 32, num_warps=8, num_stages=4)


def linear_cross_entropy(
    rows: Tensor,
    weight: Tensor,
    mlm_bias: Tensor,
    sbo_bias: Tensor,
    num_mlm: int,
    targets: Tensor,
    *,
    row_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> CrossEntropy:
    """Cross-entropy of `rows weight^T + bias` against `targets`; see `ops.cross_entropy`.

    Raises:
        TypeError: A dtype is none that kernels take.
        ValueError: `num_mlm` or `label_smoothing` is out of range.
    """
    if not 0 <= num_mlm <= rows.shape[0]:
        raise ValueError(f"num_mlm is {num_mlm}, allowed is 0 to {rows.shape[0]}, the rows")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}, allowed is 0 to 1")
    name = "linear_cross_entropy"
    check_dtypes(name, rows=rows, weight=weight, mlm_bias=mlm_bias, sbo_bias=sbo_bias)
    rows = rows.to(product_dtype(rows))
    # The matrix stays as it is: its gradient is not to be rounded to the dtype of the product.
    loss, correct, _ = _forward_op(
        rows,
        weight,
        mlm_bias,
        sbo_bias,
        num_mlm,
        targets,
        class_weight,
        label_smoothing,
        ignore_index,
    )
    return CrossEntropy(loss if row_weight is None else loss * row_weight, correct)


class _Problem(NamedTuple):
    """One call as the kernels take it."""

    tiles: _Tiles
    operands: tuple[Tensor | None, ...]
    """rows, matrix, both biases [2, V], targets, class weights or None."""
    total: Tensor | None
    """Sum of the class weights, if labels are smoothed."""
    settings: dict[str, Any]
    """Arguments of the kernels that form logits."""
    num_mlm_blocks: int
    num_row_blocks: int


def _problem(
    rows: Tensor,
    weight: Tensor,
    mlm_bias: Tensor,
    sbo_bias: Tensor,
    num_mlm: int,
    targets: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
) -> _Problem:
    num_classes = weight.shape[0]
    tiles = _logit_tiles(architecture(rows.device), rows.dtype)
    biases = torch.stack([mlm_bias.float(), sbo_bias.float()])
    total = None
    if class_weight is not None:
        class_weight = class_weight.to(torch.float32).contiguous()
    if label_smoothing:
        total = biases.new_full((), num_classes) if class_weight is None else class_weight.sum()
    settings = _settings(tiles, rows, num_classes)
    num_mlm_blocks = triton.cdiv(num_mlm, tiles.rows)
    num_row_blocks = num_mlm_blocks + triton.cdiv(rows.shape[0] - num_mlm, tiles.rows)
    matrix = weight.to(rows.dtype).contiguous()
    operands = (rows.contiguous(), matrix, biases, targets.contiguous(), class_weight)
    return _Problem(tiles, operands, total, settings, num_mlm_blocks, num_row_blocks)


def _settings(tiles: _Tiles, rows: Tensor, num_classes: int) -> dict[str, Any]:
    """The arguments that all products share."""
    # Operands of 16 bits know one precision: torch's setting must not compile another variant.
    exact = rows.dtype is not torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "num_rows": rows.shape[0],
        "num_classes": num_classes,
        "SIZE": rows.shape[1],
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "INNER": tiles.inner,
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "enable_fp_fusion": True,
    }


@torch.library.custom_op("spanbert_fast_triton::linear_cross_entropy", mutates_args=())
def _forward_op(
    rows: Tensor,
    weight: Tensor,
    mlm_bias: Tensor,
    sbo_bias: Tensor,
    num_mlm: int,
    targets: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, correctness and log-sum-exp of each row."""
    problem = _problem(
        rows, weight, mlm_bias, sbo_bias, num_mlm, targets, class_weight, label_smoothing
    )
    num_rows, num_blocks = rows.shape[0], triton.cdiv(weight.shape[0], problem.tiles.columns)
    blocks_per_part = triton.cdiv(num_blocks * problem.num_row_blocks, _PROGRAMS)
    num_parts = triton.cdiv(num_blocks, max(blocks_per_part, 1))
    parts = rows.new_empty((num_parts, 4, num_rows), dtype=torch.float32)
    best = rows.new_empty((num_parts, num_rows), dtype=torch.int32)
    loss, lse = (rows.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    correct = rows.new_empty(num_rows, dtype=torch.bool)
    with launch_on(rows):
        score_vocabulary[(problem.num_row_blocks * num_parts,)](
            *problem.operands,
            parts,
            best,
            num_mlm=num_mlm,
            num_row_blocks=problem.num_row_blocks,
            blocks_per_part=blocks_per_part,
            SMOOTH=label_smoothing > 0.0,
            **problem.settings,
        )
        merge_parts[(triton.cdiv(num_rows, 128),)](
            parts,
            best,
            *problem.operands[3:],
            problem.total,
            loss,
            correct,
            lse,
            num_rows=num_rows,
            num_classes=weight.shape[0],
            num_parts=num_parts,
            ignore_index=ignore_index,
            smoothing=label_smoothing,
            SMOOTH=label_smoothing > 0.0,
            ROWS=128,
            num_warps=4,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return loss, correct, lse


@_forward_op.register_fake
def _(rows: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, lse = (rows.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(2))
    return loss, rows.new_empty(rows.shape[0], dtype=torch.bool), lse


@torch.library.custom_op("spanbert_fast_triton::linear_cross_entropy_backward", mutates_args=())
def _backward_op(
    dloss: Tensor,
    lse: Tensor,
    rows: Tensor,
    weight: Tensor,
    mlm_bias: Tensor,
    sbo_bias: Tensor,
    num_mlm: int,
    targets: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, of weight, and of both biases [2, V] in float32."""
    problem = _problem(
        rows, weight, mlm_bias, sbo_bias, num_mlm, targets, class_weight, label_smoothing
    )
    (num_rows, size), num_classes = rows.shape, weight.shape[0]
    tiles = _product_tiles(architecture(rows.device), rows.dtype)
    products = _settings(tiles, rows, num_classes)
    # Both kinds of tiles divide a chunk.
    pitch = _chunk_size(num_rows, num_classes, rows.element_size(), tiles.rows)
    slope = rows.new_empty((num_rows, pitch))
    drows = rows.new_zeros((num_rows, size), dtype=torch.float32)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = rows.new_empty((problem.num_row_blocks, num_classes), dtype=torch.float32)
    matrix_rows, matrix = problem.operands[:2]
    size_blocks = triton.cdiv(size, tiles.columns)
    with launch_on(rows):
        for first in range(0, num_classes, pitch):
            chunk = {"first_class": first, "slope_stride": pitch}
            num_blocks = problem.num_row_blocks * (pitch // problem.tiles.columns)
            slope_of_logits[(num_blocks,)](
                *problem.operands,
                problem.total,
                lse,
                dloss.contiguous(),
                slope,
                dbias,
                num_mlm=num_mlm,
                num_row_blocks=problem.num_row_blocks,
                ignore_index=ignore_index,
                smoothing=label_smoothing,
                SMOOTH=label_smoothing > 0.0,
                **problem.settings,
                **chunk,
            )
            gradient_of_rows[(triton.cdiv(num_rows, tiles.rows), size_blocks)](
                slope, matrix, drows, ADD=first > 0, **products, **chunk
            )
            gradient_of_weight[(triton.cdiv(pitch, tiles.rows), size_blocks)](
                slope, matrix_rows, dweight, **products, **chunk
            )
    split = problem.num_mlm_blocks
    return drows.to(rows.dtype), dweight, torch.stack([dbias[:split].sum(0), dbias[split:].sum(0)])


@_backward_op.register_fake
def _(
    dloss: Tensor, lse: Tensor, rows: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    drows, dweight = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (rows, weight)
    )
    return drows, dweight, rows.new_empty((2, weight.shape[0]), dtype=torch.float32)


def _chunk_size(num_rows: int, num_classes: int, itemsize: int, block: int) -> int:
    """Classes of a chunk: as many blocks as `_SLOPE_BYTES` hold, in chunks of equal size."""
    num_blocks = -(-num_classes // block)
    most = max(_SLOPE_BYTES // max(num_rows * itemsize * block, 1), 1)
    return -(-num_blocks // -(-num_blocks // most)) * block


def least_rows_of_two_chunks(num_classes: int, dtype: torch.dtype, arch: int) -> int | None:
    """The least rows whose backward needs several chunks, a variant of its own; None: no number.

    Args:
        num_classes: Size of the vocabulary.
        dtype: Of the rows.
        arch: Compute capability, such as 80.
    """
    block = _product_tiles(arch, dtype).rows
    num_blocks = -(-num_classes // block)
    if num_blocks == 1:
        return None
    return _SLOPE_BYTES // (num_blocks * block * dtype.itemsize) + 1


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, weight, mlm_bias, sbo_bias, num_mlm, targets, class_weight, *options = inputs
    ctx.save_for_backward(output[2], rows, weight, mlm_bias, sbo_bias, targets, class_weight)
    ctx.num_mlm, ctx.options = num_mlm, options
    ctx.mark_non_differentiable(output[1], output[2])


def _differentiate(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
    *operands, targets, class_weight = ctx.saved_tensors
    drows, dweight, dbiases = _backward_op(
        dloss, *operands, ctx.num_mlm, targets, class_weight, *ctx.options
    )
    mlm_bias, sbo_bias = operands[3:]
    return (
        drows,
        dweight,
        dbiases[0].to(mlm_bias.dtype),
        dbiases[1].to(sbo_bias.dtype),
        *(None,) * 5,
    )


_forward_op.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.spanbert_fast_triton.linear_cross_entropy)
def _forward_flops(
    rows_shape: tuple[int, int], weight_shape: tuple[int, int], *_: Any, **__: Any
) -> int:
    return 2 * rows_shape[0] * rows_shape[1] * weight_shape[0]


@register_flop_formula(torch.ops.spanbert_fast_triton.linear_cross_entropy_backward)
def _backward_flops(
    dloss_shape: tuple[int],
    lse_shape: tuple[int],
    rows_shape: tuple[int, int],
    weight_shape: tuple[int, int],
    *_: Any,
    **__: Any,
) -> int:
    """Three products: the logits are formed again."""
    return 6 * rows_shape[0] * rows_shape[1] * weight_shape[0]
