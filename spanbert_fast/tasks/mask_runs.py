"""Find the runs of mask tokens in texts, and say which heads can predict each run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from spanbert_fast.config import HEADS, Config

HeadChoice = Literal["auto", "mlm", "sbo"]
HeadName = Literal["mlm", "sbo", "mlm+sbo"]


@dataclass(frozen=True)
class MaskRun:
    """A maximal run of mask tokens in one sequence."""

    text_index: int
    start: int
    """Character offset of the run in its text."""
    end: int
    group: int
    """Runs of one group are filled in turn, and their candidates compete."""
    sequence: int
    first: int
    """Position of its first token in the sequence."""
    length: int


def find_runs(
    tokenizer: Any, texts: Sequence[str], encoded: Any
) -> tuple[list[list[int]], list[MaskRun]]:
    """The token ids of each text, with special tokens, and all runs; each run is its own group.

    Args:
        tokenizer: Its mask token counts.
        texts: The texts.
        encoded: What the tokenizer makes of them, with `offset_mapping`.

    Raises:
        ValueError: a text has no mask token.
    """
    mask = tokenizer.mask_token_id
    sequences = encoded["input_ids"]
    runs: list[MaskRun] = []
    for index, ids in enumerate(sequences):
        firsts = [i for i, token in enumerate(ids) if token == mask and ids[i - 1 : i] != [mask]]
        if not firsts:
            raise ValueError(f"text {index} has no {tokenizer.mask_token}: {texts[index]!r:.80}")
        for first in firsts:
            past = next((i for i in range(first, len(ids)) if ids[i] != mask), len(ids))
            offsets = encoded["offset_mapping"][index]
            start, end = offsets[first][0], offsets[past - 1][1]
            # Some tokenizers count the spaces around a mask token as part of it.
            run = texts[index][start:end]
            start, end = end - len(run.lstrip()), start + len(run.rstrip())
            runs.append(MaskRun(index, start, end, len(runs), index, first, past - first))
    return sequences, runs


def try_lengths(
    sequences: Sequence[list[int]], runs: Sequence[MaskRun], length: tuple[int, int], mask: int
) -> tuple[list[list[int]], list[MaskRun]]:
    """Every sequence once per length, its one mask token repeated; the lengths form a group.

    Raises:
        ValueError: a text has more than one mask token.
    """
    for index, ids in enumerate(sequences):
        if (count := ids.count(mask)) != 1:
            raise ValueError(f"length needs one mask token per text, text {index} has {count}")
    longer: list[list[int]] = []
    variants: list[MaskRun] = []
    for run in runs:
        ids = sequences[run.sequence]
        for size in range(length[0], length[1] + 1):
            variants.append(replace(run, sequence=len(longer), length=size))
            longer.append([*ids[: run.first], *[mask] * size, *ids[run.first + 1 :]])
    return longer, variants


def choose_heads(
    config: Config,
    sequences: Sequence[list[int]],
    runs: Sequence[MaskRun],
    head: HeadChoice,
    *,
    special_ids: Collection[int],
    allow_untrained: bool,
) -> list[HeadName]:
    """The heads of each group of runs.

    Raises:
        ValueError: the head asked for is untrained or can't predict a run; the reason is named.
    """
    untrained = set() if allow_untrained else set(config.untrained_heads)
    usable = [name for name in HEADS if name not in untrained and head in ("auto", name)]
    if not usable:
        raise ValueError(
            f"head={head!r} would give random predictions: untrained heads of this model are "
            f"{', '.join(config.untrained_heads)}; train them or pass allow_untrained_heads=True"
        )
    obstacles: dict[int, str | None] = {}
    for run in runs:
        found = sbo_obstacle(config, sequences[run.sequence], run, special_ids)
        obstacles[run.group] = obstacles.get(run.group) or found
    chosen: list[HeadName] = []
    for obstacle in obstacles.values():
        if "mlm" in usable:
            chosen.append("mlm" if obstacle or "sbo" not in usable else "mlm+sbo")
        elif obstacle:
            raise ValueError(obstacle)
        else:
            chosen.append("sbo")
    return chosen


def sbo_obstacle(
    config: Config, ids: Sequence[int], run: MaskRun, special_ids: Collection[int]
) -> str | None:
    """Why the span boundary head can't predict the run, or None if it can."""
    where = f"the run of masks at characters {run.start} to {run.end} of text {run.text_index}"
    limit = config.max_span_targets
    if run.length > limit:
        return (
            f"{where} is {run.length} tokens long, the span boundary head (sbo) predicts at most "
            f"{limit} (max_span_targets)"
        )
    past = run.first + run.length
    for side, neighbour in (("left", ids[: run.first][-1:]), ("right", ids[past : past + 1])):
        if not neighbour or neighbour[0] in special_ids:
            position = run.first - 1 if side == "left" else past
            return (
                f"{where} has no ordinary token to its {side} (position {position} of "
                f"{len(ids)}): the span boundary head (sbo) needs one on both sides"
            )
    return None
