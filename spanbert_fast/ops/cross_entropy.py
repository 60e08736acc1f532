"""Product with the vocabulary matrix and cross-entropy in one, for MLM and SBO rows together.

The logits of all rows never exist at once, unless they are small: then keeping them spares the
backward pass a third of its products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spanbert_fast.ops.dispatch import accelerated
from spanbert_fast.ops.precision import product_dtype, wide_dtype

# Logits of one chunk, and of all rows if they are to be kept for the backward pass.
_CHUNK_BYTES = 1 << 26
_KEPT_BYTES = 1 << 28


class CrossEntropy(NamedTuple):
    """One loss per row, and whether the row was predicted right."""

    loss: Tensor
    """[N], float32 (float64 for float64 rows); 0 for ignored rows."""
    correct: Tensor
    """bool [N]: the target has the largest logit, the first one in a tie; False if ignored."""


@accelerated
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
    """Cross-entropy of `rows weight^T + bias` against `targets`, for each row.

    As `F.cross_entropy(..., reduction="none")`; whoever calls divides by what he likes.

    Args:
        rows: [N, D], first the MLM rows, then the SBO rows; N may be 0.
        weight: [V, D].
        mlm_bias: [V], of rows below `num_mlm`.
        sbo_bias: [V], of the other rows.
        num_mlm: Number of MLM rows.
        targets: int64 [N].
        row_weight: [N], factor of each loss.
        class_weight: [V], factor of each class, as in `F.cross_entropy`; has no gradient.
        label_smoothing: Share of the target that is spread over all classes.
        ignore_index: Target of rows that count nothing.

    Raises:
        ValueError: `num_mlm`, `label_smoothing` or a target is out of range.
    """
    if not 0 <= num_mlm <= rows.shape[0]:
        raise ValueError(f"num_mlm is {num_mlm}, allowed is 0 to {rows.shape[0]}, the rows")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}, allowed is 0 to 1")
    rows, weight = rows.to(product_dtype(rows)), weight.to(product_dtype(weight))
    loss, correct, *_ = _cross_entropy(
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


class _Classes(NamedTuple):
    """What the targets ask of each class; shapes [rows] but for `class_weight`."""

    target: Tensor
    """Target, 0 for ignored rows."""
    valid: Tensor
    target_weight: Tensor
    """Factor of -log p(target): 0 for ignored rows."""
    spread: Tensor
    """Label smoothing over the number of classes, 0 for ignored rows."""
    class_weight: Tensor | None
    total: float | Tensor
    """Sum of the class weights."""


def _classes(
    targets: Tensor,
    num_classes: int,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    dtype: torch.dtype,
) -> _Classes:
    valid = targets != ignore_index
    target = torch.where(valid, targets, 0)
    # Elsewhere the device would have to be asked and waited for; its own kernels check bounds.
    if target.device.type == "cpu":
        wrong = target[(target < 0) | (target >= num_classes)].tolist()
        if wrong:
            raise ValueError(
                f"a target is {wrong[0]}, allowed is 0 to {num_classes - 1}, or {ignore_index}"
            )
    share = valid.to(dtype)
    target_weight = share * (1.0 - label_smoothing)
    total: float | Tensor = float(num_classes)
    if class_weight is not None:
        class_weight = class_weight.to(dtype)
        target_weight = target_weight * class_weight.index_select(0, target)
        total = class_weight.sum()
    spread = share * (label_smoothing / num_classes)
    return _Classes(target, valid, target_weight, spread, class_weight, total)


def _chunks(num_rows: int, num_classes: int, itemsize: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // (num_classes * itemsize))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _logits(
    rows: Tensor, weight: Tensor, mlm_bias: Tensor, sbo_bias: Tensor, num_mlm: int, chunk: slice
) -> Tensor:
    """Logits of a chunk of rows, wide."""
    logits = torch.mm(rows[chunk], weight.t()).to(wide_dtype(rows.dtype))
    split = min(max(num_mlm - chunk.start, 0), chunk.stop - chunk.start)
    logits[:split].add_(mlm_bias)
    logits[split:].add_(sbo_bias)
    return logits


def _keeps_logits(rows: Tensor, weight: Tensor) -> bool:
    itemsize = wide_dtype(rows.dtype).itemsize
    return rows.shape[0] * weight.shape[0] * itemsize <= _KEPT_BYTES


@torch.library.custom_op("spanbert_fast::linear_cross_entropy", mutates_args=())
def _cross_entropy(
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
    num_rows, num_classes, wide = rows.shape[0], weight.shape[0], wide_dtype(rows.dtype)
    loss, lse = (rows.new_empty(num_rows, dtype=wide) for _ in range(2))
    correct = rows.new_empty(num_rows, dtype=torch.bool)
    options = (num_classes, class_weight, label_smoothing, ignore_index, wide)
    with torch.autocast(rows.device.type, enabled=False):
        for chunk in _chunks(num_rows, num_classes, wide.itemsize):
            logits = _logits(rows, weight, mlm_bias, sbo_bias, num_mlm, chunk)
            classes = _classes(targets[chunk], *options)
            log = logits.logsumexp(-1)
            at_target = logits.gather(1, classes.target[:, None])[:, 0]
            loss[chunk] = classes.target_weight * (log - at_target)
            if label_smoothing:
                weights = classes.class_weight
                summed = logits.sum(-1) if weights is None else logits @ weights
                loss[chunk] += classes.spread * (log * classes.total - summed)
            correct[chunk] = (logits.argmax(-1) == classes.target) & classes.valid
            lse[chunk] = log
    return loss, correct, lse


@torch.library.custom_op("spanbert_fast::linear_cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    grad_loss: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, weight and both biases."""
    num_rows, num_classes, wide = rows.shape[0], weight.shape[0], wide_dtype(rows.dtype)
    grad_rows = torch.empty_like(rows)
    grad_weight = weight.new_zeros(weight.shape, dtype=wide)
    grad_biases = [weight.new_zeros(num_classes, dtype=wide) for _ in range(2)]
    options = (num_classes, class_weight, label_smoothing, ignore_index, wide)
    with torch.autocast(rows.device.type, enabled=False):
        for chunk in _chunks(num_rows, num_classes, wide.itemsize):
            logits = _logits(rows, weight, mlm_bias, sbo_bias, num_mlm, chunk)
            classes = _classes(targets[chunk], *options)
            grad = grad_loss[chunk]
            certain = grad * classes.target_weight
            factor = certain + grad * classes.spread * classes.total
            slope = logits.sub_(lse[chunk, None]).exp_().mul_(factor[:, None])
            slope.scatter_add_(1, classes.target[:, None], -certain[:, None])
            if label_smoothing:
                spread = (grad * classes.spread)[:, None]
                weights = classes.class_weight
                slope.sub_(spread if weights is None else spread * weights)
            split = min(max(num_mlm - chunk.start, 0), chunk.stop - chunk.start)
            grad_biases[0] += slope[:split].sum(0)
            grad_biases[1] += slope[split:].sum(0)
            narrow = slope.to(rows.dtype)
            grad_rows[chunk] = narrow @ weight
            grad_weight += narrow.t() @ rows[chunk]
    return (
        grad_rows,
        grad_weight.to(weight.dtype),
        grad_biases[0].to(mlm_bias.dtype),
        grad_biases[1].to(sbo_bias.dtype),
    )


@_cross_entropy.register_fake
def _(rows: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(rows.dtype)
    num_rows = rows.shape[0]
    loss, lse = (rows.new_empty(num_rows, dtype=wide) for _ in range(2))
    return loss, rows.new_empty(num_rows, dtype=torch.bool), lse


@_cross_entropy_backward.register_fake
def _(
    grad_loss: Tensor,
    lse: Tensor,
    rows: Tensor,
    weight: Tensor,
    mlm_bias: Tensor,
    sbo_bias: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(rows),
        torch.empty_like(weight),
        torch.empty_like(mlm_bias),
        torch.empty_like(sbo_bias),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, weight, mlm_bias, sbo_bias, num_mlm, targets, class_weight, *options = inputs
    ctx.save_for_backward(output[2], rows, weight, mlm_bias, sbo_bias, targets, class_weight)
    ctx.num_mlm, ctx.options = num_mlm, options
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    lse, rows, weight, mlm_bias, sbo_bias, targets, class_weight = ctx.saved_tensors
    operands = (lse, rows, weight, mlm_bias, sbo_bias, ctx.num_mlm)
    grads = _cross_entropy_backward(grad_loss, *operands, targets, class_weight, *ctx.options)
    return (*grads, None, None, None, None, None)


_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
