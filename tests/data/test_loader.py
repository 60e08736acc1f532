from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from spanbert_fast.data.loader import StepLoader, evaluation_batches

TENSORS = [
    "input_ids",
    "position_ids",
    "token_type_ids",
    "cu_seqlens",
    "sequence_ids",
    "mlm_positions",
    "mlm_labels",
    "sbo_left",
    "sbo_right",
    "sbo_cu",
    "sbo_targets",
]


def steps(shards, masker, count, **changes):
    arguments = {"seed": 3, "global_batch_tokens": 400, "num_micro_batches": 2, **changes}
    with StepLoader(shards, "train", masker, **arguments) as loader:
        return [next(loader) for _ in range(count)]


def sequences(step):
    """Masked sequences and labels of a step by block id, in whatever micro-batch they lie."""
    found = {}
    for batch in step.micro_batches:
        bounds = batch.cu_seqlens.tolist()
        for index, name in enumerate(batch.sequence_ids.tolist()):
            start, end = bounds[index : index + 2]
            inside = (batch.mlm_positions >= start) & (batch.mlm_positions < end)
            labels = dict(
                zip(
                    (batch.mlm_positions[inside] - start).tolist(),
                    batch.mlm_labels[inside].tolist(),
                    strict=True,
                )
            )
            found[name] = (batch.input_ids[start:end].tolist(), labels)
    return found


