"""Pictures of a run: speed-ups by workload, and a picture for each growth curve.

python benchmarks/plot.py build/benchmarks --output build/benchmarks/plots
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from bars import BARS
from growth_fit import CURVES, Series, finding, number, series_of
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    NullLocator,
    PercentFormatter,
)
from PIL import Image
from records import Record, load

# Okabe and Ito's colours: apart from each other for every kind of colour vision.
OURS, PEER, LIGHT, THIRD, FOURTH = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"
GREY = "#555555"
MARKERS = {OURS: "o", PEER: "s", LIGHT: "v", THIRD: "^", FOURTH: "D"}
WIDTH, HEIGHT, DPI = 9.0, 5.0, 100
TASKS = {"training": "step", "inference": "encode", "memory": "memory of a step"}
OTHER = "single operations and the sampler"


def draw(folder: Path, output: Path) -> list[Path]:
    """Writes the pictures of the run in `folder`; returns their paths, the speed-ups first."""
    machine, records = load(folder)
    output.mkdir(parents=True, exist_ok=True)
    figures = {}
    compared = [record for record in records if is_speedup(record)]
    if compared:
        figures["speedups"] = speedups(compared, caption(machine))
    for curve, lines in groupby(series_of(records), key=lambda line: line.curve):
        figures[curve] = curve_figure(list(lines), caption(machine))
    paths = []
    for name, figure in figures.items():
        paths.append(output / f"{name}.png")
        save(figure, paths[-1])
    return paths


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG of at most 64 colours, a third of the size of one with all."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True, dpi=(DPI, DPI))


def caption(machine: dict[str, Any]) -> str:
    """The machine, in a line."""
    place = machine["gpu"] or f"{machine['cpu']} ({machine['cpu_capability']})"
    has = "with" if machine["has_bf16_products"] else "without"
    threads = machine["threads"]
    return (
        f"{place}, {has} bf16 products; {threads} thread{'s' * (threads != 1)} unless said; "
        f"torch {machine['torch']}, transformers {machine['transformers']}"
    )


def new_figure(height: float, title: str, below: str) -> Figure:
    """An empty figure with a title above and the machine below."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(below, x=0.01, ha="left", fontsize=8, color=GREY)
    return figure


