"""Span scores from a whole attention map, pair by pair: the slow twin of `model/span_scores.py`."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def word_attention(pieces: Floats, words: list[list[int]]) -> Floats:
    """Attention between words [N, N] of one text from attention between its pieces [S, S]."""
    return np.array(
        [[np.mean([sum(pieces[p, q] for q in key) for p in query]) for key in words]
         for query in words]
    )  # fmt: skip


def standardised(attention: Floats, max_words: int) -> Floats:
    """z [N, N], symmetric."""
    count = len(attention)
    affinity = (attention + attention.T) / 2
    result = np.zeros((count, count))
    for distance in range(1, min(max_words, count - 1) + 1):
        pairs = [(i, i + distance) for i in range(count - distance)]
        values = np.array([affinity[pair] for pair in pairs])
        deviation = values.std()
        for pair, value in zip(pairs, values, strict=True):
            z = (value - values.mean()) / deviation if deviation > 0 else 0.0
            result[pair] = result[pair[::-1]] = z
    return result


def span_score(z: Floats, first: int, size: int, border_weight: float, p: float) -> float:
    """The score of the span of `size` words from `first`, at sharpness 1."""
    inside = range(first, first + size)
    pairs = [z[i, j] for i in inside for j in inside if i < j]
    cohesion = (size - 1) * float(np.mean(pairs)) if pairs else 0.0
    left = float(np.mean([z[first - 1, i] for i in inside])) if first else 0.0
    end = first + size
    right = float(np.mean([z[end, i] for i in inside])) if end < len(z) else 0.0
    prior = math.log(p) + (size - 1) * math.log(1 - p)
    return cohesion - border_weight * (left + right) / 2 + prior
