"""Span F1 of segmentation on real text with gold spans: attention alone, trained, and baselines.

Reads a CoNLL file: a word first, its tag last on the line (`--column` picks another column), blank
lines between sentences. Gold spans are what the tags mark. A predicted span counts if it is not
punctuation or stop words alone; it is right if both of its ends are. Figures are for the texts
of the test file; the layer is chosen on the training file.

    python benchmarks/segmentation_f1.py MODEL --train TRAIN.conll --test TEST.conll
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from spanbert_fast.data.tokenizer import load_tokenizer
from spanbert_fast.model.pretrained import Model
from spanbert_fast.model.span_scores import SpanScoring
from spanbert_fast.model.span_segmenter import SpanSegmenter
from spanbert_fast.tasks.segment import segment
from spanbert_fast.tasks.words import find_words

_STOP_WORDS = """
    a an the this that these those of in on at by for with from to into as and or but if not no
    is are was were be been am do does did has have had will would can could may i you he she it
    we they me him her us them my your his its our their who which what when where there so rt
"""
STOP_WORDS = set(_STOP_WORDS.split())
Span = tuple[int, int]
"""First word, and the word after the last."""


def read(path: Path, column: int) -> list[tuple[list[str], list[Span]]]:
    """Words and gold spans of every sentence."""
    result = []
    # Some files have a tab in their blank lines.
    for block in re.split(r"\n[ \t]*\n", path.read_text("utf-8")):
        lines = [line.split() for line in block.splitlines() if len(line.split()) > 1]
        lines = [line for line in lines if line[0] != "-DOCSTART-"]
        tags, spans = [line[column] for line in lines], []
        for index, tag in enumerate(tags):
            begins = tag.startswith("B-") or (tag.startswith("I-") and tags[index - 1] == "O")
            if begins:
                end = index + 1
                while end < len(tags) and tags[end].startswith("I-"):
                    end += 1
                spans.append((index, end))
        if lines:
            result.append(([line[0] for line in lines], spans))
    return result


def is_content(words: Sequence[str]) -> bool:
    return any(w.lower() not in STOP_WORDS and any(c.isalnum() for c in w) for w in words)


def f1(data: Sequence[tuple[list[str], list[Span]]], predict: Callable[[int], set[Span]]) -> dict:
    """Micro F1 over all gold spans, and over those of several words."""
    result = {}
    for name, shortest in (("f1", 1), ("f1_multi", 2)):
        right = guessed = wanted = 0
        for index, (words, gold) in enumerate(data):
            kept = {
                s
                for s in predict(index)
                if s[1] - s[0] >= shortest and is_content(words[slice(*s)])
            }
            aim = {s for s in gold if s[1] - s[0] >= shortest}
            right, guessed, wanted = right + len(kept & aim), guessed + len(kept), wanted + len(aim)
        result[name] = 2 * right / max(guessed + wanted, 1)
    return result


def by_characters(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> set[Span]:
    """Spans of characters of the joined words as spans of words; others match no gold span."""
    first, last, place = {}, {}, 0
    for index, word in enumerate(words):
        first[place], last[place + len(word)] = index, index + 1
        place += len(word) + 1
    return {(first[a], last[b]) for a, b in spans if a in first and b in last}


def tiles(gold: Sequence[Span], count: int) -> list[int]:
    """Lengths of the gold spans and of the single words between them, in order."""
    starts, lengths, place = dict(gold), [], 0
    while place < count:
        end = starts.get(place, place + 1)
        lengths.append(end - place)
        place = end
    return lengths


def shuffled(lengths: list[int], seed: int) -> set[Span]:
    rest, spans, place = list(lengths), set(), 0
    random.Random(seed).shuffle(rest)
    for length in rest:
        spans.add((place, place + length))
        place += length
    return spans


def split_at_stops(words: Sequence[str]) -> set[Span]:
    spans, begin = set(), 0
    for index in range(len(words) + 1):
        if index == len(words) or not is_content(words[index : index + 1]):
            spans |= {(begin, index)} if index > begin else set()
            begin = index + 1
    return spans


def by_attention(model: Model, tokenizer: object, data: Sequence, scoring: SpanScoring) -> list:
    found = []
    for first in range(0, len(data), 64):
        texts = [" ".join(words) for words, _ in data[first : first + 64]]
        found += segment(model, tokenizer, texts, scoring=scoring)
    return [
        by_characters(words, [(s.start, s.end) for s in spans])
        for (words, _), spans in zip(data, found, strict=True)
    ]


def encode(model: Model, tokenizer: object, data: Sequence) -> list:
    """Frozen hidden states, words and gold lengths and labels in tokenizer's words, by 32 texts."""
    batches = []
    for begin in range(0, len(data), 32):
        part = data[begin : begin + 32]
        texts = [" ".join(words) for words, _ in part]
        found = find_words(model, tokenizer, texts)
        with torch.no_grad():
            hidden = model.bert.encode_packed(found.batch).last_hidden_state
        lengths: list[int] = []
        for (words, gold), offsets in zip(part, found.offsets, strict=True):
            place = [0]
            for word in words:
                place.append(place[-1] + len(word) + 1)
            ends = {place[a]: place[b] - 1 for a, b in gold}
            starts, own, index = {s: i for i, (s, _) in enumerate(offsets)}, [0] * len(offsets), 0
            stops = {e: i for i, (_, e) in enumerate(offsets)}
            while index < len(offsets):
                stop = stops.get(ends.get(offsets[index][0], -1), index)
                size = stop - index + 1 if stop >= index and stop - index < 10 else 1
                is_gold = offsets[index][0] in ends and offsets[index][0] in starts
                own[index] = size if is_gold else -1
                index += size if is_gold else 1
            lengths += own
        gold_lengths = torch.tensor(lengths)
        batches.append(
            (hidden, found.words, gold_lengths.abs(), (gold_lengths > 0).long(), found.offsets)
        )
    return batches


