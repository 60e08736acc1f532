"""Layer normalisation of a residual stream that a dropped-out branch is added to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from spanbert_fast.ops.dispatch import accelerated
from spanbert_fast.ops.dropout import hidden_dropout
from spanbert_fast.ops.precision import wide_dtype


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


def wide_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation over the last dimension in the dtype of `x`, which is wide already."""
    # Autocast would take the product with a low-precision weight for one it may round.
    with torch.autocast(x.device.type, enabled=False):
        return functional.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias.to(x.dtype), eps)
