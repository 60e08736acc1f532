"""Predicted spans: where words lie, what a file holds, and which spans are drawn from it."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import span_masker as oracle
from oracles.masking_inputs import make_masker, word_starts_of

from spanbert_fast.data.collator import SpanMaskingCollator
from spanbert_fast.data.loader import StepLoader
from spanbert_fast.data.segments import BlockSpans, SegmentMasker, WordBatch, word_batches
from spanbert_fast.data.shards import Rows
from spanbert_fast.data.tokenizer import load_tokenizer

PAD, CLS, SEP, MASK = range(4)
SPECIALS = [PAD, CLS, SEP, MASK]
VOCABULARY = 100
Blocks = list[list[int]]


def some_blocks(count: int, *, special_share: float = 0.0) -> Blocks:
    rng = random.Random(3)
    return [
        [
            rng.choice(SPECIALS) if rng.random() < special_share else rng.randrange(4, VOCABULARY)
            for _ in range(rng.randint(1, 40))
        ]
        for _ in range(count)
    ]


def store_of(blocks: Blocks) -> Rows:
    values = np.array([token for block in blocks for token in block], np.uint16)
    return Rows(values, np.cumsum([0, *map(len, blocks)]))


class FakeShards:
    """Blocks as the shards give them."""

    manifest = SimpleNamespace(special_token_ids={"cls": CLS, "sep": SEP})

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def lengths(self, _split: str) -> np.ndarray:
        return np.array([len(block) for block in self.blocks], np.int32)

    def gather(self, _split: str, rows: np.ndarray) -> Rows:
        return store_of([self.blocks[row] for row in rows.tolist()])


def batches_of(blocks: Blocks, rows: list[int], max_tokens: int) -> list[WordBatch]:
    return list(
        word_batches(
            FakeShards(blocks),
            "train",
            np.array(rows),
            word_starts=word_starts_of(VOCABULARY),
            special_token_ids=SPECIALS,
            max_tokens=max_tokens,
        )
    )


def words_of(block: list[int]) -> list[list[int]]:
    """The pieces of each word, one token at a time."""
    words: list[list[int]] = []
    for place, token in enumerate(block):
        if token in SPECIALS:
            continue
        fresh = place == 0 or block[place - 1] in SPECIALS
        if fresh or word_starts_of(VOCABULARY)[token]:
            words.append([])
        words[-1].append(place)
    return words


def random_spans(blocks: Blocks, rows: list[int]) -> BlockSpans:
    """Blocks cut at random; no span holds a special token."""
    rng = random.Random(5)
    parts = []
    for row in rows:
        spans, begin = [], 0
        block = blocks[row]
        while begin < len(block):
            end = begin + 1
            while end < len(block) and block[end] not in SPECIALS and rng.random() < 0.6:
                end += 1
            if block[begin] not in SPECIALS:
                spans.append((begin, end))
            begin = end
        pairs = np.array(spans, np.int32).reshape(-1, 2)
        parts.append(BlockSpans(np.array([row]), np.array([0, len(spans)]), pairs))
    return BlockSpans.join(parts)


def test_words_are_those_of_the_masker() -> None:
    blocks = some_blocks(30, special_share=0.15)
    blocks[7] = [PAD, SEP]  # no word at all
    found = batches_of(blocks, list(range(30)), 150)
    assert 3 < len(found) < 30
    assert [row for batch in found for row in batch.rows.tolist()] == list(range(30))
    for part in found:
        assert part.batch.num_tokens <= 150
        count, limits = 0, {0}
        word_of = part.word_of.tolist()
        bounds = pairwise(part.batch.cu_seqlens.tolist())
        for index, (row, (begin, end)) in enumerate(zip(part.rows.tolist(), bounds, strict=True)):
            block = blocks[row]
            assert part.batch.input_ids[begin:end].tolist() == [CLS, *block, SEP]
            assert part.batch.position_ids[begin:end].tolist() == list(range(end - begin))
            assert part.cu_words[index] == count
            expected = [-1] * (end - begin)
            for word in words_of(block):
                for place in word:
                    expected[1 + place] = count
                if word[0] == 0 or block[word[0] - 1] in SPECIALS:
                    limits.add(count)
                count += 1
            assert word_of[begin:end] == expected
            limits.add(count)
        assert part.cu_words[-1] == count
        assert part.limits.tolist() == sorted(limits)


def test_spans_of_words_become_spans_of_pieces() -> None:
    blocks = some_blocks(12, special_share=0.1)
    (part,) = batches_of(blocks, [1, 4, 9], 1000)
    words = [(row, word) for row in (1, 4, 9) for word in words_of(blocks[row])]
    sizes, first = [], 0
    limits = part.limits.tolist()
    while first < len(words):
        sizes.append((first, min(2, min(x for x in limits if x > first) - first)))
        first += sizes[-1][1]
    starts, lengths = torch.tensor(sizes).T
    found = part.spans(starts, lengths)
    listed = [
        (int(row), *span)
        for row, begin, end in zip(found.rows, found.offsets, found.offsets[1:], strict=False)
        for span in found.spans[begin:end].tolist()
    ]
    assert listed == [
        (words[first][0], words[first][1][0], words[first + size - 1][1][-1] + 1)
        for first, size in sizes
    ]


@pytest.mark.parametrize("rows", [[0, 3, 4, 19], [7]])
def test_a_file_gives_back_what_was_written(rows: list[int], tmp_path: Path) -> None:
    spans = random_spans(some_blocks(20), rows)
    path = tmp_path / "made" / "spans.arrow"
    digest = spans.write(path)
    read = BlockSpans.read(path, digest)
    for name in BlockSpans._fields:
        assert np.array_equal(getattr(read, name), getattr(spans, name)), name
        assert getattr(read, name).dtype == getattr(spans, name).dtype, name
    assert list(path.parent.iterdir()) == [path]
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"spans\.arrow has sha256 .*, must have {digest}"):
        BlockSpans.read(path, digest)
    path.unlink()
    with pytest.raises(ValueError, match=r"spans\.arrow is missing"):
        BlockSpans.read(path, digest)


@pytest.mark.parametrize("special_share", [0.0, 0.1])
def test_masks_are_those_of_the_slow_twin(special_share: float) -> None:
    blocks = some_blocks(40, special_share=special_share)
    spans = random_spans(blocks, list(range(40)))
    settings = {"mask_token_id": MASK, "special_token_ids": SPECIALS, "scheme": "tagged"}
    settings |= {"replacement_ids": [5, 60, 7], "tag_probability": 1.0, "seed": 9}
    starts = word_starts_of(VOCABULARY)
    rule = oracle.Rule(word_starts=starts.tolist(), **settings)
    settings["replacement_ids"] = np.array([5, 60, 7], np.int32)
    masker = SegmentMasker(make_masker(starts, **settings), spans)
    order = np.random.default_rng(0).permutation(40)
    store = store_of(blocks)
    found = masker.assemble(
        store.values, store.offsets, order, order, epoch=3, cls_token_id=CLS, sep_token_id=SEP
    )
    packed = [[CLS, *blocks[row], SEP] for row in order]
    cu = [0, *np.cumsum([len(sequence) for sequence in packed]).tolist()]
    counted = [
        (cu[index] + 1 + first, cu[index] + 1 + last)
        for index, row in enumerate(order.tolist())
        for first, last in spans.gather(np.array([row]))[0].tolist()
    ]
    flat = [token for sequence in packed for token in sequence]
    expected = oracle.mask_batch(rule, flat, cu, order.tolist(), 3, counted)
    for name in ("input_ids", "mlm_positions", "mlm_labels", "sbo_left", "sbo_right", "sbo_cu"):
        assert getattr(found, name).tolist() == getattr(expected, name), name
    assert found.sbo_targets.tolist() == expected.sbo_targets
    assert found.cu_seqlens.tolist() == cu
    assert found.position_ids.tolist() == [i for sequence in packed for i in range(len(sequence))]
    if not special_share:  # the spans tile the blocks, so the budget is always spent
        budget = sum(-(-15 * len(block) // 100) for block in blocks)
        assert len(found.mlm_positions) == budget
    alone = masker.assemble(
        store.values,
        store.offsets,
        order[5:6],
        order[5:6],
        epoch=3,
        cls_token_id=CLS,
        sep_token_id=SEP,
    )
    assert alone.input_ids.tolist() == found.input_ids[cu[5] : cu[6]].tolist()


def test_a_block_without_prediction_is_named() -> None:
    blocks = some_blocks(9)
    spans = random_spans(blocks, [0, 2, 8])
    assert spans.gather(np.array([8, 0]))[1].tolist() == [
        len(spans.gather(np.array([row]))[0]) for row in (8, 0)
    ]
    for row in (1, 9):
        with pytest.raises(ValueError, match=f"block {row} was not segmented"):
            spans.gather(np.array([2, row]))


def test_a_loader_stops_where_it_is_told(shards, masker) -> None:
    arguments = {"seed": 3, "global_batch_tokens": 400, "num_micro_batches": 2}
    with StepLoader(shards, "train", masker, start_step=4, stop_step=9, **arguments) as loader:
        found = list(loader)
        assert list(loader) == []
    assert [step.step for step in found] == [4, 5, 6, 7, 8]
    with StepLoader(shards, "train", masker, start_step=4, **arguments) as loader:
        for step in found:
            assert step.example_ids.tolist() == next(loader).example_ids.tolist()
    with StepLoader(shards, "train", masker, start_step=2, stop_step=2, **arguments) as loader:
        assert list(loader) == []


def test_only_pretraining_has_a_model_that_predicts(shards) -> None:
    tokenizer = load_tokenizer(shards.tokenizer_directory)
    with pytest.raises(ValueError, match=r"a collator has no model .*spanbert-fast pretrain"):
        SpanMaskingCollator(tokenizer, scheme="segments")
    with pytest.raises(ValueError, match=r"scheme is 'segments', which needs a model"):
        make_masker(word_starts_of(VOCABULARY), scheme="segments")
