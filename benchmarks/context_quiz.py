"""Masked pieces of long texts, and what a model says of them when it reads a text in some way.

Shapes: N masked pieces of all texts, from left to right, text after text.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch
from spanbert_fast.model.pretrained import Model
from spanbert_fast.tasks.texts import pack
from spanbert_fast.tasks.windows import Windows, plan_windows

MASK_RATIO = 0.15
_BATCH_TOKENS = 8_192
_NUM_SPECIAL = 2


class Excerpt(NamedTuple):
    """What is read at once of a text, and which of its masked pieces are asked for there."""

    text: int
    start: int
    """First piece."""
    end: int
    """The piece past the last."""
    places: Sequence[int]
    """Pieces of the text, all of them in the excerpt."""
    shift: int = 0
    """Position of its first piece, less 1, which [CLS] has."""


@dataclass(frozen=True)
class Quiz:
    """Texts of equal length in pieces, without special tokens, and some pieces of each."""

    edges: tuple[int, int]
    """Ids of [CLS] and [SEP]."""
    shown: list[list[int]]
    """The texts as a model sees them."""
    answers: list[list[int]]
    """The texts as they are."""
    places: list[list[int]]
    """The pieces that are asked for, sorted."""
    files: list[int]
    """Number of the file that each text is from."""

    @classmethod
    def of(
        cls, files: Sequence[Path], tokenizer: Any, length: int, pieces: int, *, masked: bool = True
    ) -> Quiz:
        """Texts spread evenly over every file.

        Args:
            files: Plain text.
            tokenizer: The model's.
            length: Tokens of a text, special tokens included.
            pieces: Of all texts together, roughly.
            masked: Whether the pieces that are asked for are hidden by [MASK].

        Raises:
            ValueError: A file is shorter than one text.
        """
        size = length - _NUM_SPECIAL
        wanted = max(1, round(pieces / (size * len(files))))
        answers, places, shown, sources = [], [], [], []
        for number, file in enumerate(files):
            ids = tokenizer(file.read_text("utf-8"), add_special_tokens=False, verbose=False)
            whole, count = ids["input_ids"], min(wanted, len(ids["input_ids"]) // size)
            if not count:
                raise ValueError(f"{file} has {len(whole)} pieces, a text needs {size}")
            for index in range(count):
                begin = index * (len(whole) // count)
                own = whole[begin : begin + size]
                order = random.Random(f"{file.name} {length} {index}").sample(range(size), size)
                answers.append(own)
                places.append(sorted(order[: max(1, round(MASK_RATIO * size))]))
                hidden = set(places[-1]) if masked else ()
                mask = tokenizer.mask_token_id
                shown.append([mask if at in hidden else piece for at, piece in enumerate(own)])
                sources.append(number)
        edges = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        return cls(edges, shown, answers, places, sources)

    @property
    def groups(self) -> list[int]:
        """The file that each of the N pieces is from."""
        return [file for file, own in zip(self.files, self.places, strict=True) for _ in own]

    def whole(self) -> list[Excerpt]:
        """Each text in one pass."""
        return [Excerpt(n, 0, len(own), self.places[n]) for n, own in enumerate(self.shown)]

    def windows(self, choice: Windows, limit: int) -> list[Excerpt]:
        """The windows of every text as the tasks read them, each asked for what it owns."""
        size, stride = choice.sizes(limit, _NUM_SPECIAL)
        plan = plan_windows(len(self.shown[0]), size, stride)
        return [
            Excerpt(text, start, end, [place for place in places if first <= place < past])
            for text, places in enumerate(self.places)
            for start, end, first, past in plan
        ]

    def inner_windows(self, size: int, step: int, *, keeps_positions: bool) -> list[Excerpt]:
        """Windows of `size` pieces, both edges inside of the text, asked for all that is in them.

        Args:
            size: Pieces of a window.
            step: From a window to the next.
            keeps_positions: Whether pieces have the positions of the text, not of the window.
        """
        return [
            Excerpt(
                text,
                start,
                start + size,
                [place for place in places if start <= place < start + size],
                start if keeps_positions else 0,
            )
            for text, places in enumerate(self.places)
            for start in range(step, len(self.shown[text]) - size, step)
        ]

    @torch.no_grad()
    def losses(self, model: Model, excerpts: Sequence[Excerpt]) -> Tensor:
        """MLM loss (nats) of every piece that an excerpt is asked for, in their order."""
        found = []
        for part, positions in self._passes(excerpts):
            labels = [self.answers[own.text][place] for own in part for place in own.places]
            batch = dataclasses.replace(
                self._pack(part),
                mlm_positions=positions,
                mlm_labels=torch.tensor(labels, dtype=torch.int64),
            )
            found.append(model.score_packed(batch).mlm_loss)
        return torch.cat(found)

    @torch.no_grad()
    def states(self, model: Model, excerpts: Sequence[Excerpt]) -> Tensor:
        """Last hidden states [any, D] of the pieces that are asked for, in their order."""
        return torch.cat(
            [
                model.bert.encode_packed(self._pack(part)).last_hidden_state[positions]
                for part, positions in self._passes(excerpts)
            ]
        )

    def _pack(self, excerpts: Sequence[Excerpt]) -> PackedBatch:
        """The excerpts as a model sees them."""
        first, last = self.edges
        ids = [[first, *self.shown[own.text][own.start : own.end], last] for own in excerpts]
        batch = pack(ids)
        shifts = [[0, *[own.shift] * (own.end - own.start + 1)] for own in excerpts]
        moved = torch.tensor([shift for own in shifts for shift in own])
        return dataclasses.replace(batch, position_ids=batch.position_ids + moved)

    def _passes(self, excerpts: Sequence[Excerpt]) -> Iterator[tuple[Sequence[Excerpt], Tensor]]:
        """Some excerpts for one pass, and the packed positions of what is asked for in them."""
        longest = max(own.end - own.start for own in excerpts) + _NUM_SPECIAL
        count = max(1, _BATCH_TOKENS // longest)
        for first in range(0, len(excerpts), count):
            part = excerpts[first : first + count]
            sizes = (own.end - own.start + _NUM_SPECIAL for own in part)
            places = [
                begin + 1 + place - own.start
                for own, begin in zip(part, accumulate(sizes, initial=0), strict=False)
                for place in own.places
            ]
            yield part, torch.tensor(places, dtype=torch.int64)


def over_files(values: Tensor, groups: Sequence[int]) -> tuple[float, float]:
    """Mean of the means of the groups, and its standard error.

    Args:
        values: Any number of figures.
        groups: The file that each of them is from.
    """
    kinds = torch.tensor(groups)
    means = [float(values[kinds == one].double().mean()) for one in sorted({*groups})]
    spread = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else float("nan")
    return statistics.mean(means), spread
