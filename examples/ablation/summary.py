"""The figures of all arms and seeds as a table with paired differences, and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arms import ARMS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from recovery import LENGTHS

Lines = Sequence[dict[str, Any]]
Measure = Callable[[dict[str, Any]], float | None]

_COLORS = dict(zip(ARMS, ("#8C8C8C", "#4C72B0", "#DD8452", "#C44E52"), strict=True))
_SPANS = {
    "nats": ("nats per piece of hidden spans, ", "", 1),
    "choice": ("right content of ten, ", ", %", 100),
    "exact": ("spans filled in right, ", ", %", 100),
    "pieces": ("their pieces right, ", ", %", 100),
}
"""Of a figure on spans: text before and behind the head, and factor."""
_OWN = "MLM loss, own masks"
_PAIRS = (
    ("token", "whole word"),
    ("whole word", "geometric"),
    ("geometric", "geometric + SBO"),
    ("token", "geometric + SBO"),
)


def measures(results: Lines) -> dict[str, Measure]:
    """What the table shows of a result: a number, or None where the arm has no such number."""
    found: dict[str, Measure] = {
        "MLM loss, token masks": lambda r: _in(r, "losses", "token"),
        "MLM loss, whole-word masks": lambda r: _in(r, "losses", "whole_word"),
        "MLM loss, geometric masks": lambda r: _in(r, "losses", "spanbert"),
        _OWN: lambda r: _in(r, "own_loss"),
    }
    for head, text in (("mlm", "MLM head"), ("sbo", "SBO head"), ("auto", "both heads")):
        for key, (before, behind, scale) in _SPANS.items():
            found[before + text + behind] = lambda r, head=head, key=key, scale=scale: _in(
                r, "spans", head, key, "all", scale=scale
            )
    for task in {name: None for line in results for name in line["tasks"]}:
        for key, text in (("f1", "F1"), ("accuracy", "accuracy")):
            found[f"{task}, {text}, %"] = lambda r, task=task, key=key: _in(
                r, "tasks", task, key, scale=100
            )
    return found


def write_table(results: Lines, path: Path) -> str:
    """The Markdown that is written: mean and spread of every measure, then paired differences."""
    arms = list(dict.fromkeys(line["arm"] for line in results))
    arms = [*[arm for arm in ARMS if arm in arms], *[arm for arm in arms if arm not in ARMS]]
    rows = [["mean ± sd over seeds", *arms]]
    pairs = [(a, b) for a, b in _PAIRS if {a, b} <= set(arms)]
    differences = [["paired difference (seeds up)", *(f"{b} minus {a}" for a, b in pairs)]]
    for label, measure in measures(results).items():
        values = {arm: _values(results, arm, measure) for arm in arms}
        digits = 1 if "%" in label else 3
        rows.append([label, *(_spread(list(values[arm].values()), digits) for arm in arms)])
        cells = []
        for a, b in pairs:
            paired = [values[b][seed] - values[a][seed] for seed in values[a] if seed in values[b]]
            up = f" ({sum(d > 0 for d in paired)}/{len(paired)})" if paired else ""
            cells.append(_spread(paired, digits, sign="+") + up)
        # Losses under unequal masks have nothing to do with one another.
        if label != _OWN and any(cell != "-" for cell in cells):
            differences.append([label, *cells])
    tables = [rows, differences, *(_by_length(results, arms, key) for key in ("choice", "exact"))]
    text = "\n\n".join("\n".join(_markdown(table)) for table in tables) + "\n"
    path.write_text(text, encoding="utf-8")
    return text


def _by_length(results: Lines, arms: Sequence[str], key: str) -> list[list[str]]:
    """One figure on spans by their number of pieces."""
    before, behind, scale = _SPANS[key]
    rows = [[f"{before}by pieces{behind}", *LENGTHS]]
    for label, arm, head in _curves(arms):
        shares = _shares(results, arm, head, key)
        cells = [_spread([scale * v for v in shares[size]], 1) for size in LENGTHS]
        rows += [[label, *cells]] if any(shares.values()) else []
    some = next(line["spans"]["mlm"]["spans"] for line in results)
    return [*rows, ["number of spans", *(str(some[size]) for size in LENGTHS)]]


def _shares(results: Lines, arm: str, head: str, key: str) -> dict[str, list[float]]:
    """A figure on spans of all seeds, by number of pieces."""
    return {
        size: [
            *_values(results, arm, lambda r, size=size: _in(r, "spans", head, key, size)).values()
        ]
        for size in LENGTHS
    }


def _curves(arms: Sequence[str]) -> list[tuple[str, str, str]]:
    """Label, arm and head."""
    found = [(arm, arm, "mlm") for arm in arms]
    sbo = [arm for arm in arms if arm in ARMS and ARMS[arm].sbo_weight]
    return found + [
        (f"{arm}, {text}", arm, head)
        for arm in sbo
        for head, text in (("sbo", "SBO head"), ("auto", "both heads"))
    ]


def _in(result: dict[str, Any], *keys: str, scale: float = 1) -> float | None:
    value: Any = result
    for key in keys:
        value = value.get(key)
        if value is None:  # the arm has no such head, or there was nothing to count
            return None
    return scale * float(value)


def _values(results: Lines, arm: str, measure: Measure) -> dict[int, float]:
    """By seed."""
    own = {line["seed"]: measure(line) for line in results if line["arm"] == arm}
    return {seed: value for seed, value in own.items() if value is not None}


def _spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "| --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]]


def draw(results: Lines, path: Path) -> None:
    """Writes the picture: losses, choices by length, and the span tasks; a dot is a seed."""
    arms = [arm for arm in ARMS if any(line["arm"] == arm for line in results)]
    reference = [line["arm"] for line in results if line["arm"] not in ARMS][:1]
    tasks = list({name: None for line in results for name in line["tasks"]})
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 + bool(tasks))
    losses = {
        f"{name} masks": lambda r, key=key: _in(r, "losses", key)
        for name, key in (("token", "token"), ("word", "whole_word"), ("geometric", "spanbert"))
    }
    _dots(axes[0], results, arms, losses)
    axes[0].set(title="MLM loss on held-out text, lower is better", ylabel="nats per masked piece")
    for label, arm, head in _curves(arms):
        shares = _shares(results, arm, head, "choice")
        means = {size: 100 * statistics.fmean(own) for size, own in shares.items() if own}
        style = {"mlm": "-", "sbo": "--", "auto": ":"}[head]
        color = _COLORS.get(arm, "black")
        axes[1].plot([*means], [*means.values()], style, marker="o", ms=4, color=color, label=label)
    axes[1].axhline(10, color="black", lw=1, ls=":", label="by chance")
    axes[1].set(title="Right content of a hidden span, of ten", xlabel="pieces of the span")
    axes[1].set(ylabel="%", ylim=(0, None))
    axes[1].legend(
        frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15)
    )
    if tasks:
        scores = {
            task: lambda r, task=task: _in(r, "tasks", task, "f1", scale=100) for task in tasks
        }
        _dots(axes[2], results, [*reference, *arms], scores)
        axes[2].set(title="Span task after fine-tuning", ylabel="F1, %")
        axes[2].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


def _dots(axis: Any, results: Lines, arms: Sequence[str], columns: dict[str, Measure]) -> None:
    """One group for each column: every seed a dot, every mean a dash."""
    for index, arm in enumerate(arms):
        color = _COLORS.get(arm, "black")
        for place, measure in enumerate(columns.values()):
            values = list(_values(results, arm, measure).values())
            x = place + 0.16 * (index - (len(arms) - 1) / 2)
            axis.plot([x] * len(values), values, "o", ms=4, alpha=0.6, color=color,
                      label=arm if place == 0 else None)  # fmt: skip
            mean = statistics.fmean(values)
            axis.plot([x - 0.06, x + 0.06], [mean, mean], color=color, lw=2.5)
    axis.set_xticks(range(len(columns)), columns)
