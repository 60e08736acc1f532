"""What the tests of ops share: a packed layout with empty sequences, float64 leaves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def seed() -> Tensor:
    return torch.tensor(-1234567890123456789)


@pytest.fixture
def cu_seqlens() -> Tensor:
    """Lengths 0, 5, 5, 3, 0, 7: empty ones, neighbours of one length, others."""
    return torch.tensor([0, 0, 5, 10, 13, 13, 20], dtype=torch.int32)


@pytest.fixture
def sequence_ids() -> Tensor:
    return torch.tensor([4, 2, 2**40 + 1, 0, 9, 7])


@pytest.fixture
def doubles() -> Callable[..., Tensor]:
    """A function that makes float64 leaves of a given shape."""

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return make
