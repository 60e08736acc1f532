"""The results of `long_context.py` as Markdown tables and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_STYLES = ("o-C0", "o--C0", "s-C1", "s--C1")
Row = dict[str, Any]


def tables(result: Row) -> str:
    """All tables of a result."""
    return "\n".join(_inside(result) if "ways" in result else _beyond(result))


def _inside(result: Row) -> Iterator[str]:
    yield f"\n{result['pieces']:,} pieces, in texts of {result['limit']} tokens\n"
    if result["loss"] is not None:
        yield "MLM loss of one pass {:.3f} ± {:.3f}\n".format(*result["loss"])
    yield "| way | tokens read per token | more than one pass |"
    yield "| --- | ---: | ---: |"
    for row in result["ways"]:
        yield f"| {row['way']} | {row['price']:.2f} | {_figure(row['lost'], row['error'])} |"
    for name, rows in result["borders"].items():
        yield f"\nMore than one pass, {name}, by distance from the nearest edge\n"
        yield "| pieces between | all | left edge nearer | right edge nearer |"
        yield "| ---: | ---: | ---: | ---: |"
        for row in rows:
            span = f"{row['from']} to {row['to']}" if row["to"] > row["from"] else row["from"]
            figures = " | ".join(_figure(*row[side]) for side in ("all", "left", "right"))
            yield f"| {span} | {figures} |"


def _beyond(result: Row) -> Iterator[str]:
    width = result["limit"]
    for name, rows in result.items():
        if not isinstance(rows, list):
            continue
        count = -(-len(rows[0]["by_position"]) // 4)
        yield f"\nTexts of {name}\n"
        heads = [f"{n * width} to {(n + 1) * width - 1}" for n in range(count)]
        yield f"| way | loss | more than the first | {' | '.join(heads)} |"
        yield f"| --- | ---: | ---: |{' ---: |' * count}"
        for row in rows:
            parts = [row["by_position"][4 * n : 4 * n + 4] for n in range(count)]
            means = " | ".join(f"{sum(part) / len(part):.3f}" for part in parts)
            more = _figure(row["more"], row["error"])
            if len(row["seeds"]) > 1:
                more += f" (seeds {', '.join(f'{one:+.3f}' for one in row['seeds'])})"
            yield f"| {row['way']} | {row['loss']:.3f} | {more} | {means} |"


def _figure(mean: float, error: float) -> str:
    return f"{mean:+.4f} ± {error:.4f}"


def draw(output: Path, picture: Path) -> None:
    """What a cut costs by the distance from it, and the loss by position in the longest text."""
    inside, beyond = (
        json.loads((output / f"{name}.json").read_text()) for name in ("inside", "beyond")
    )
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (name, rows), style in zip(inside["borders"].items(), _STYLES, strict=True):
        middles = [(row["from"] + row["to"]) / 2 + 1 for row in rows]
        means, errors = zip(*(row["all"] for row in rows), strict=True)
        left.errorbar(middles, means, errors, fmt=style, capsize=2, label=name)
    left.set_xscale("log", base=2)
    left.set_yscale("symlog", linthresh=0.02)
    left.set_ylim(bottom=-0.02)
    left.axhline(0, color="black", linewidth=0.6)
    left.set(
        xlabel="pieces to the nearest edge, itself counted", ylabel="loss more than one pass, nats"
    )
    longest = [name for name in beyond if name.endswith("trained")][-1]
    trained, width = beyond[longest], beyond["limit"] // 4
    names = [row["way"] for row in trained]
    begun = beyond[longest.replace("trained", "as it is")]
    _positions(right, trained, width, "-")
    right.set_prop_cycle(None)
    # Windows, without training, stand for themselves: the first row of either table.
    same = [begun[0], *(row for row in begun if row["way"] in names[1:])]
    _positions(right, [row | {"way": None} for row in same], width, "--")
    right.set(xlabel="position in the text", ylabel="MLM loss (dashed: before training)")
    low, high = right.get_ylim()
    right.set_ylim(low - 0.35 * (high - low), high)  # room for the legend
    for axis, place in ((left, "upper right"), (right, "lower left")):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc=place, ncols=1 + (axis is right))
    figure.savefig(picture, dpi=100)


def _positions(axis: Any, rows: list[Row], width: int, style: str) -> None:
    for row in rows:
        places = [width * (n + 0.5) for n in range(len(row["by_position"]))]
        axis.plot(places, row["by_position"], style, label=row["way"])
