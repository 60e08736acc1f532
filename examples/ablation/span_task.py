"""A span task: which type has a given span? Fine-tuned on the states of its first and last piece.

Half of the spans are marked in the data; for each of them there is one of as many words, in the
same sentence, that is not marked, and whose type is "none".
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import spanbert_fast as sf

NONE = "none"
_LEARNING_RATE, _BATCH = 5e-4, 32


class Sentence(NamedTuple):
    """A text and its spans of characters with their types."""

    text: str
    spans: list[tuple[int, int]]
    types: list[str]


@dataclass(frozen=True)
class SpanTask:
    """Sentences to learn from, and others to be judged on."""

    name: str
    train: list[Sentence]
    test: list[Sentence]
    types: list[str]
    """Of the marked spans, and "none" at the end."""


def read_task(paths: Sequence[Path], *, tokenizer: Any, longest: int, sentences: int) -> SpanTask:
    """The task in one file or folder, of which every fifth part is for the test, or in two.

    Args:
        paths: CoNLL files or folders of them. A file that begins with "#begin document" has words
            in its fourth column and nested brackets in its last (coreference); any other has words
            in its first and BIO tags in its last.
        tokenizer: Tells how long a sentence is.
        longest: Pieces of a sentence, at most; longer ones are left out.
        sentences: Sentences to learn from, at most, drawn at random; half as many for the test.

    Raises:
        ValueError: A file has no marked span.
    """
    files = [_conll_files(path) for path in paths]
    parts = [[_read(file) for file in own] for own in files]
    if len(parts) == 2:
        train, test = ([s for file in part for s in file] for part in parts)
    elif len(parts[0]) >= 5:  # whole documents apart
        train = [s for i, file in enumerate(parts[0]) if i % 5 for s in file]
        test = [s for file in parts[0][::5] for s in file]
    else:
        every = [s for file in parts[0] for s in file]
        train, test = [s for i, s in enumerate(every) if i % 5], every[::5]
    chosen = []
    for part, limit, seed in ((train, sentences, 0), (test, max(1, sentences // 2), 1)):
        fitting = [s for s in part if len(tokenizer(s.text)["input_ids"]) <= longest]
        random.Random(seed).shuffle(fitting)
        chosen.append(fitting[:limit])
    types = sorted({kind for s in chosen[0] for kind in s.types} - {NONE})
    if not types or not chosen[1]:
        raise ValueError(f"{', '.join(map(str, paths))}: no marked spans to learn and to test")
    known = {*types, NONE}
    test = [s for s in chosen[1] if known.issuperset(s.types)]
    return SpanTask(paths[0].stem, chosen[0], test, [*types, NONE])


def _conll_files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*.conll")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no file that ends in .conll")
    return files


def _read(path: Path) -> list[Sentence]:
    """The sentences of a file that have a marked span."""
    text = path.read_text("utf-8")
    is_coreference = text.startswith("#begin document")
    rng, found = random.Random(0), []
    # Some files have a tab in their blank lines.
    for block in re.split(r"\n[ \t]*\n", text):
        lines = [line for line in block.splitlines() if line and not line.startswith(("#", "-DOC"))]
        rows = [re.split(r"[\t ]", line) if is_coreference else line.split() for line in lines]
        rows = [row for row in rows if len(row) > 1]
        words = [row[3 if is_coreference else 0] for row in rows]
        marks = [row[-1] for row in rows]
        gold = _brackets(marks) if is_coreference else _tags(marks)
        if gold:
            found.append(_sentence(words, gold, rng))
    return found


def _tags(tags: Sequence[str]) -> dict[tuple[int, int], str]:
    """Spans of words in BIO, with their types."""
    spans, index = {}, 0
    while index < len(tags):
        end = index + 1
        if tags[index][:2] in ("B-", "I-"):
            while end < len(tags) and tags[end].startswith("I-"):
                end += 1
            spans[index, end] = tags[index][2:]
        index = end
    return spans


def _brackets(marks: Sequence[str]) -> dict[tuple[int, int], str]:
    """Spans of words in brackets like `(3|(4` and `4)|3)`; all are mentions."""
    spans: dict[tuple[int, int], str] = {}
    opened: dict[str, list[int]] = {}
    for index, mark in enumerate(marks):
        for part in filter(None, mark.split("|")):
            name = part.strip("()")
            if part.startswith("("):
                opened.setdefault(name, []).append(index)
            if part.endswith(")") and opened.get(name):
                spans[opened[name].pop(), index + 1] = "mention"
    return spans


def _sentence(
    words: Sequence[str], gold: dict[tuple[int, int], str], rng: random.Random
) -> Sentence:
    """With a span that is not marked for every marked one, as long, if the sentence has one."""
    spans, unmarked = dict(gold), set()
    for begin, end in gold:
        size = end - begin
        free = [
            (first, first + size)
            for first in range(len(words) - size + 1)
            if (first, first + size) not in gold and (first, first + size) not in unmarked
        ]
        if free:
            unmarked.add(rng.choice(free))
    spans |= dict.fromkeys(sorted(unmarked), NONE)
    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word) + 1)
    characters = [(starts[begin], starts[end] - 1) for begin, end in spans]
    return Sentence(" ".join(words), characters, list(spans.values()))


def fine_tune(
    model: Any, tokenizer: Any, task: SpanTask, *, epochs: int, seed: int
) -> dict[str, float]:
    """Trains encoder and classifier, and scores them; the model is changed.

    Returns:
        `f1`: micro F1 of the marked types; `accuracy`: of all spans, "none" included.
    """
    torch.manual_seed(seed)
    size, number = model.config.hidden_size, {kind: i for i, kind in enumerate(task.types)}
    head = nn.Sequential(nn.Linear(2 * size, size), nn.GELU(), nn.Linear(size, len(number)))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=_LEARNING_RATE)
    order = list(range(len(task.train)))
    steps = epochs * -(-len(order) // _BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    rng = random.Random(seed)
    model.train()
    for _ in range(epochs):
        rng.shuffle(order)
        for first in range(0, len(order), _BATCH):
            batch = [task.train[index] for index in order[first : first + _BATCH]]
            targets = torch.tensor([number[kind] for s in batch for kind in s.types])
            loss = nn.functional.cross_entropy(head(_vectors(model, tokenizer, batch)), targets)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return _score(model.eval(), tokenizer, head, task, number)


def _vectors(model: Any, tokenizer: Any, batch: Sequence[Sentence]) -> torch.Tensor:
    """[spans, 2 D]: states of the first and the last piece of every span."""
    found = sf.span_embeddings(model, tokenizer, [s.text for s in batch], [s.spans for s in batch])
    return torch.cat([own.vectors for own in found])


@torch.no_grad()
def _score(
    model: Any, tokenizer: Any, head: nn.Module, task: SpanTask, number: dict[str, int]
) -> dict[str, float]:
    none, right, hits, guessed, wanted, count = number[NONE], 0, 0, 0, 0, 0
    for first in range(0, len(task.test), _BATCH):
        batch = task.test[first : first + _BATCH]
        targets = torch.tensor([number[kind] for s in batch for kind in s.types])
        guesses = head(_vectors(model, tokenizer, batch)).argmax(-1)
        equal = guesses == targets
        right, count = right + int(equal.sum()), count + len(targets)
        hits += int((equal & (targets != none)).sum())
        guessed += int((guesses != none).sum())
        wanted += int((targets != none).sum())
    return {"f1": 2 * hits / max(guessed + wanted, 1), "accuracy": right / count}
