"""The numbers of cross-entropy on a product with the vocabulary matrix, in chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spanbert_fast.ops.precision import wide_dtype

# Logits of one chunk: enough rows to make the product efficient.
CHUNK_BYTES = 1 << 26


def forward(
    rows: Tensor,
    weight: Tensor,
    mlm_bias: Tensor,
    sbo_bias: Tensor,
    num_mlm: int,
    targets: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and correctness of each row, and the logits if they are to be kept, else [0, V]."""
    num_rows, num_classes, wide = rows.shape[0], weight.shape[0], wide_dtype(rows.dtype)
    loss = rows.new_empty(num_rows, dtype=wide)
    correct = rows.new_empty(num_rows, dtype=torch.bool)
    kept = rows.new_empty((num_rows if keep_logits else 0, num_classes), dtype=wide)
    options = (num_classes, class_weight, label_smoothing, ignore_index, wide)
    with torch.autocast(rows.device.type, enabled=False):
        for chunk in _chunks(num_rows, num_classes, wide.itemsize):
            logits = _logits(rows, weight, mlm_bias, sbo_bias, num_mlm, chunk)
            if keep_logits:
                kept[chunk] = logits
            classes = _classes(targets[chunk], *options)
            log = logits.logsumexp(-1)
            at_target = logits.gather(1, classes.target[:, None])[:, 0]
            loss[chunk] = classes.target_weight * (log - at_target)
            if classes.smoothed:
                weights = classes.class_weight
                summed = logits.sum(-1) if weights is None else logits @ weights
                loss[chunk] += classes.spread * (log * classes.total - summed)
            correct[chunk] = (logits.argmax(-1) == classes.target) & classes.valid
    return loss, correct, kept


def backward(
    grad_loss: Tensor,
    kept: Tensor,
    rows: Tensor,
    weight: Tensor,
    mlm_bias: Tensor,
    sbo_bias: Tensor,
    num_mlm: int,
    targets: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, weight and both biases."""
    num_rows, num_classes, wide = rows.shape[0], weight.shape[0], wide_dtype(rows.dtype)
    grad_rows, grad_weight = torch.empty_like(rows), None
    grad_mlm, grad_sbo = (rows.new_zeros(num_classes, dtype=wide) for _ in range(2))
    options = (num_classes, class_weight, label_smoothing, ignore_index, wide)
    with torch.autocast(rows.device.type, enabled=False):
        for chunk in _chunks(num_rows, num_classes, wide.itemsize):
            if keep_logits:
                logits = kept[chunk]
            else:
                logits = _logits(rows, weight, mlm_bias, sbo_bias, num_mlm, chunk)
            slope = _slope(logits, grad_loss[chunk], _classes(targets[chunk], *options))
            mlm, sbo = _by_head(slope, num_mlm, chunk)
            grad_mlm += mlm.sum(0)
            grad_sbo += sbo.sum(0)
            narrow = slope.to(rows.dtype)
            torch.mm(narrow, weight, out=grad_rows[chunk])
            grad_weight = _add_product(grad_weight, narrow, rows[chunk])
    if grad_weight is None:
        grad_weight = torch.zeros_like(weight)
    grad_biases = (grad_mlm.to(mlm_bias.dtype), grad_sbo.to(sbo_bias.dtype))
    return grad_rows, grad_weight.to(weight.dtype), *grad_biases


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
    smoothed: bool
    """Whether `spread` is not zero everywhere."""


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
    return _Classes(target, valid, target_weight, spread, class_weight, total, label_smoothing > 0)


def _chunks(num_rows: int, num_classes: int, itemsize: int) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // (num_classes * itemsize))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _logits(
    rows: Tensor, weight: Tensor, mlm_bias: Tensor, sbo_bias: Tensor, num_mlm: int, chunk: slice
) -> Tensor:
    """Logits of a chunk of rows, wide."""
    logits = torch.mm(rows[chunk], weight.t()).to(wide_dtype(rows.dtype))
    mlm, sbo = _by_head(logits, num_mlm, chunk)
    mlm.add_(mlm_bias)
    sbo.add_(sbo_bias)
    return logits


def _by_head(chunk_rows: Tensor, num_mlm: int, chunk: slice) -> tuple[Tensor, Tensor]:
    """The MLM rows and the SBO rows of a chunk; views."""
    split = min(max(num_mlm - chunk.start, 0), chunk.stop - chunk.start)
    return chunk_rows[:split], chunk_rows[split:]


def _slope(logits: Tensor, grad_loss: Tensor, classes: _Classes) -> Tensor:
    """Gradient of the loss of some rows with respect to their logits, in new memory."""
    certain = grad_loss * classes.target_weight
    spread = grad_loss * classes.spread
    slope = torch.softmax(logits, -1).mul_((certain + spread * classes.total)[:, None])
    slope.scatter_add_(1, classes.target[:, None], -certain[:, None])
    if classes.smoothed:
        weights = classes.class_weight
        slope.sub_(spread[:, None] if weights is None else spread[:, None] * weights)
    return slope


def _add_product(total: Tensor | None, slope: Tensor, rows: Tensor) -> Tensor:
    """`total` + slope^T rows, summed up wide; None counts as zero."""
    if total is None:
        return slope.t() @ rows
    wide = wide_dtype(rows.dtype)
    if wide == rows.dtype:
        return total.addmm_(slope.t(), rows)
    return total.to(wide).add_(slope.t() @ rows)
