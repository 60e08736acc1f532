"""Attention takes sequences of one length together, wherever they lie; no number changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spanbert_fast import ops
from spanbert_fast.ops import attention_planes, attention_reference

LENGTHS = [5, 3, 0, 5, 40, 3, 1, 5, 40, 0, 1]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 2},
    {"dropout_p": 0.3},
    {"dropout_p": 0.3, "window": 2},
]


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def attend(
    parts: list[Tensor], above: list[Tensor], order: list[int], options: dict[str, Any]
) -> list[list[Tensor]]:
    """Output, log-sum-exp and gradients of each sequence, in the first order."""
    rows = torch.cat([parts[i] for i in order], dim=1).requires_grad_()
    lengths = [LENGTHS[i] for i in order]
    result = ops.varlen_attention_with_lse(
        *rows,
        bounds_of(lengths),
        40,
        scale=0.3,
        seed=torch.tensor(7),
        sequence_ids=torch.tensor(order),
        site=3,
        **options,
    )
    result.output.backward(torch.cat([above[i] for i in order]))
    assert rows.grad is not None
    found = [result.output.detach(), result.log_sum_exp.detach(), *rows.grad]
    split = [values.split(lengths) for values in found]
    place = {sequence: index for index, sequence in enumerate(order)}
    return [[values[place[i]] for values in split] for i in range(len(order))]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_of_sequences_changes_nothing(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Scattered, sorted and turned round: bitwise the same numbers for each sequence."""
    torch.manual_seed(0)
    parts = [torch.randn(3, length, 2, 8, dtype=dtype) for length in LENGTHS]
    above = [torch.randn(length, 2, 8, dtype=dtype) for length in LENGTHS]
    given = list(range(len(LENGTHS)))
    expected = attend(parts, above, given, options)
    for order in (sorted(given, key=LENGTHS.__getitem__), given[::-1]):
        torch.testing.assert_close(attend(parts, above, order, options), expected, rtol=0, atol=0)


def test_one_length_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many short texts in any order cost a call for each length, not for each text."""
    sizes = []

    def count(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        sizes.append(tuple(query.shape))
        return attention_planes.forward_planes(query, *rest)

    monkeypatch.setattr(attention_reference, "forward_planes", count)
    rows = torch.randn(3, sum(LENGTHS), 2, 8)
    ops.varlen_attention(*rows, bounds_of(LENGTHS), 40, scale=0.3, window=0)
    # A text of one word sees all of itself, so that its call is to the tiled kernel.
    assert sorted(sizes) == [(2, 2, 3, 8), (2, 2, 40, 8), (3, 2, 5, 8)]
