"""The k best combinations of independent choices, without trying all of them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def k_best(columns: Sequence[Sequence[float]], k: int) -> list[tuple[float, tuple[int, ...]]]:
    """The k largest sums of one number per column, each with the rank taken from every column.

    Exact. Every choice of ranks but the first has one parent, whose last non-zero rank is smaller
    by one; the parent's sum is never the smaller one, so it leaves the heap earlier and brings the
    child in. Costs O(k n^2 + k n log(k n)) for n columns of any size.

    Args:
        columns: n lists of numbers, each in descending order.
        k: how many sums; fewer come back only where fewer exist.
    """

    def total(ranks: tuple[int, ...]) -> float:
        return sum(column[rank] for column, rank in zip(columns, ranks, strict=True))

    first = (0,) * len(columns)
    heap = [(-total(first), first, 0)]
    best: list[tuple[float, tuple[int, ...]]] = []
    while heap and len(best) < k:
        negative, ranks, last = heapq.heappop(heap)
        best.append((-negative, ranks))
        for place in range(last, len(columns)):
            if ranks[place] + 1 < len(columns[place]):
                child = (*ranks[:place], ranks[place] + 1, *ranks[place + 1 :])
                heapq.heappush(heap, (-total(child), child, place))
    return best
