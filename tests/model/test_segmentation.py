"""Span scores from attention, the likelihood of segmentations, and a segmenter that learns."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from oracles import segmentation as listed
from oracles import span_scores as oracle
from torch import Tensor

from spanbert_fast import ops
from spanbert_fast.batch import PackedBatch
from spanbert_fast.model.pretrained import Model
from spanbert_fast.model.segmentation import (
    best_segmentation,
    segmentation_loss,
    span_probabilities,
)
from spanbert_fast.model.span_scores import (
    SpanScoring,
    Words,
    attention_of_words,
    attention_span_scores,
)
from spanbert_fast.model.span_segmenter import SpanSegmenter
from spanbert_fast.tasks.texts import pack

PIECES = [[[1], [2, 3], [4], [5], [6, 7, 8]], [[1, 2]], [[1], [2], [3, 4], [5], [6], [7], [8]]]
"""Pieces of each word of three texts; [CLS] and [SEP] stand around them."""


def batch_and_words() -> tuple[PackedBatch, Words]:
    generator = torch.Generator().manual_seed(3)
    lengths = [max(own[-1]) + 2 for own in PIECES]
    batch = pack([torch.randint(5, 64, (n,), generator=generator).tolist() for n in lengths])
    word_of, count = [], 0
    for own, length in zip(PIECES, lengths, strict=True):
        row = [-1] * length
        for index, pieces in enumerate(own):
            for piece in pieces:
                row[piece] = count + index
        word_of += row
        count += len(own)
    cu = torch.tensor([0, *map(len, PIECES)]).cumsum(0).int()
    return batch, Words(word_of=torch.tensor(word_of), cu_words=cu)


@pytest.mark.parametrize("band", [0, 2, 30])
def test_banded_attention_is_the_band_of_the_whole_map(band: int) -> None:
    rows = [torch.randn(12, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    cu = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    _, lse = ops.varlen_attention_with_lse(*rows, rows[1], cu, 7, scale=0.4)
    near = ops.banded_attention(*rows, lse, cu, scale=0.4, band=band).detach()
    assert near.shape == (12, 2 * band + 1)
    whole = torch.zeros(12, 12, dtype=torch.float64)
    for first, end in ((0, 5), (5, 12)):
        q, k = (each[first:end].transpose(0, 1) for each in rows)
        whole[first:end, first:end] = (0.4 * q @ k.mT).softmax(-1).mean(0).detach()
    for row in range(12):
        for column in range(2 * band + 1):
            other = row + column - band
            expected = whole[row, other] if 0 <= other < 12 else torch.zeros(())
            assert float(near[row, column]) == pytest.approx(float(expected), abs=1e-12)


def test_banded_attention_has_gradients_and_refuses_bad_shapes() -> None:
    rows = [torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lse = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 4, 6], dtype=torch.int32)
    torch.autograd.gradcheck(
        lambda q, k, s: ops.banded_attention(q, k, s, cu, scale=0.5, band=3), (*rows, lse)
    )
    with pytest.raises(ValueError, match="band is -1, allowed is a number >= 0"):
        ops.banded_attention(*rows, lse, cu, scale=0.5, band=-1)
    with pytest.raises(ValueError, match=r"query, key, log_sum_exp have shapes"):
        ops.banded_attention(*rows, lse[:5], cu, scale=0.5, band=1)


@pytest.mark.parametrize(("max_words", "window"), [(1, None), (3, None), (9, None), (3, 2)])
@torch.no_grad()
def test_scores_follow_the_formula(model: Model, max_words: int, window: int | None) -> None:
    """Against the attention maps of the eager implementation, pair by pair."""
    model.config.attention_window = window
    batch, words = batch_and_words()
    scoring = SpanScoring(max_words=max_words, layers=(1,), heads=(0, 3), border_weight=0.7)
    scoring = dataclasses.replace(scoring, stop_probability=0.4)
    states = model.bert.encode_packed(batch, output_hidden_states=True).hidden_states
    attention = attention_of_words(model.bert, batch, states, words, scoring)
    scores = attention_span_scores(attention, words, scoring)
    model.config._attn_implementation = "eager"
    maps = model.bert.encode_packed(batch, output_attentions=True).attentions[1]
    for index, own in enumerate(PIECES):
        pieces = maps[index, [0, 3]].mean(0).numpy()
        z = oracle.standardised(oracle.word_attention(pieces, own), max_words)
        for first in range(len(own)):
            for size in range(1, min(max_words, len(own) - first) + 1):
                found = scores[int(words.cu_words[index]) + first, size - 1]
                assert float(found) == pytest.approx(
                    oracle.span_score(z, first, size, 0.7, 0.4), abs=1e-9
                )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_words": 0}, "max_words is 0, must be in"),
        ({"max_words": 513}, "max_words is 513, must be in"),
        ({"stop_probability": 1.0}, "stop_probability is 1.0, must be in"),
        ({"sharpness": -1.0}, "sharpness is -1.0, must be a finite number"),
        ({"layers": ()}, "layers is empty"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpanScoring(**settings)


def test_missing_layer_is_named(model: Model) -> None:
    batch, words = batch_and_words()
    states = model.bert.encode_packed(batch, output_hidden_states=True).hidden_states
    with pytest.raises(ValueError, match="layers names 2, allowed are 0 to 1"):
        attention_of_words(model.bert, batch, states, words, SpanScoring(layers=(2,)))


CU = torch.tensor([0, 4, 4, 7], dtype=torch.int32)
GOLD = torch.tensor([2, 0, 1, 1, 1, 2, 0])


def test_loss_is_minus_the_log_probability() -> None:
    scores = torch.randn(7, 3, dtype=torch.float64)
    expected = 0.0
    for rows, spans in (((0, 4), ((0, 2), (2, 1), (3, 1))), ((4, 7), ((0, 1), (1, 2)))):
        own = scores[slice(*rows)].numpy()
        expected += listed.marginals(own)[1] - listed.total(own, spans)
    assert float(segmentation_loss(scores, CU, GOLD)) == pytest.approx(expected, abs=1e-12)


def test_loss_passes_gradcheck() -> None:
    scores = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda each: segmentation_loss(each, CU, GOLD), (scores,))
    (grad,) = torch.autograd.grad(segmentation_loss(scores, CU, GOLD), scores)
    gold = torch.zeros(7, 3, dtype=torch.float64)
    gold[GOLD > 0, GOLD[GOLD > 0] - 1] = 1
    torch.testing.assert_close(grad, span_probabilities(scores, CU).marginals - gold)


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ([2, 0, 1, 0, 1, 2, 0], "without a gap"),
        ([2, 0, 1, 2, 0, 2, 0], "without a gap and end at the sequences' ends"),
        ([4, 0, 0, 0, 1, 1, 1], "a gold span has 4 units, the scores allow 3"),
    ],
)
def test_gold_that_is_no_segmentation_is_refused(gold: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmentation_loss(torch.zeros(7, 3), CU, torch.tensor(gold))
    with pytest.raises(TypeError, match=r"scores have dtype torch\.float16"):
        best_segmentation(torch.zeros(7, 3, dtype=torch.float16), CU)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_segmenter_passes_gradcheck(num_labels: int) -> None:
    segmenter = SpanSegmenter(5, max_words=3, num_labels=num_labels, num_units=4).double()
    words = Words(word_of=torch.arange(7), cu_words=CU)
    labels = torch.where(GOLD > 1, num_labels - 1, 0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    parameters = tuple(segmenter.parameters())

    def loss(rows: Tensor, *_: Tensor) -> Tensor:
        return segmenter.loss(segmenter(rows, words), words, GOLD, labels)

    torch.autograd.gradcheck(loss, (hidden, *parameters))


def test_pooling_is_the_softmax_of_its_span() -> None:
    """The running sums give the representation that the formula asks for, span by span."""
    segmenter = SpanSegmenter(5, max_words=4, num_units=6).double()
    rows = torch.randn(6, 5, dtype=torch.float64)
    words = Words(word_of=torch.arange(6), cu_words=torch.tensor([0, 6], dtype=torch.int32))
    scores = segmenter(rows, words)
    for first in range(6):
        for size in range(1, min(4, 6 - first) + 1):
            own = rows[first : first + size]
            pooled = segmenter.attention(own)[:, 0].softmax(0) @ own
            units = segmenter.first(own[0]) + segmenter.last(own[-1]) + segmenter.pooled(pooled)
            units = torch.nn.functional.gelu(units + segmenter.width.weight[size - 1])
            torch.testing.assert_close(scores[first, size - 1], segmenter.score(units))


def test_a_segmenter_learns_gold_spans() -> None:
    """Words 1 to 3 open spans of as many words: learned, and right on texts never seen."""
    rng = np.random.default_rng(0)
    table = torch.eye(8)

    def texts(count: int) -> tuple[Tensor, Words, Tensor]:
        ids, gold, sizes = [], [], [0]
        for _ in range(count):
            before = len(ids)
            for size in rng.integers(1, 4, 5):
                ids += [int(size), *rng.integers(4, 8, size - 1).tolist()]
                gold += [int(size)] + [0] * (int(size) - 1)
            sizes.append(len(ids) - before)
        cu = torch.tensor(sizes).cumsum(0).int()
        words = Words(word_of=torch.arange(len(ids)), cu_words=cu)
        return table[torch.tensor(ids)], words, torch.tensor(gold)

    segmenter = SpanSegmenter(8, max_words=3, num_labels=2, num_units=16)
    optimizer = torch.optim.Adam(segmenter.parameters(), lr=0.03)
    hidden, words, gold = texts(30)
    for _ in range(60):
        loss = segmenter.loss(segmenter(hidden, words), words, gold, (gold > 1).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hidden, words, gold = texts(20)
    found = segmenter.decode(segmenter(hidden, words), words)
    cu = words.cu_words.tolist()
    expected = [
        [(i, int(n), int(n > 1)) for i, n in enumerate(gold[first:end].tolist()) if n]
        for first, end in itertools.pairwise(cu)
    ]
    assert found == expected
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\)"):
        segmenter.loss(segmenter(hidden, words), words, gold, gold)
