"""The dtype rules that every op follows: wide inside, the dtype of the input outside."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that `tensor` has as an operand of a matrix product: under autocast, autocast's."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type) and tensor.dtype is not torch.float64:
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype
