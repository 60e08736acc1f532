"""Segmentation by listing every one of them: the slow, obvious twin of `csrc/segmentation.cpp`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Spans = tuple[tuple[int, int], ...]
"""First unit and length of each span, left to right."""


def segmentations(length: int, width: int, first: int = 0) -> Iterator[Spans]:
    """All ways to cut the units from `first` to `length` into spans of at most `width` units."""
    if first == length:
        yield ()
    for size in range(1, min(width, length - first) + 1):
        for rest in segmentations(length, width, first + size):
            yield ((first, size), *rest)


def total(scores: npt.NDArray[np.float64], spans: Spans) -> float:
    """Sum of the scores of the spans; scores [T, W]."""
    return sum(float(scores[first, size - 1]) for first, size in spans)


def best(scores: npt.NDArray[np.float64]) -> tuple[Spans, float]:
    """The best segmentation of one sequence, and its score."""
    every = list(segmentations(*scores.shape))
    found = max(every, key=lambda spans: total(scores, spans))
    return found, total(scores, found)


def marginals(scores: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], float]:
    """Probability of every span [T, W] of one sequence, and the log partition."""
    every = list(segmentations(*scores.shape))
    totals = [total(scores, spans) for spans in every]
    largest = max(totals)
    log_partition = largest + math.log(sum(math.exp(value - largest) for value in totals))
    result = np.zeros(scores.shape)
    for spans, value in zip(every, totals, strict=True):
        for first, size in spans:
            result[first, size - 1] += math.exp(value - log_partition)
    return result, log_partition


def spans_of(lengths: Sequence[int]) -> Spans:
    """The spans that `best_segmentation` returned as lengths at their first units."""
    return tuple((first, size) for first, size in enumerate(lengths) if size)
