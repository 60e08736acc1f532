"""The k best sums against trying all of them."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spanbert_fast.tasks.ranking import k_best

# Multiples of 1/4: sums are exact and ties are frequent.
QUARTERS = st.integers(-20, 0).map(lambda number: number / 4)
COLUMNS = st.lists(st.lists(QUARTERS, min_size=1, max_size=5), min_size=1, max_size=4)


def brute_force(columns: list[list[float]], k: int) -> list[float]:
    return sorted((sum(choice) for choice in itertools.product(*columns)), reverse=True)[:k]


@given(columns=COLUMNS, k=st.integers(1, 30))
@settings(max_examples=200)
def test_equals_brute_force(columns: list[list[float]], k: int) -> None:
    columns = [sorted(column, reverse=True) for column in columns]
    found = k_best(columns, k)
    assert [score for score, _ in found] == brute_force(columns, k)
    assert len({ranks for _, ranks in found}) == len(found)
    for score, ranks in found:
        assert score == sum(column[rank] for column, rank in zip(columns, ranks, strict=True))


def test_gives_all_there_is() -> None:
    found = k_best([[0.0, -1.0], [0.0, -3.0]], 100)
    assert [score for score, _ in found] == [0.0, -1.0, -3.0, -4.0]


def test_does_not_try_everything() -> None:
    column = [math.log1p(1 / (i + 1)) for i in range(30_000)]
    found = k_best([column] * 10, 50)
    assert found[0][1] == (0,) * 10
    assert all(a >= b for (a, _), (b, _) in itertools.pairwise(found))


@pytest.mark.parametrize("k", [1, 2, 7])
def test_as_many_as_asked(k: int) -> None:
    assert len(k_best([[0.0, -1.0, -2.0]] * 3, k)) == k
