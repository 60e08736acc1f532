"""Exact GELU, x times the Gaussian distribution function of x, with what stands beside it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from spanbert_fast.ops.dispatch import accelerated
from spanbert_fast.ops.norm import wide_layer_norm
from spanbert_fast.ops.precision import wide_dtype


@accelerated
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias): [T, F], dtype of `x`.

    Args:
        x: [T, F].
        bias: [F].
    """
    # The sum is rounded, as that of a product with a bias is; PyTorch's GELU computes wide inside.
    # Wide copies of the largest activation of the model would take four times as long on a CPU.
    return functional.gelu(x + bias.to(x.dtype))


@accelerated
def bias_gelu_layer_norm(
    x: Tensor, bias: Tensor, weight: Tensor, ln_bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm(GELU(x + bias)): [T, D], dtype of `x`.

    Args:
        x: [T, D].
        bias: [D], of the product before.
        weight: [D], of the normalisation.
        ln_bias: [D], of the normalisation.
        eps: Added to the variance.
    """
    wide = wide_dtype(x.dtype)
    activated = functional.gelu(x.to(wide) + bias.to(wide))
    return wide_layer_norm(activated, weight, ln_bias, eps).to(x.dtype)
