"""The picture of the kernel report: registers, occupancy, instructions per score, traffic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kernels.row_cases import MAX_BYTES
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from kernel_report import Row

_COLORS = {80: "#4C72B0", 90: "#DD8452", 100: "#55A868"}
_MARKERS = {80: "o", 90: "s", 100: "D"}
_GREY, _GATE = "#555555", "#C44E52"
_MAX_REGISTERS, _MAX_WARPS = 255, 64


def draw(rows: Sequence[Row], layer_bytes: dict[str, float] | None, path: Path) -> None:
    """Write the picture.

    Args:
        rows: Every kernel for every GPU.
        layer_bytes: Bytes per token and layer by op, in units of the hidden size; None if they
            were not counted.
        path: A PNG file.
    """
    figure = Figure(figsize=(14, 15), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("The Triton kernels as they are compiled, never run on a GPU", fontsize=16)
    above, below = figure.subfigures(2, 1, height_ratios=(2.3, 1))
    registers, warps = above.subplots(1, 2, sharey=True)
    labels = list(dict.fromkeys(row.label for row in rows))
    _dots(registers, labels, rows, [row.code.registers for row in rows])
    registers.set_yticks(range(len(labels)), labels)
    registers.set(xlabel="registers of a thread (line: the most it can have)", xlim=(0, 265))
    registers.axvline(_MAX_REGISTERS, color=_GATE, linestyle="--")
    _dots(warps, labels, rows, [row.occupancy.warps for row in rows])
    warps.set(xlabel="warps that a multiprocessor holds (line: the most it can)", xlim=(0, 67))
    warps.axvline(_MAX_WARPS, color=_GATE, linestyle="--")
    handles, names = registers.get_legend_handles_labels()
    above.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    scores, traffic = below.subplots(1, 2)
    _draw_scores(scores, rows)
    _draw_bytes(traffic, layer_bytes)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _dots(axis: Axes, labels: list[str], rows: Sequence[Row], values: list[int]) -> None:
    """One dot for each kernel and GPU; equal values stand below each other."""
    for shift, arch in enumerate(_COLORS):
        pairs = [
            (value, labels.index(row.label) + (shift - 1) * 0.25)
            for row, value in zip(rows, values, strict=True)
            if row.arch == arch
        ]
        x, y = zip(*pairs, strict=True)
        axis.plot(x, y, _MARKERS[arch], color=_COLORS[arch], label=f"sm_{arch}")
    axis.set_ylim(len(labels) - 0.5, -0.5)
    for place in range(0, len(labels), 2):
        axis.axhspan(place - 0.5, place + 0.5, color=_GREY, alpha=0.07, linewidth=0)
    _tidy(axis, "x")


def _draw_scores(axis: Axes, rows: Sequence[Row]) -> None:
    """Bars of instructions per score, what dropout adds on top."""
    found = {(row.kernel, row.arch, row.variant): row.per_score or 0.0 for row in rows}
    kernels = list(dict.fromkeys(row.kernel for row in rows if row.per_score))
    for shift, arch in enumerate(_COLORS):
        for place, kernel in enumerate(kernels):
            plain = found[kernel, arch, "no dropout"]
            added = found[kernel, arch, "dropout"] - plain
            x, color = place + (shift - 1) * 0.27, _COLORS[arch]
            name = None if place else f"sm_{arch}"
            axis.bar(x, plain, 0.24, color=color, label=name)
            axis.bar(x, added, 0.24, bottom=plain, color=color, alpha=0.45, hatch="//")
            axis.text(x, plain + added, f"+{added:.1f}", ha="center", va="bottom", fontsize=9)
    axis.bar(0, 0, color=_GREY, alpha=0.45, hatch="//", label="added by dropout")
    axis.set_xticks(range(len(kernels)), [name.removeprefix("attention_") for name in kernels])
    axis.set(ylabel="instructions per score", title="Attention: head size 64, bfloat16")
    axis.set_ylim(0, 1.35 * axis.dataLim.ymax)
    axis.legend(loc="upper center", ncols=2, frameon=False)
    _tidy(axis, "y")


def _draw_bytes(axis: Axes, layer_bytes: dict[str, float] | None) -> None:
    """Bytes of a token and layer, against the most that is allowed."""
    axis.set(title="Norm, GELU, embedding: bfloat16, both passes")
    if layer_bytes is None:
        axis.text(0.5, 0.5, "bytes were not counted: ptxsim is absent", ha="center")
        axis.set_axis_off()
        return
    parts = {"all": sum(layer_bytes.values()), **layer_bytes}
    places = range(len(parts))
    axis.barh(places, list(parts.values()), 0.6, color=[_GREY] + [_COLORS[90]] * (len(parts) - 1))
    for place, value in zip(places, parts.values(), strict=True):
        axis.text(value + 1, place, f"{value:.1f}", va="center")
    axis.axvline(MAX_BYTES, color=_GATE, linestyle="--")
    axis.text(
        MAX_BYTES - 1, 2.5, f"most allowed: {MAX_BYTES}", color=_GATE, ha="right", va="center"
    )
    axis.set_yticks(places, list(parts))
    axis.set(xlabel="bytes per token and layer, in units of D", xlim=(0, 105))
    axis.set_ylim(len(parts) - 0.4, -0.8)
    _tidy(axis, "x")


def _tidy(axis: Axes, along: str) -> None:
    axis.grid(axis=along, alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
