"""Dropout of packed rows: the mask of `random`, drawn again for the gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from spanbert_fast.ops.dropout import _hidden_dropout, hidden_dropout
from spanbert_fast.ops.random import dropout_scale, hidden_keep_mask, token_places

P, SITE = 0.3, 2


@pytest.fixture
def drop(seed: Tensor, sequence_ids: Tensor, cu_seqlens: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: hidden_dropout(x, P, seed, sequence_ids, cu_seqlens, SITE)


@pytest.fixture
def keep(seed: Tensor, sequence_ids: Tensor, cu_seqlens: Tensor) -> Callable[[int], Tensor]:
    sequences, positions = token_places(cu_seqlens, 20)
    return lambda size: hidden_keep_mask(positions, sequence_ids[sequences], size, P, seed, SITE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [5, 128, 300])
def test_forward_and_gradient_have_one_mask(
    drop: Callable[[Tensor], Tensor],
    keep: Callable[[int], Tensor],
    dtype: torch.dtype,
    size: int,
) -> None:
    x = torch.randn(20, size, dtype=dtype).requires_grad_()
    above = torch.randn(20, size, dtype=dtype)
    mask, dropped = keep(size), drop(x)
    (grad,) = torch.autograd.grad(dropped, x, above)
    assert torch.equal(dropped, x * mask * dropout_scale(P))
    assert torch.equal(grad, above * mask * dropout_scale(P))


def test_derivatives(drop: Callable[[Tensor], Tensor], doubles: Callable[..., Tensor]) -> None:
    assert gradcheck(drop, [doubles(20, 5)])
    assert gradgradcheck(drop, [doubles(20, 5)])


def test_rows_may_have_strides(drop: Callable[[Tensor], Tensor]) -> None:
    columns = torch.randn(7, 20)
    assert torch.equal(drop(columns.t()), drop(columns.t().contiguous()))
    assert drop(columns.t()).is_contiguous()


def test_no_mask_is_kept_for_the_gradient(drop: Callable[[Tensor], Tensor]) -> None:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        drop(torch.randn(20, 1000, requires_grad=True))
    assert max(tensor.numel() for tensor in kept) <= 20


def test_passes_opcheck() -> None:
    places, x = torch.arange(5), torch.randn(5, 13, requires_grad=True)
    opcheck(_hidden_dropout, (x, places, places, P, torch.tensor(3), SITE))


def test_refuses(seed: Tensor, sequence_ids: Tensor, cu_seqlens: Tensor) -> None:
    x = torch.randn(20, 5)
    assert hidden_dropout(x, 0.0, None, None, None, 0) is x
    with pytest.raises(ValueError, match=r"dropout_p is 0.1, so seed, sequence_ids and cu_seq"):
        hidden_dropout(x, 0.1, seed, None, cu_seqlens, 0)
    with pytest.raises(ValueError, match=r"dropout_p is 1.0, allowed is 0 <="):
        hidden_dropout(x, 1.0, seed, sequence_ids, cu_seqlens, 0)
