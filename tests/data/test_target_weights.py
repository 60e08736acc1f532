"""Weights of targets: the formula one target at a time, corpus mean 1, the cap, and refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from spanbert_fast.data.loader import StepLoader
from spanbert_fast.data.loss_weighting import LossWeighting
from spanbert_fast.data.target_weights import measure_weights, rarities

EXPONENTS = {"sequence_length": 0.5, "span_length": -1.0, "inverse_frequency": 0.5}
ALL = LossWeighting(**EXPONENTS, frequency_cap=3.0)


def epoch(shards, masker, weights, **changes):
    """All micro-batches of epoch 0."""
    arguments = {"seed": 3, "global_batch_tokens": 400, "num_micro_batches": 2, **changes}
    found = []
    with StepLoader(shards, "train", masker, row_weights=weights, **arguments) as loader:
        for step in loader:
            if step.epoch:
                break
            found += step.micro_batches
    return found


def weights_by_hand(shards, batch):
    """One (unscaled weight, MLM) after the other; slow and obvious."""
    counts = shards.unigram_counts()
    rarity = rarities(counts, ALL.inverse_frequency, ALL.frequency_cap)
    bounds, masked = batch.cu_seqlens.tolist(), set(batch.mlm_positions.tolist())
    by_position = {}
    for position, label in zip(
        batch.mlm_positions.tolist(), batch.mlm_labels.tolist(), strict=True
    ):
        (sequence,) = [i for i in range(len(bounds) - 1) if bounds[i] <= position < bounds[i + 1]]
        first = last = position
        while first - 1 in masked:
            first -= 1
        while last + 1 in masked:
            last += 1
        length = bounds[sequence + 1] - bounds[sequence] - 2
        by_position[position] = length**0.5 / (last - first + 1) * rarity[label]
    spans = zip(batch.sbo_left.tolist(), np.diff(batch.sbo_cu).tolist(), strict=True)
    sbo = [by_position[left + 1 + j] for left, count in spans for j in range(count)]
    return [*by_position.values(), *sbo]


def test_every_target_has_its_weight(shards, masker):
    weights = measure_weights(ALL, shards, masker)
    for batch in epoch(shards, masker, weights)[:12]:
        assert len(batch.sbo_targets) > 0
        expected = np.array(weights_by_hand(shards, batch)) / weights.mean
        assert batch.row_weights.dtype == torch.float32
        np.testing.assert_allclose(batch.row_weights.numpy(), expected, rtol=1e-6)


def test_neither_split_nor_start_changes_a_weight(shards, masker):
    weights = measure_weights(ALL, shards, masker)

    def by_block(batches):
        found = {}
        for batch in batches:
            homes = torch.searchsorted(batch.cu_seqlens, batch.mlm_positions, right=True) - 1
            for index, name in enumerate(batch.sequence_ids.tolist()):
                rows = batch.row_weights[: len(homes)][homes == index]
                assert len(rows) > 0
                found[name] = rows.tolist()
        return found

    whole = by_block(epoch(shards, masker, weights, num_micro_batches=1))
    assert len(whole) == shards.num_blocks("train")
    assert by_block(epoch(shards, masker, weights, num_micro_batches=3)) == whole
    ranks = [by_block(epoch(shards, masker, weights, world_size=2, rank=rank)) for rank in (0, 1)]
    assert ranks[0] | ranks[1] == whole
    late = by_block(epoch(shards, masker, weights, start_step=5))
    assert late
    assert all(whole[name] == rows for name, rows in late.items())


def test_weights_are_1_on_average(shards, masker):
    """Exactly for the length of the sequence, since every epoch masks the same share of a block."""

    def mean(weighting):
        batches = epoch(shards, masker, measure_weights(weighting, shards, masker))
        rows = [batch.row_weights[: len(batch.mlm_labels)] for batch in batches]
        return float(torch.cat(rows).double().mean())

    for exponent in (-1.0, 0.5, 1.0):
        assert mean(LossWeighting(sequence_length=exponent)) == pytest.approx(1, abs=1e-6)
    # The masks of an epoch are others than those of the measurement.
    assert mean(ALL) == pytest.approx(1, abs=0.05)


def test_exponents_of_zero_weigh_1_and_no_weighting_is_no_tensor(shards, masker):
    weights = measure_weights(LossWeighting(), shards, masker)
    assert all((batch.row_weights == 1).all() for batch in epoch(shards, masker, weights))
    assert all(batch.row_weights is None for batch in epoch(shards, masker, None))


def test_the_mean_of_a_sample_is_near_that_of_all(shards, masker, monkeypatch):
    whole = measure_weights(ALL, shards, masker).mean
    monkeypatch.setattr("spanbert_fast.data.target_weights.SAMPLED_BLOCKS", 150)
    monkeypatch.setattr("spanbert_fast.data.target_weights._BLOCKS_AT_ONCE", 64)
    sampled = measure_weights(ALL, shards, masker).mean
    assert sampled != whole
    assert sampled == pytest.approx(whole, rel=0.1)


def test_the_cap_is_a_multiple_of_the_mean_rarity():
    counts = np.array([10_000, 1_000, 100, 1, 0, 1])

    def mean(rarity):
        return (counts * rarity).sum() / counts.sum()

    free = rarities(counts, 1.0, 1e9)
    np.testing.assert_allclose(free, [1e-4, 1e-3, 1e-2, 1, 1, 1])
    capped = rarities(counts, 1.0, 5.0)
    assert capped.max() / mean(capped) == pytest.approx(5.0)
    limit = capped.max()
    np.testing.assert_array_equal(capped, np.minimum(free, limit))
    assert limit < 1
    np.testing.assert_array_equal(rarities(counts, 0.0, 1.5), np.ones(6))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sequence_length": 4}, r"weighting sequence_length must be in \[-3, 3\], got 4"),
        ({"span_length": float("nan")}, r"weighting span_length must be in \[-3, 3\], got nan"),
        ({"inverse_frequency": -1}, r"weighting inverse_frequency must be in \[0, 2\], got -1"),
        ({"frequency_cap": 1.0}, r"weighting frequency_cap must be above 1 and finite, got 1\.0"),
        ({"frequency_cap": float("inf")}, "weighting frequency_cap must be above 1 and finite"),
        ({"span_length": "long"}, "weighting span_length must be a number, got 'long'"),
        ({"span_length": True}, "weighting span_length must be a number, got True"),
        (
            {"length": 1},
            "weighting knows sequence_length, span_length, inverse_frequency, frequency_cap; "
            "got length",
        ),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        LossWeighting.of(values)


def test_a_weighting_in_words():
    assert str(LossWeighting()) == str(LossWeighting(frequency_cap=2)) == "none"
    assert str(LossWeighting(sequence_length=1)) == "sequence_length 1"
    assert str(ALL) == (
        "sequence_length 0.5, span_length -1, inverse_frequency 0.5, frequency_cap 3"
    )
    assert LossWeighting.of({"span_length": 1}) == LossWeighting(span_length=1.0)


def test_a_corpus_without_training_blocks_is_refused(shards, masker):
    starts = {**shards._starts, "train": np.zeros(1, np.int64)}
    empty = dataclasses.replace(shards, _starts=starts)
    with pytest.raises(ValueError, match="has no training blocks, loss weights need some"):
        measure_weights(ALL, empty, masker)
