"""Dropout of packed rows, by bits that `random` draws and that nobody has to keep.

A registered operator: its backward pass draws the bits again, which takes less time on a CPU than
it takes to fetch the pages that would keep them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spanbert_fast.ops.precision import wide_dtype
from spanbert_fast.ops.random import (
    dropout_scale,
    dropout_threshold,
    hidden_keep_mask,
    token_places,
)


def hidden_dropout(
    x: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    site: int,
) -> Tensor:
    """Packed rows [T, D] with dropped elements zero and the others scaled; dtype of `x`.

    Args:
        x: [T, D].
        dropout_p: Probability of dropping an element; 0 needs none of the following.
        seed: int64 scalar.
        sequence_ids: int64 [B].
        cu_seqlens: int32 [B + 1].
        site: Which dropout of the model this is.

    Raises:
        ValueError: `dropout_p` is out of range, or what it needs is missing.
    """
    if dropout_p == 0.0:
        return x
    if seed is None or sequence_ids is None or cu_seqlens is None:
        raise ValueError(
            f"dropout_p is {dropout_p}, so seed, sequence_ids and cu_seqlens have to be given"
        )
    dropout_threshold(dropout_p)
    sequences, positions = token_places(cu_seqlens, x.shape[0])
    ids = sequence_ids.index_select(0, sequences)
    dropped: Tensor = _hidden_dropout(x, positions, ids, dropout_p, seed, site)
    return dropped


@torch.library.custom_op("spanbert_fast::hidden_dropout", mutates_args=())
def _hidden_dropout(
    x: Tensor, positions: Tensor, sequence_ids: Tensor, dropout_p: float, seed: Tensor, site: int
) -> Tensor:
    keep = hidden_keep_mask(positions, sequence_ids, x.shape[1], dropout_p, seed, site)
    # In place, and from bytes: a product of two dtypes makes a wide copy of the mask first, whose
    # fresh pages cost several times what the product does.
    dropped = keep.view(torch.uint8).to(wide_dtype(x.dtype))
    return dropped.mul_(x).mul_(dropout_scale(dropout_p)).to(x.dtype)


@_hidden_dropout.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, sequence_ids, ctx.dropout_p, seed, ctx.site = inputs
    ctx.save_for_backward(positions, sequence_ids, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    positions, sequence_ids, seed = ctx.saved_tensors
    dropped = _hidden_dropout(grad, positions, sequence_ids, ctx.dropout_p, seed, ctx.site)
    return dropped, None, None, None, None, None


_hidden_dropout.register_autograd(_backward, setup_context=_setup_context)
