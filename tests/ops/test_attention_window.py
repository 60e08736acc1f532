"""Attention under a window: tiles give what the whole score matrix gives, at linear cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_obeys_rule
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from spanbert_fast import ops
from spanbert_fast.ops import attention_planes
from spanbert_fast.ops.attention_planes import Dropout, backward_planes, forward_planes

# Shorter than a tile, of its size, one more, and several tiles with a rest.
BOUNDS = (0, 1, 8, 17, 17, 57, 97, 170)
DROPOUTS = [0.0, 0.3]


def attend(rows: list[Tensor], window: int | None, p: float) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of a function of both."""
    leaves = [row.detach().requires_grad_() for row in rows]
    cu = torch.tensor(BOUNDS, dtype=torch.int32)
    names = {"seed": torch.tensor(77), "sequence_ids": torch.arange(len(BOUNDS) - 1) * 2**31}
    result = ops.varlen_attention_with_lse(
        *leaves, cu, 73, scale=0.4, window=window, dropout_p=p, site=4, **names
    )
    total = result.output.double().square().sum() + result.log_sum_exp.double().sin().sum()
    return [*result, *torch.autograd.grad(total, leaves)]


@pytest.fixture
def of_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of queries in a tile."""
    return lambda size: monkeypatch.setattr(attention_planes, "_TILE_QUERIES", size)


@pytest.mark.parametrize("p", DROPOUTS)
@pytest.mark.parametrize("window", [0, 1, 7, 8, 21, 60])
@pytest.mark.parametrize("block_bytes", [1 << 20, 1])
def test_tiles_equal_the_whole_matrix(
    window: int, p: float, block_bytes: int, of_tiles: Callable[[int], None], monkeypatch: Any
) -> None:
    """So the dropout mask is the same, too."""
    monkeypatch.setattr(attention_planes, "_BLOCK_BYTES", block_bytes)
    rows = list(torch.randn(3, BOUNDS[-1], 2, 5, dtype=torch.float64))
    of_tiles(1 << 20)
    whole = attend(rows, window, p)
    for size in (8, 24):
        of_tiles(size)
        for found, expected in zip(attend(rows, window, p), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", DROPOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_over_everything_is_none_to_the_bit(p: float, dtype: torch.dtype) -> None:
    rows = list(torch.randn(3, BOUNDS[-1], 2, 16, dtype=dtype))
    for found, expected in zip(attend(rows, 72, p), attend(rows, None, p), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("p", DROPOUTS)
def test_gradients_of_tiles(p: float, of_tiles: Callable[[int], None]) -> None:
    of_tiles(8)
    rows = [torch.randn(21, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    cu = torch.tensor([0, 2, 21], dtype=torch.int32)
    names = {"seed": torch.tensor(7), "sequence_ids": torch.arange(2)}
    options: dict[str, Any] = {"scale": 0.4, "window": 5, "dropout_p": p, **names}
    both = ops.varlen_attention_with_lse
    assert gradcheck(lambda *given: tuple(both(*given, cu, 19, **options)), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_are_as_accurate_as_plain_pytorch(
    dtype: torch.dtype, of_tiles: Callable[[int], None]
) -> None:
    """A key's gradient is a sum over many tiles; it is wide."""
    of_tiles(8)
    cu, places = torch.tensor([0, 131], dtype=torch.int32), torch.arange(131)
    near = (places[:, None] - places).abs() <= 20

    def plain(*rows: Tensor) -> Tensor:
        planes = (row.transpose(0, 1) for row in rows)
        mixed = functional.scaled_dot_product_attention(*planes, attn_mask=near, scale=0.3)
        return mixed.transpose(0, 1)

    assert_obeys_rule(
        lambda *rows: ops.varlen_attention(*rows, cu, 131, scale=0.3, window=20),
        plain,
        [torch.randn(131, 2, 16) for _ in range(3)],
        dtype,
    )


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel())
        return result


@pytest.mark.parametrize("p", DROPOUTS)
def test_cost_is_linear_in_the_length(p: float) -> None:
    """Counted, not timed: products of a pass, and the largest tensor beside the planes."""
    drops = Dropout(20_000, torch.tensor(1), torch.arange(1), 1) if p else None
    flops, sizes = [], []
    for length in (2_048, 4_096):
        planes = torch.randn(3, 1, 2, length, 8)
        lse = torch.zeros(1, 2, length)
        with FlopCounterMode(display=False) as products, LargestTensor() as largest:
            forward_planes(*planes, 1.0, 64, drops, [0, 1])
            backward_planes(planes[0], *planes, lse, 1.0, 64, drops, [0, 1])
        flops.append(products.get_total_flops())
        sizes.append(largest.size)
    # All pairs would be four times the products, and 16,777,216 elements of a plane.
    assert 1.95 < flops[1] / flops[0] < 2.1
    assert max(sizes) <= max(planes[0].numel(), 3 * 2 * 128 * (128 + 2 * 64))