def tidy(axis: Axes, along: str) -> None:
    axis.grid(axis=along, which="major", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


# Speed-ups.


def is_speedup(record: Record) -> bool:
    """Whether the record compares with someone else, by a ratio that is good above 1."""
    if record.peer.startswith("our") or record.peer.endswith("threads against one"):
        return False
    upper = any(BARS[r.split()[0]].is_upper for r in record.rows if r.split()[0] in BARS)
    return record.ratio is not None and record.curve is None and not upper


def label(record: Record) -> str:
    """Task, peer, dtypes and dropout of a bar."""
    task = record.case.split(".py")[0].removeprefix("bench_")
    ours, _, theirs = record.dtype.partition(" / ")
    dtype = ours if theirs in ("", ours) else record.dtype
    # What a peer's name says in brackets is for the table; a long label leaves no room for bars.
    peer = re.sub(r" \(.*?\)", "", record.peer)
    parts = [f"{TASKS.get(task, task)}: {peer}", *[dtype] * (dtype != "integers")]
    return ", ".join([*parts, *[f"dropout {record.dropout:g}"] * (record.dropout > 0)])


def speedups(records: Sequence[Record], below: str) -> Figure:
    """A panel for each workload, a bar for each peer; all workloads have one scale."""
    panels: dict[str, list[Record]] = {}
    for record in records:
        panels.setdefault(record.workload or OTHER, []).append(record)
    order = sorted(panels, key=lambda name: name == OTHER)
    counts = [len(panels[name]) for name in order]
    lost = sum(record.ratio < 1 for record in records if record.ratio is not None)
    title = f"Ours against each peer: ahead in {len(records) - lost} of {len(records)} comparisons"
    figure = new_figure(1.3 + 0.27 * sum(counts) + 0.9 * len(counts), title, below)
    axes = figure.subplots(len(order), 1, squeeze=False, height_ratios=[n + 0.6 for n in counts])
    for axis, name in zip(axes[:, 0], order, strict=True):
        draw_bars(axis, name, sorted(panels[name], key=lambda record: -(record.ratio or 0)))
        scaled = [r.ratio for r in records if r.ratio and (r.workload == "") == (name == OTHER)]
        low, high = min(0.7, 0.75 * min(scaled)), 1.5 * max(scaled)
        axis.set(xscale="log", xlim=(low, high))
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(axis="x", labelsize=8)
    axes[-1, 0].set_xlabel(
        "peer's cost / ours, median and 20 to 80 %: right of 1 ours is ahead", loc="right"
    )
    return figure


def draw_bars(axis: Axes, name: str, records: Sequence[Record]) -> None:
    """Bars that begin at 1, those of lost rows in the other colour."""
    for place, record in enumerate(records):
        assert record.ratio is not None
        low, high = record.ratio_20 or record.ratio, record.ratio_80 or record.ratio
        color = OURS if record.ratio >= 1 else PEER
        axis.barh(place, record.ratio - 1, 0.7, left=1, color=color)
        axis.plot([low, high], [place, place], color="black", linewidth=1)
        edge = max(record.ratio, high, 1)
        axis.annotate(
            number(record.ratio),
            (edge, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(records)), [label(record) for record in records], fontsize=8)
    axis.set_ylim(len(records) - 0.4, -0.6)
    axis.set_title(name, loc="left", fontsize=10, fontweight="bold")
    axis.tick_params(axis="y", length=0)
    tidy(axis, "x")


# Growth.


def colors(lines: Sequence[Series]) -> list[str]:
    """One for each line; ours and the peer have the same in every picture."""
    own, peers = iter((OURS, THIRD, FOURTH)), iter((PEER, LIGHT))
    return [next(peers if "Hugging Face" in line.name else own) for line in lines]


def curve_figure(lines: Sequence[Series], below: str) -> Figure:
    """The lines of one curve; the title says what they show, the legend their exponents."""
    curve = CURVES[lines[0].curve]
    model = f"model {lines[0].model}; " if lines[0].model else ""
    figure = new_figure(HEIGHT, f"{curve.title}:\n{finding(lines)}", model + below)
    axis = figure.subplots()
    for line, color in zip(lines, colors(lines), strict=True):
        slope = line.fit.upper_exponent
        name = line.name if curve.logarithmic != "xy" else f"{line.name} (slope {slope:.2f})"
        style = "-" if color in (OURS, PEER) else "--"
        axis.plot(line.x, line.y, style, marker=MARKERS[color], color=color, label=name)
    axis.set(xlabel=curve.x, ylabel=curve.y)
    scale(axis, lines)
    tidy(axis, "both")
    if len(lines) > 1:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9)
    return figure


def scale(axis: Axes, lines: Sequence[Series]) -> None:
    """Logarithmic axes with a tick at each point; others from 0, so that flat looks flat."""
    curve, plain = lines[0].curve, FuncFormatter(lambda value, _: number(value))
    axis.minorticks_off()
    if "x" in CURVES[curve].logarithmic:
        axis.set_xscale("log")
        axis.set_xticks(lines[0].x)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(plain)
    elif curve == "padding":
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    else:
        axis.set_xticks(lines[0].x)
    if "y" in CURVES[curve].logarithmic:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.set_ylim(0, 1.1 * max(max(line.y) for line in lines))
    axis.yaxis.set_major_formatter(plain)


def main() -> None:
    """Draws the run in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, help="by default `plots` in the folder")
    options = parser.parse_args()
    for path in draw(options.folder, options.output or options.folder / "plots"):
        print(path)


if __name__ == "__main__":
    main()
