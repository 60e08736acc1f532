"""What `spanbert-fast plan` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spanbert_fast.cli.render import facts, new_console, print_json, to_json

if TYPE_CHECKING:
    from spanbert_fast.diagnose.budget import Budget

_DAY, _HOUR, _MINUTE = 86_400, 3_600, 60


def planned(budget: Budget, as_json: bool) -> None:
    """Size, memory, time and disk of a run, and how the time was found."""
    if as_json:
        print_json({**to_json(budget), "peak_bytes": budget.peak_bytes})
        return
    console, memory = new_console(), budget.memory
    parts = f"{budget.micro_batches} x {budget.micro_batch_sequences} sequences on each device"
    facts(
        console,
        [
            ("parameters", f"{budget.parameters:,}"),
            ("tokens", f"{budget.tokens:,.0f} in {budget.steps:,} steps"),
            ("a step", f"{budget.tokens_per_step:,} tokens, {parts}"),
            ("FLOPs", f"{budget.flops:.2e}"),
            *_window(budget),
        ],
        title=f"{budget.preset} on {budget.device}, {budget.precision}",
    )
    facts(
        console,
        [
            ("weights", _bytes(memory.weights)),
            ("gradients", _bytes(memory.gradients)),
            ("optimizer", _bytes(memory.optimizer)),
            ("activations", _bytes(memory.activations)),
            ("process", _bytes(budget.process_bytes)),
            ("peak", _bytes(budget.peak_bytes)),
        ],
        title="memory of each device",
    )
    facts(
        console,
        [
            ("tokens/s", f"{budget.tokens_per_second:,.0f}"),
            ("time", _duration(budget.seconds)),
            ("basis", budget.basis),
            *(("note", note) for note in budget.notes),
        ],
        title="time",
    )
    facts(
        console,
        [
            ("checkpoint", _bytes(budget.checkpoint_bytes)),
            ("shards", f"{_bytes(budget.shards_bytes)}, if every token is read once"),
        ],
        title="disk",
    )


def _window(budget: Budget) -> list[tuple[str, str]]:
    if budget.attention_window is None:
        return []
    return [("attention window", f"{budget.attention_window:,} tokens on each side")]


def _bytes(number: float) -> str:
    return f"{number / 2**30:,.2f} GiB"


def _duration(seconds: float) -> str:
    for unit, name in ((_DAY, "days"), (_HOUR, "hours"), (_MINUTE, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} seconds"
