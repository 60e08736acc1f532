"""Whether a resumed run can end with the bits of one that was never stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from spanbert_fast.data.loss_weighting import LossWeighting
from spanbert_fast.train.checkpoint import Checkpoint
from spanbert_fast.train.events import Event, Notice
from spanbert_fast.train.options import Settings

# What may differ between the parts of one run without changing a bit of its weights.
_FREE_SETTINGS = {
    "data",
    "output",
    "log_every",
    "eval_every",
    "eval_blocks",
    "save_every",
    "keep_checkpoints",
    "language",
    "seq_length",
    # These four stand in the environment as what became of them.
    "preset",
    "threads",
    "device",
    "precision",
}


def check_exactness(
    settings: Settings,
    surroundings: dict[str, Any],
    checkpoint: Checkpoint,
    emit: Callable[[Event], None],
    *,
    allow: bool,
) -> None:
    """Say what differs from the run that wrote the checkpoint; refuse unless allowed.

    Args:
        settings: Of this part of the run.
        surroundings: Versions, machine and data now.
        checkpoint: What the part before left.
        emit: Gets a notice of what differs, if that is allowed.
        allow: Continue nevertheless.

    Raises:
        ValueError: Something differs on which the bits depend.
    """
    before, now = checkpoint.state["environment"], surroundings
    pairs = [(name, before.get(name), now.get(name)) for name in sorted(before | now)]
    # A run begun before there were weights had none.
    before = {"weighting": dataclasses.asdict(LossWeighting())} | checkpoint.state["settings"]
    now = settings.as_json()
    pairs += [(name, before.get(name), now.get(name)) for name in sorted(set(now) - _FREE_SETTINGS)]
    found = [f"{name} was {old!r}, is {new!r}" for name, old, new in pairs if old != new]
    if not found:
        return
    text = f"resuming {settings.output} is not exact: {'; '.join(found)}"
    if not allow:
        raise ValueError(f"{text}. Pass --allow-inexact-resume to continue nevertheless")
    emit(Notice(text=text))
