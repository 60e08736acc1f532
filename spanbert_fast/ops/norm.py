"""Layer normalisation of a residual stream that a dropped-out branch is added to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from spanbert_fast.ops.dispatch import accelerated
from spanbert_fast.ops.precision import wide_dtype
from spanbert_fast.ops.random import dropout_scale, hidden_keep_mask, token_places


@accelerated
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
    """LayerNorm(dropout(x) + residual): [T, D], dtype of `x`.

    Args:
        x: [T, D], output of a branch.
        residual: [T, D].
        weight: [D].
        bias: [D].
        eps: Added to the variance.
        dropout_p: Probability of dropping an element of `x`; 0 needs none of the following.
        seed: int64 scalar.
        sequence_ids: int64 [B].
        cu_seqlens: int32 [B + 1].
        site: Which dropout of the model this is.

    Raises:
        ValueError: `dropout_p` is out of range, or what it needs is missing.
    """
    wide = wide_dtype(x.dtype)
    branch = hidden_dropout(x.to(wide), dropout_p, seed, sequence_ids, cu_seqlens, site)
    return wide_layer_norm(branch + residual.to(wide), weight, bias, eps).to(x.dtype)


def hidden_dropout(
    x: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    site: int,
) -> Tensor:
    """Packed rows [T, D] with dropped elements zero and the others scaled; dtype of `x`.

    Raises:
        ValueError: `dropout_p` is out of range, or what it needs is missing.
    """
    if dropout_p == 0.0:
        return x
    if seed is None or sequence_ids is None or cu_seqlens is None:
        raise ValueError(
            f"dropout_p is {dropout_p}, so seed, sequence_ids and cu_seqlens have to be given"
        )
    sequences, positions = token_places(cu_seqlens, x.shape[0])
    ids = sequence_ids.index_select(0, sequences)
    keep = hidden_keep_mask(positions, ids, x.shape[1], dropout_p, seed, site)
    # As bytes: a product with them is several times faster than one with booleans, or a choice.
    return x * keep.view(torch.uint8) * dropout_scale(dropout_p)


def wide_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation over the last dimension in the dtype of `x`, which is wide already."""
    # Autocast would take the product with a low-precision weight for one it may round.
    with torch.autocast(x.device.type, enabled=False):
        return functional.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias.to(x.dtype), eps)
