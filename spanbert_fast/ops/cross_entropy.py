"""Product with the vocabulary matrix and cross-entropy in one, for MLM and SBO rows together.

The reference is a registered operator with a backward pass of its own, whose numbers are computed
in `cross_entropy_reference`. The logits of all rows never exist at once, unless they are small:
then keeping them spares the backward pass one product of three.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from spanbert_fast.ops import cross_entropy_reference
from spanbert_fast.ops.dispatch import accelerated
from spanbert_fast.ops.precision import product_dtype, wide_dtype

# Logits of all rows, if they are kept: computing them again would be a third product beside the
# two of the backward pass, so memory decides; 2,300 rows of 29,000 classes fit.
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
    loss, correct, _ = _cross_entropy(
        rows,
        weight,
        mlm_bias,
        sbo_bias,
        num_mlm,
        targets,
        class_weight,
        label_smoothing,
        ignore_index,
        _keeps_logits(rows, weight),
    )
    return CrossEntropy(loss if row_weight is None else loss * row_weight, correct)


def _keeps_logits(rows: Tensor, weight: Tensor) -> bool:
    if not torch.is_grad_enabled() or not (rows.requires_grad or weight.requires_grad):
        return False
    size = rows.shape[0] * weight.shape[0] * wide_dtype(rows.dtype).itemsize
    # A number of rows that a compiled graph leaves open must not become a guard.
    return statically_known_true(size <= _KEPT_BYTES)


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
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return cross_entropy_reference.forward(
        rows,
        weight,
        mlm_bias,
        sbo_bias,
        num_mlm,
        targets,
        class_weight,
        label_smoothing,
        ignore_index,
        keep_logits,
    )


@torch.library.custom_op("spanbert_fast::linear_cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
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
    return cross_entropy_reference.backward(
        grad_loss,
        kept,
        rows,
        weight,
        mlm_bias,
        sbo_bias,
        num_mlm,
        targets,
        class_weight,
        label_smoothing,
        ignore_index,
        keep_logits,
    )


@_cross_entropy.register_fake
def _(
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
    wide, num_rows = wide_dtype(rows.dtype), rows.shape[0]
    kept = rows.new_empty((num_rows if keep_logits else 0, weight.shape[0]), dtype=wide)
    correct = rows.new_empty(num_rows, dtype=torch.bool)
    return rows.new_empty(num_rows, dtype=wide), correct, kept


@_cross_entropy_backward.register_fake
def _(
    grad_loss: Tensor,
    kept: Tensor,
    rows: Tensor,
    weight: Tensor,
    mlm_bias: Tensor,
    sbo_bias: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [torch.empty_like(tensor) for tensor in (rows, weight, mlm_bias, sbo_bias)]
    return grads[0], grads[1], grads[2], grads[3]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, weight, mlm_bias, sbo_bias, num_mlm, targets, class_weight, *options = inputs
    ctx.save_for_backward(output[2], rows, weight, mlm_bias, sbo_bias, targets, class_weight)
    ctx.num_mlm, ctx.options = num_mlm, options
    ctx.mark_non_differentiable(output[1], output[2])
    # The kept logits would get a gradient of zeros, as large as they are.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    kept, *operands, targets, class_weight = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 10
    operands = [grad_loss, kept, *operands, ctx.num_mlm, targets, class_weight]
    return (*_cross_entropy_backward(*operands, *ctx.options), *(None,) * 6)


_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