def test_unmasked_batches_are_the_corpus(shards, masker, all_blocks):
    blocks = all_blocks(shards, "train")
    specials = shards.manifest.special_token_ids
    epoch = [step for step in steps(shards, masker, 60) if step.epoch == 0]
    seen = []
    for step in epoch:
        for name, (ids, labels) in sequences(step).items():
            for position, label in labels.items():
                ids[position] = label
            assert ids == [specials["cls"], *blocks[name], specials["sep"]]
            assert len(labels) == -(-15 * len(blocks[name]) // 100)
            seen.append(name)
        assert sorted(step.example_ids.tolist()) == sorted(sequences(step))
    assert sorted(seen) == list(range(len(blocks)))  # 60 steps are more than one epoch.


def test_num_items_are_the_labels_of_the_whole_step(shards, masker):
    for step in steps(shards, masker, 5):
        total = sum(len(batch.mlm_labels) for batch in step.micro_batches)
        assert [batch.num_items for batch in step.micro_batches] == [total] * 2
        for batch in step.micro_batches:
            assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
            assert batch.input_ids.dtype == batch.token_type_ids.dtype == torch.int64


def test_the_split_changes_no_mask(shards, masker):
    whole = steps(shards, masker, 6, num_micro_batches=1)
    split = steps(shards, masker, 6, num_micro_batches=3, prefetch=1)
    ranks = [
        steps(shards, masker, 6, num_micro_batches=2, world_size=2, rank=rank) for rank in (0, 1)
    ]
    for index, step in enumerate(whole):
        assert sequences(split[index]) == sequences(step)
        assert sequences(ranks[0][index]) | sequences(ranks[1][index]) == sequences(step)
        assert not sequences(ranks[0][index]).keys() & sequences(ranks[1][index]).keys()
        num_items = step.micro_batches[0].num_items
        for other in (split[index], ranks[0][index], ranks[1][index]):
            assert {batch.num_items for batch in other.micro_batches} == {num_items}


def test_without_spans_the_masks_stay(shards, masker):
    def weigh(batch):
        return np.arange(len(batch.mlm_labels) + len(batch.sbo_targets), dtype=np.float32)

    whole, bare = (steps(shards, masker, 3, with_spans=w, row_weights=weigh) for w in (True, False))
    for with_spans, without in zip(whole, bare, strict=True):
        assert sequences(with_spans) == sequences(without)
        for full, empty in zip(with_spans.micro_batches, without.micro_batches, strict=True):
            assert len(full.sbo_targets) > 0
            assert [len(t) for t in (empty.sbo_left, empty.sbo_right, empty.sbo_targets)] == [0] * 3
            assert empty.sbo_cu.tolist() == [0]
            assert empty.sbo_cu.dtype == torch.int32
            assert empty.row_weights.tolist() == full.row_weights[: len(full.mlm_labels)].tolist()
            assert empty.num_items == full.num_items


@pytest.mark.parametrize("start", [1, 7, 40])
def test_starting_at_a_step_is_running_to_it(shards, masker, start):
    run = steps(shards, masker, start + 3)[start:]
    resumed = steps(shards, masker, 3, start_step=start)
    for expected, found in zip(run, resumed, strict=True):
        assert (expected.step, expected.epoch) == (found.step, found.epoch)
        for left, right in zip(expected.micro_batches, found.micro_batches, strict=True):
            for name in TENSORS:
                assert torch.equal(getattr(left, name), getattr(right, name)), name


def test_masks_and_order_change_with_the_epoch(shards, masker):
    found = steps(shards, masker, 70)
    first = {k: v for s in found if s.epoch == 0 for k, v in sequences(s).items()}
    second = {k: v for s in found if s.epoch == 1 for k, v in sequences(s).items()}
    common = first.keys() & second.keys()
    assert len(common) > 100
    same = sum(first[name] == second[name] for name in common)
    assert same < len(common) / 4  # Short blocks may be masked alike by chance.


def test_a_failure_in_the_thread_reaches_the_consumer(shards, masker):
    class Broken:
        def assemble(self, *args, **kwargs):
            raise ValueError("no ink")

    with StepLoader(
        shards, "train", Broken(), seed=0, global_batch_tokens=64, num_micro_batches=1, start_step=2
    ) as loader:
        for _ in range(2):  # And again, for whoever asks again.
            with pytest.raises(RuntimeError, match=r"step 2, blocks \[\d+.*\]: no ink"):
                next(loader)


def test_closing_ends_the_thread(shards, masker):
    # Not their number: a thread of an earlier test may end meanwhile.
    before = set(threading.enumerate())
    loader = StepLoader(
        shards, "train", masker, seed=0, global_batch_tokens=64, num_micro_batches=1, prefetch=1
    )
    next(loader)
    assert len(set(threading.enumerate()) - before) == 1
    loader.close()
    loader.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(StopIteration):
        next(loader)


def test_a_small_step_has_no_empty_micro_batch(shards, masker):
    longest = int(shards.lengths("train").max()) + 2
    for step in steps(shards, masker, 4, global_batch_tokens=longest, num_micro_batches=8):
        assert 1 <= len(step.micro_batches) <= 8
        assert all(batch.num_sequences for batch in step.micro_batches)


def test_evaluation_is_fixed_and_complete(shards, masker):
    small = list(evaluation_batches(shards, masker, max_tokens=64))
    large = list(evaluation_batches(shards, masker, max_tokens=4000))
    assert len(small) > len(large)
    names = torch.cat([batch.sequence_ids for batch in small])
    assert names.tolist() == list(range(shards.num_blocks("validation")))
    assert all(batch.num_tokens <= 64 and batch.num_items is None for batch in small)
    for name in ("input_ids", "mlm_labels"):
        left = torch.cat([getattr(batch, name) for batch in small])
        right = torch.cat([getattr(batch, name) for batch in large])
        assert torch.equal(left, right)
    with pytest.raises(ValueError, match="max_tokens is 5, must be at least"):
        list(evaluation_batches(shards, masker, max_tokens=5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_micro_batches": 0}, "num_micro_batches is 0, must be at least 1"),
        ({"start_step": -1}, "start_step is -1, must be at least 0"),
        ({"rank": 2, "world_size": 2}, r"rank is 2, must be in \[0, 1\]"),
        ({"global_batch_tokens": 3}, "global_batch_tokens is 3, must be at least"),
        ({"prefetch": 0}, "prefetch is 0"),
    ],
)
def test_wrong_arguments_are_named(shards, masker, change, message):
    with pytest.raises(ValueError, match=message):
        steps(shards, masker, 1, **change)


def test_gathered_rows_keep_their_order(shards, all_blocks):
    blocks = all_blocks(shards, "train")
    rows = np.array([205, 3, 3, 99, 100, 0])  # Across the borders of files.
    values, offsets = shards.gather("train", rows)
    for index, row in enumerate(rows.tolist()):
        assert values[offsets[index] : offsets[index + 1]].tolist() == blocks[row]
    with pytest.raises(ValueError, match="split train has rows 0 to"):
        shards.gather("train", np.array([10**6]))
