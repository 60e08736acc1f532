from __future__ import annotations

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spanbert_fast.data.plan import WINDOW, EpochPlan, KeyedPermutation, split_rows


def make_plan(lengths, *, seed=0, epoch=0, tokens=2000, manifest_hash="h"):
    return EpochPlan(
        lengths, seed=seed, epoch=epoch, global_batch_tokens=tokens, manifest_hash=manifest_hash
    )


def batches_of(plan):
    return [plan.batch(index) for index in range(plan.num_batches)]


def random_lengths(seed, rows):
    return np.random.Generator(np.random.PCG64(seed)).integers(1, 511, rows).astype(np.int32)


@settings(max_examples=40)
@given(
    st.integers(1, 12_000), st.integers(0, 2**64), st.integers(0, 2**32 - 1), st.integers(0, 5000)
)
def test_every_row_is_in_exactly_one_batch_that_fits(rows, seed, epoch, room):
    lengths = random_lengths(rows, rows)
    tokens = 512 + room
    batches = batches_of(make_plan(lengths, seed=seed, epoch=epoch, tokens=tokens))
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(rows))
    sizes = np.array([int((lengths[batch] + 2).sum()) for batch in batches])
    assert sizes.max() <= tokens
    # Cut greedily: only the last of the stream may leave more room than one block needs.
    assert (sizes < tokens - 512).sum() <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 1000, 4097])
def test_the_permutation_is_one(size):
    permutation = KeyedPermutation(size, key=7, epoch=0, stream=0)
    images = permutation(np.arange(size, dtype=np.int64))
    assert sorted(images.tolist()) == list(range(size))


def test_the_permutation_scatters_evenly():
    # Chi-square of 64 x 64 cells: where a row comes from against where it goes.
    size = 1 << 16
    images = KeyedPermutation(size, key=3, epoch=1, stream=0)(np.arange(size, dtype=np.int64))
    table = np.histogram2d(np.arange(size), images, bins=64)[0]
    statistic = float(((table - 16) ** 2 / 16).sum())
    degrees = 63 * 63
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5


def test_a_batch_depends_on_nothing_but_the_four_arguments():
    lengths = random_lengths(1, 9000)
    first, again = make_plan(lengths), make_plan(lengths)
    # Asked in another order, from another object.
    for index in reversed(range(first.num_batches)):
        assert np.array_equal(first.batch(index), again.batch(index))
    for change in ({"seed": 1}, {"epoch": 1}, {"manifest_hash": "other"}):
        other = make_plan(lengths, **change)
        assert not np.array_equal(first.batch(0), other.batch(0))
    names = set(inspect.signature(EpochPlan).parameters)
    assert names == {"lengths", "seed", "epoch", "global_batch_tokens", "manifest_hash"}


def test_batches_hold_blocks_of_like_length():
    lengths = random_lengths(4, 3 * WINDOW)
    spread = [np.ptp(lengths[batch]) for batch in batches_of(make_plan(lengths, tokens=4096))]
    assert np.mean(spread) < 15  # Without sorting it would be near 450.


def test_a_step_may_be_larger_than_a_window():
    lengths = np.full(3 * WINDOW + 5, 8, np.int32)
    plan = make_plan(lengths, tokens=2 * WINDOW * 10)
    assert sorted(len(batch) for batch in batches_of(plan)) == [WINDOW + 5, 2 * WINDOW]


def test_golden_order():
    # Resume and published runs depend on it: it may not change.
    lengths = (np.arange(40) % 7 + 1).astype(np.int32)
    plan = make_plan(lengths, seed=5, epoch=2, tokens=40, manifest_hash="golden")
    assert [plan.batch(index).tolist() for index in range(2)] == [
        [20, 34, 27, 13],
        [24, 31, 38, 3, 10, 18],
    ]


@settings(max_examples=100)
@given(st.lists(st.integers(0, 399), unique=True, max_size=60), st.integers(1, 16))
def test_rows_are_dealt_evenly(rows, num_parts):
    lengths = random_lengths(2, 400)
    parts = split_rows(np.array(rows, np.int64), lengths, num_parts)
    assert len(parts) == num_parts
    assert sorted(np.concatenate(parts).tolist()) == sorted(rows)
    loads = [int((lengths[part] + 2).sum()) for part in parts]
    # Greedy: no part exceeds another by more than the longest row.
    assert max(loads) - min(loads) <= 512
    shuffled = split_rows(np.array(rows[::-1], np.int64), lengths, num_parts)
    assert all(map(np.array_equal, parts, shuffled))


def test_wrong_arguments_are_named():
    lengths = np.array([10, 600], np.int32)
    with pytest.raises(ValueError, match="global_batch_tokens is 600, must be at least 602"):
        make_plan(lengths, tokens=600)
    with pytest.raises(ValueError, match="lengths is empty"):
        make_plan(lengths[:0])
    with pytest.raises(ValueError, match="epoch is -1"):
        make_plan(lengths, epoch=-1)
    with pytest.raises(ValueError, match=r"index is 1, must be in \[0, 0\]"):
        make_plan(lengths).batch(1)
    with pytest.raises(ValueError, match="num_parts is 0"):
        split_rows(np.arange(2), lengths, 0)
