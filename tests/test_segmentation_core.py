"""The best segmentation and the span probabilities in C++, against all segmentations listed."""

from __future__ import annotations

import itertools
import re
import threading

import numpy as np
import numpy.typing as npt
import pytest
from oracles import segmentation as oracle

from spanbert_fast import _core

LENGTHS = (5, 0, 1, 9, 3, 8)
CU = np.array([0, *np.cumsum(LENGTHS)], np.int32)
FORBIDDEN = -np.inf


def random_scores(width: int, forbidden: float = 0.0, spread: float = 3.0) -> npt.NDArray:
    rng = np.random.default_rng([width, round(100 * forbidden)])
    scores = spread * rng.standard_normal((CU[-1], width))
    # Single units stay allowed, so that every sequence has a segmentation.
    scores[:, 1:][rng.random((CU[-1], width - 1)) < forbidden] = FORBIDDEN
    return scores


def sequences() -> list[slice]:
    return [slice(first, end) for first, end in itertools.pairwise(CU)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("forbidden", [0.0, 0.5])
@pytest.mark.parametrize("width", [1, 2, 4, 12])
def test_equals_listing_every_segmentation(
    width: int, forbidden: float, dtype: type[np.float32]
) -> None:
    scores = random_scores(width, forbidden).astype(dtype)
    lengths, best = _core.best_segmentation(scores, CU)
    marginals, log_partition = _core.span_marginals(scores, CU)
    assert marginals.dtype == dtype
    for index, rows in enumerate(sequences()):
        own = scores[rows].astype(np.float64)
        spans, score = oracle.best(own)
        assert oracle.spans_of(lengths[rows].tolist()) == spans
        assert best[index] == pytest.approx(score, abs=1e-12)
        expected, logarithm = oracle.marginals(own)
        np.testing.assert_allclose(marginals[rows], expected, rtol=1e-6, atol=1e-12)
        assert log_partition[index] == pytest.approx(logarithm, abs=1e-12)


def test_threads_change_no_bit() -> None:
    scores = random_scores(4)
    for function in (_core.best_segmentation, _core.span_marginals):
        one = function(scores, CU, 1)
        for threads in (2, 3, 7, 50):
            for ours, theirs in zip(one, function(scores, CU, threads), strict=True):
                assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_probability_is_neither_lost_nor_made_over_a_long_text(dtype: type[np.float32]) -> None:
    """Every unit is in exactly one span: the probabilities of the spans over it sum to 1."""
    scores = (5 * np.random.default_rng(0).standard_normal((100_000, 6))).astype(dtype)
    marginals, _ = _core.span_marginals(scores, np.array([0, len(scores)], np.int32), 2)
    covered = np.zeros(len(scores) + 7)
    for w in range(6):
        np.add.at(covered, np.arange(len(scores)), marginals[:, w].astype(float))
        np.subtract.at(covered, np.arange(len(scores)) + w + 1, marginals[:, w].astype(float))
    tolerance = 1e-9 if dtype is np.float64 else 3e-3
    assert np.abs(np.cumsum(covered)[: len(scores)] - 1).max() < tolerance


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_scores_of_any_size_do_not_overflow(shift: float) -> None:
    scores = random_scores(3) + shift
    marginals, log_partition = _core.span_marginals(scores, CU)
    assert np.isfinite(log_partition).all()
    for rows in sequences():
        np.testing.assert_allclose(marginals[rows], oracle.marginals(scores[rows])[0], atol=1e-8)


def test_marginals_are_the_gradient_of_the_log_partition() -> None:
    scores, step = random_scores(3), 1e-5
    marginals, _ = _core.span_marginals(scores, CU)
    for place in np.ndindex(scores.shape):
        above, below = scores.copy(), scores.copy()
        above[place] += step
        below[place] -= step
        change = _core.span_marginals(above, CU)[1] - _core.span_marginals(below, CU)[1]
        assert change.sum() / (2 * step) == pytest.approx(marginals[place], abs=1e-8)


def test_what_lies_beyond_a_sequence_is_never_read() -> None:
    scores = random_scores(4)
    spoiled = scores.copy()
    for rows in sequences():
        for unit in range(rows.start, rows.stop):
            spoiled[unit, rows.stop - unit :] = np.nan
    for function in (_core.best_segmentation, _core.span_marginals):
        for ours, theirs in zip(function(scores, CU), function(spoiled, CU), strict=True):
            assert np.array_equal(ours, theirs)


def test_longest_span_wins_a_tie() -> None:
    scores = np.array([[0.0, 0.0], [0.0, 0.0]])
    lengths, _ = _core.best_segmentation(scores, np.array([0, 2], np.int32))
    assert lengths.tolist() == [2, 0]


@pytest.mark.parametrize("function", [_core.best_segmentation, _core.span_marginals])
def test_bad_input_is_named(function) -> None:
    cu = np.array([0, 2], np.int32)
    cases = [
        (np.array([[0.0], [np.nan]]), cu, 1, "scores[1, 0] is nan, must be a finite number"),
        (np.array([[np.inf], [0.0]]), cu, 1, "scores[0, 0] is inf"),
        (np.array([[0.0], [FORBIDDEN]]), cu, 1, "sequence 0 has no allowed segmentation"),
        (np.zeros((2, 0)), cu, 1, "scores must have shape [T, W] with W of at least 1"),
        (np.zeros((3, 1)), cu, 1, "cu_seqlens ends with 2, must end with 3"),
        (np.zeros((2, 1)), np.array([0, 3, 2], np.int32), 1, "cu_seqlens[2] is 2"),
        (np.zeros((2, 1)), cu, 0, "num_threads is 0, must be at least 1"),
    ]
    for scores, boundaries, threads, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            function(scores, boundaries, threads)
    with pytest.raises(TypeError):
        function(np.zeros((2, 1), np.float16), cu)


def test_other_threads_run_meanwhile() -> None:
    scores = np.zeros((200_000, 16))
    cu = np.array([0, len(scores)], np.int32)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.0002):
            ticks.append(1)

    ticker = threading.Thread(target=tick)
    ticker.start()
    before = len(ticks)
    for _ in range(5):
        _core.span_marginals(scores, cu)
    gained = len(ticks) - before
    done.set()
    ticker.join()
    assert gained > 20
