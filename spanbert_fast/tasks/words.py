"""The words of texts, and what an encoder says of them, also where a text needs several windows.

Shapes: N words, W longest span in words, D hidden size.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch
from spanbert_fast.data.tokenizer import word_starts
from spanbert_fast.model.pretrained import Model
from spanbert_fast.model.span_scores import SpanScoring, Words, attention_of_words
from spanbert_fast.model.span_segmenter import mean_of_words
from spanbert_fast.tasks.texts import (
    Excerpt,
    Extent,
    cut,
    encode_texts,
    pack,
    passes,
    special_edges,
)
from spanbert_fast.tasks.windows import Windows


class TextWords(NamedTuple):
    """Texts as a packed batch, and where their words lie."""

    batch: PackedBatch
    words: Words
    offsets: list[list[tuple[int, int]]]
    """First and end character of every word, for each text."""


class ReadWords(NamedTuple):
    """What an encoder says of the words of some texts."""

    attention: Tensor
    """[N, 2 W + 1], as `attention_of_words` gives it."""
    rows: Tensor
    """[N, D], means of the last hidden states of their pieces."""
    words: Words
    """The boundaries of the texts; each word counts as one piece."""
    offsets: list[list[tuple[int, int]]]
    """First and end character of every word, for each text."""


class _Places(NamedTuple):
    """The words of one text."""

    pieces: list[tuple[int, int]]
    """First piece and the one past the last, special tokens counted."""
    characters: list[tuple[int, int]]


def find_words(model: Model, tokenizer: Any, texts: Sequence[str]) -> TextWords:
    """The texts as one packed batch on the model's device, and their words.

    Raises:
        ValueError: a text is longer than the model allows, or the tokenizer is another model's.
    """
    encoded = encode_texts(model, tokenizer, texts)
    places = _find(tokenizer, texts, encoded)
    excerpts = cut(model, encoded["input_ids"], special_edges(encoded), [], None)
    batch = pack([excerpt.ids for excerpt in excerpts]).to(model.device)
    words, _ = _words_inside(excerpts, places, batch)
    return TextWords(batch, words, [own.characters for own in places])


def read_words(
    model: Model,
    tokenizer: Any,
    texts: Sequence[str],
    scoring: SpanScoring,
    windows: Windows | None,
    batch_tokens: int | None,
) -> ReadWords:
    """Attention between near words, and their vectors.

    Where a text needs windows, a word is read together with the W words on either side of it, in
    the window in which all of them are farthest from an edge.

    Args:
        model: without dropout; the caller sees to it.
        tokenizer: a fast one, which marks word starts.
        texts: the texts.
        scoring: layers, heads and W.
        windows: how a text that does not fit is cut; None: it is refused.
        batch_tokens: of one pass; see `passes`.

    Raises:
        ValueError: a text is too long, W words are longer than a window, or the tokenizer is
            another model's.
    """
    encoded = encode_texts(model, tokenizer, texts)
    places = _find(tokenizer, texts, encoded)
    extents = [
        Extent(index, *_around(own, word, scoring.max_words))
        for index, (own, _) in enumerate(places)
        for word in range(len(own))
    ]
    excerpts = cut(model, encoded["input_ids"], special_edges(encoded), extents, windows)
    firsts = [*accumulate((len(own.pieces) for own in places), initial=0)]
    attention, rows, order = [], [], []
    for part in passes(excerpts, batch_tokens, windows):
        batch = pack([excerpt.ids for excerpt in part]).to(model.device)
        words, begins = _words_inside(part, places, batch)
        # The words' numbers in the pass, from their numbers over all texts.
        local = [
            number - firsts[excerpt.sequence] - lowest + begin
            for excerpt, (lowest, begin) in zip(part, begins, strict=True)
            for number in excerpt.extents
        ]
        chosen = torch.tensor(local, dtype=torch.int64, device=model.device)
        states = model.bert.encode_packed(batch, output_hidden_states=True).hidden_states
        assert states is not None
        near = attention_of_words(model.bert, batch, states, words, scoring)
        attention.append(near.index_select(0, chosen))
        rows.append(mean_of_words(states[-1], words).index_select(0, chosen))
        order += [number for excerpt in part for number in excerpt.extents]
    by_number = torch.tensor(order, dtype=torch.int64, device=model.device).argsort()
    whole = Words(
        word_of=torch.arange(firsts[-1], device=model.device),
        cu_words=torch.tensor(firsts, dtype=torch.int32, device=model.device),
    )
    return ReadWords(
        torch.cat(attention).index_select(0, by_number),
        torch.cat(rows).index_select(0, by_number),
        whole,
        [own.characters for own in places],
    )


def _around(pieces: Sequence[tuple[int, int]], word: int, reach: int) -> tuple[int, int]:
    """The pieces of a word and of so many on either side of it."""
    return pieces[max(word - reach, 0)][0], pieces[min(word + reach, len(pieces) - 1)][1]


def _find(tokenizer: Any, texts: Sequence[str], encoded: Any) -> list[_Places]:
    begins = word_starts(tokenizer)
    found = []
    for index, ids in enumerate(encoded["input_ids"]):
        pieces: list[tuple[int, int]] = []
        characters: list[tuple[int, int]] = []
        marks = encoded["special_tokens_mask"][index]
        offsets = encoded["offset_mapping"][index]
        for place, (token, special, offset) in enumerate(zip(ids, marks, offsets, strict=True)):
            if special:
                continue
            if begins[token] or not pieces:
                pieces.append((place, place + 1))
                characters.append(offset)
            else:
                pieces[-1] = (pieces[-1][0], place + 1)
                characters[-1] = (characters[-1][0], offset[1])
        # A byte-level piece holds the space before it.
        found.append(_Places(pieces, [_stripped(texts[index], *place) for place in characters]))
    return found


def _words_inside(
    excerpts: Sequence[Excerpt], places: Sequence[_Places], batch: PackedBatch
) -> tuple[Words, list[tuple[int, int]]]:
    """The words that lie whole in each excerpt; of each, the first and its number in the batch."""
    word_of = torch.full_like(batch.input_ids, -1, device="cpu")
    begins, counts, start = [], [0], 0
    for excerpt in excerpts:
        own = places[excerpt.sequence].pieces
        low = bisect_left(own, excerpt.first, key=lambda place: place[0])
        high = bisect_right(own, excerpt.past, key=lambda place: place[1])
        begins.append((low, counts[-1]))
        if high > low:
            sizes = torch.tensor([past - first for first, past in own[low:high]])
            number = torch.arange(counts[-1], counts[-1] + high - low).repeat_interleave(sizes)
            begin = start + own[low][0] - excerpt.shift
            word_of[begin : begin + len(number)] = number
        counts.append(counts[-1] + high - low)
        start += len(excerpt.ids)
    words = Words(
        word_of=word_of.to(batch.input_ids.device),
        cu_words=torch.tensor(counts, dtype=torch.int32).to(batch.input_ids.device),
    )
    return words, begins


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
