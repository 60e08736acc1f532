"""Windows, a longer position table or an attention window: what each costs, on real weights.

    python benchmarks/long_context.py inside MODEL --text FOLDER --output FOLDER
    python benchmarks/long_context.py states MODEL --text FOLDER --output FOLDER
    python benchmarks/long_context.py beyond MODEL --text FOLDER --output FOLDER
    python benchmarks/long_context.py picture MODEL --text FOLDER --output FOLDER --picture FILE

P is the number of positions of the model. `inside`: texts of P tokens, which one pass can read;
what windows and attention windows lose against it. `states`: the same, measured by the last hidden
states (1 - cosine), for an encoder without an MLM head. `beyond`: longer texts, before and after a
continued pre-training on them. `inside` and `beyond` first adapt the model to the text as a masked
language model, on all files (*.txt) but every tenth; the tenth ones are what is measured on. Every
masked piece is hidden by [MASK], the same pieces for all ways, and errors are standard errors over
the files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from context_quiz import Excerpt, Quiz, over_files
from context_tables import draw, tables
from context_training import adapted, extended, split
from torch import Tensor

from spanbert_fast.data.tokenizer import load_tokenizer
from spanbert_fast.model.pretrained import Model
from spanbert_fast.tasks.windows import Windows

Row = dict[str, Any]
"""One line of a table."""
Read = Callable[[Model, Sequence[Excerpt]], Tensor]
"""A figure for every piece that the excerpts are asked for."""


def inside(options: argparse.Namespace) -> Row:
    """Tables of what is lost against one pass, in texts that the model can read in one."""
    by_states = options.what == "states"
    folder = options.model if by_states else adapted(options)
    model = Model.from_pretrained(folder).eval()
    limit = model.config.max_position_embeddings
    held = split(options.text)[1]
    quiz = Quiz.of(held, load_tokenizer(folder), limit, options.pieces, masked=not by_states)
    read: Read = quiz.states if by_states else quiz.losses
    lost = _turned if by_states else torch.sub
    full = read(model, quiz.whole())
    loss = None if by_states else over_files(full, quiz.groups)
    rows: list[Row] = []
    borders: dict[str, list[Row]] = {}
    for size in (limit // 4, limit // 2):
        for keeps in (False, True):
            excerpts = quiz.inner_windows(size - 2, max(1, size // 8), keeps_positions=keeps)
            cuts = Cuts.of(quiz, excerpts, read(model, excerpts), full, lost)
            name = f"windows of {size}" + ", positions of the text" * keeps
            rows += cuts.by_stride(name, size - 2)
            borders[name] = cuts.by_distance(size - 2)
    for window in (limit // 32, limit // 16, limit // 8, limit // 4):
        reader = Model.from_pretrained(folder, attention_window=window).eval()
        mean, error = over_files(lost(read(reader, quiz.whole()), full), quiz.groups)
        row = {"way": f"attention window {window}", "price": 1, "lost": mean, "error": error}
        rows.append(row)
    return {"limit": limit, "pieces": len(full), "loss": loss, "ways": rows, "borders": borders}


def _turned(states: Tensor, others: Tensor) -> Tensor:
    """1 - cosine."""
    return 1 - torch.cosine_similarity(states, others, dim=-1)


class Cuts(NamedTuple):
    """Pieces in windows that are cut at both edges; one entry for a piece in a window."""

    left: Tensor
    """Pieces between it and the left edge."""
    right: Tensor
    lost: Tensor
    """Against one pass over the whole text."""
    files: Tensor

    @classmethod
    def of(
        cls,
        quiz: Quiz,
        excerpts: Sequence[Excerpt],
        values: Tensor,
        full: Tensor,
        lost: Callable[[Tensor, Tensor], Tensor],
    ) -> Cuts:
        """What was read in windows, beside what was read in one pass."""
        places = ((text, place) for text, own in enumerate(quiz.places) for place in own)
        row_of = {place: row for row, place in enumerate(places)}
        asked = [(own, place) for own in excerpts for place in own.places]
        return cls(
            torch.tensor([place - own.start for own, place in asked]),
            torch.tensor([own.end - 1 - place for own, place in asked]),
            lost(values, full[[row_of[own.text, place] for own, place in asked]]),
            torch.tensor([quiz.files[own.text] for own, _ in asked]),
        )

    def mean(self, chosen: Tensor) -> tuple[float, float]:
        """What some of them lose, and its standard error."""
        return over_files(self.lost[chosen], self.files[chosen].tolist())

    def by_stride(self, name: str, size: int) -> list[Row]:
        """What a long text loses, in which every window owns what the rule gives it."""
        rows = []
        for stride in (0, size // 8, size // 4, size // 2, 3 * size // 4):
            # Borders of ownership lie in the middle of what neighbours share.
            owned = (self.left >= stride // 2) & (self.right >= stride - stride // 2)
            mean, error = self.mean(owned)
            price = (size + 2) / (size - stride)
            rows.append(
                {"way": f"{name}, stride {stride}", "price": price, "lost": mean, "error": error}
            )
        return rows

    def by_distance(self, size: int) -> list[Row]:
        """What a piece loses, by the number of pieces between it and the nearest edge."""
        near = torch.minimum(self.left, self.right)
        past = [1, *(1 << n for n in range(1, 20) if 2 << n < size), size // 2]
        rows = []
        for low, high in pairwise([0, *past]):
            row: Row = {"from": low, "to": high - 1}
            inside = (near >= low) & (near < high)
            row["all"] = self.mean(inside)
            row["left"] = self.mean(inside & (self.left < self.right))
            row["right"] = self.mean(inside & (self.right < self.left))
            rows.append(row)
        return rows


def ways_beyond(limit: int, length: int) -> Iterable[tuple[str, Windows | None, Row]]:
    """Name, windows, and the settings with which the model is loaded."""
    for share in (0, 8, 4, 2):
        stride = (limit - 2) // share if share else 0
        yield f"windows of {limit}, stride {stride}", Windows(stride=stride), {}
    for extension in ("interpolate", "tile"):
        longer = {"max_position_embeddings": length, "position_extension": extension}
        yield extension, None, longer
        for window in (limit // 8, limit // 4, limit // 2):
            yield (
                f"{extension}, attention window {window}",
                None,
                longer | {"attention_window": window},
            )


def arms(limit: int, length: int) -> Iterable[tuple[str, Row]]:
    """Name, and fields of the model that a continued pre-training begins with."""
    yield f"windows of {limit}", {}
    for extension in ("interpolate", "tile"):
        longer = {"max_position_embeddings": length, "position_extension": extension}
        yield extension, longer
        yield (
            f"{extension}, attention window {limit // 4}",
            longer | {"attention_window": limit // 4},
        )


def by_position(quiz: Quiz, values: Tensor, width: int) -> list[float]:
    """Mean of the pieces of every stretch of `width` positions."""
    places = torch.tensor([place for own in quiz.places for place in own]) // width
    return [float(values[places == n].mean()) for n in range(int(places.max()) + 1)]


def table_of(quiz: Quiz, found: dict[str, list[Tensor]], limit: int) -> list[Row]:
    """One row for each way; the first named one is what the others are compared with.

    Args:
        quiz: The texts.
        found: For each way, the losses of every seed.
        limit: Positions of the model as it was.
    """
    first = next(iter(found.values()))
    rows = []
    for name, values in found.items():
        more = [one - base for one, base in zip(values, first, strict=True)]
        mean, error = over_files(sum(more) / len(more), quiz.groups)
        rows.append(
            {
                "way": name,
                "loss": over_files(sum(values) / len(values), quiz.groups)[0],
                "more": mean,
                "error": error,
                "seeds": [over_files(one, quiz.groups)[0] for one in more],
                "by_position": by_position(quiz, sum(values) / len(values), limit // 4),
            }
        )
    return rows


def beyond(options: argparse.Namespace) -> Row:
    """Tables of texts that are longer than the model; the longest also after training on them."""
    folder = adapted(options)
    tokenizer = load_tokenizer(folder)
    limit = Model.from_pretrained(folder).config.max_position_embeddings
    result: Row = {"limit": limit}
    for length in (factor * limit for factor in sorted(options.factors)):
        quiz = Quiz.of(split(options.text)[1], tokenizer, length, options.pieces)
        found: dict[str, list[Tensor]] = {}
        for name, windows, fields in ways_beyond(limit, length):
            model = Model.from_pretrained(folder, **fields).eval()
            excerpts = quiz.windows(windows, limit) if windows else quiz.whole()
            found[name] = [quiz.losses(model, excerpts)]
        result[f"{length}, as it is"] = table_of(quiz, found, limit)
    found = {}
    for seed in range(options.seeds):
        for name, fields in arms(limit, length):
            own = extended(options, folder, name, length if fields else limit, fields, seed)
            model = Model.from_pretrained(own).eval()
            excerpts = quiz.whole() if fields else quiz.windows(Windows(), limit)
            found.setdefault(name, []).append(quiz.losses(model, excerpts))
    result[f"{length}, trained"] = table_of(quiz, found, limit)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["inside", "states", "beyond", "picture"])
    parser.add_argument("model", help="folder of a BERT; for all but `states` with an MLM head")
    parser.add_argument("--text", type=Path, required=True, help="folder with files *.txt")
    parser.add_argument("--output", type=Path, required=True, help="folder of runs and results")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--pieces", type=int, default=100_000, help="of the texts of one table")
    parser.add_argument("--adapt-steps", type=int, default=800)
    parser.add_argument("--adapt-batch-tokens", type=int, default=4_096)
    parser.add_argument("--extend-steps", type=int, default=150)
    parser.add_argument("--extend-batch-tokens", type=int, default=2_048)
    parser.add_argument("--factors", type=int, nargs="+", default=[2, 4], help="times P: length")
    parser.add_argument("--seeds", type=int, default=2, help="of the continued pre-training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.what == "picture":
        draw(options.output, options.picture)
        return
    result = beyond(options) if options.what == "beyond" else inside(options)
    (options.output / f"{options.what}.json").write_text(json.dumps(result, indent=1))
    print(tables(result))


if __name__ == "__main__":
    main()