def trained(model: Model, tokenizer: object, train: Sequence, test: Sequence, epochs: int) -> list:
    """Spans of a segmenter trained on frozen states; label 1 is a gold span, 0 none."""
    torch.manual_seed(0)
    segmenter = SpanSegmenter(model.config.hidden_size, num_labels=2)
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=2e-3)
    batches = encode(model, tokenizer, train)
    for epoch in range(epochs):
        random.Random(epoch).shuffle(batches)
        for hidden, words, lengths, labels, _ in batches:
            loss = segmenter.loss(segmenter(hidden, words), words, lengths, labels)
            optimizer.zero_grad()
            (loss / words.num_words).backward()
            optimizer.step()
    result, place = [], 0
    for hidden, words, _, _, offsets in encode(model, tokenizer, test):
        with torch.no_grad():
            decoded = segmenter.decode(segmenter(hidden, words), words)
        for spans, own in zip(decoded, offsets, strict=True):
            characters = [(own[i][0], own[i + n - 1][1]) for i, n, label in spans if label]
            result.append(by_characters(test[place][0], characters))
            place += 1
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, help="without it: every second sentence of --train")
    parser.add_argument("--column", type=int, default=-1)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    model, tokenizer = Model.from_pretrained(options.model).eval(), load_tokenizer(options.model)
    train = read(options.train, options.column)
    test = read(options.test, options.column) if options.test else train[1::2]
    train = train if options.test else train[0::2]
    rows = {}
    randoms = [
        f1(test, lambda i, s=s: shuffled(tiles(test[i][1], len(test[i][0])), 1000 * s + i))
        for s in range(20)
    ]
    rows["random, gold lengths (mean of 20)"] = {
        key: sum(row[key] for row in randoms) / 20 for key in randoms[0]
    }
    rows["every word alone"] = f1(test, lambda i: {(j, j + 1) for j in range(len(test[i][0]))})
    rows["punctuation and stop words"] = f1(test, lambda i: split_at_stops(test[i][0]))
    every = by_attention(model, tokenizer, test, SpanScoring())
    rows["attention, all layers"] = f1(test, every.__getitem__)
    sample = train[:150]
    choices = []
    for layer in range(model.config.num_hidden_layers):
        for p in (0.5, 0.7):
            scoring = SpanScoring(layers=(layer,), stop_probability=p)
            guess = by_attention(model, tokenizer, sample, scoring)
            choices.append((f1(sample, guess.__getitem__)["f1"], layer, p))
    _, layer, p = max(choices)
    scoring = SpanScoring(layers=(layer,), stop_probability=p)
    chosen = by_attention(model, tokenizer, test, scoring)
    rows[f"attention, layer {layer}, p {p} (chosen on training text)"] = f1(
        test, chosen.__getitem__
    )
    learned = trained(model, tokenizer, train, test, options.epochs)
    rows["trained on frozen states"] = f1(test, learned.__getitem__)
    num_gold = sum(len(gold) for _, gold in test)
    print(f"{len(train)} training texts, {len(test)} test texts, {num_gold} gold spans")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
