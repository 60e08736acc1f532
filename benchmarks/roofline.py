"""Prints the modelled time of every kernel of a training step, and the bound that limits it.

No figure here was measured on a GPU: each is *modelled*, the largest of four times (tensor cores,
special functions, memory, launches) from counts of operations and bytes. Run
`python benchmarks/roofline.py`, with `--markdown FILE` for the committed table.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

from spanbert_fast.diagnose.roofline import (
    GPUS,
    HALF,
    MODELS,
    Gpu,
    Model,
    flops_of_step,
    step_times,
)

Table = list[list[str]]


class Boundary(NamedTuple):
    """Modelled seconds of two ways to compute the first SBO layer forward."""

    split: float
    """Gather, vendor's product of [R, 2 D], one kernel for the rest."""
    whole_rows: float
    """One kernel of programs that own 16 rows each."""
    split_occupancy: float
    whole_rows_occupancy: float


def boundary_layer(gpu: Gpu, model: Model) -> Boundary:
    """The first SBO layer by both ways; a program has no more than one SM's share of the GPU."""
    spans, hidden = model.num_sequences * model.spans, model.hidden
    rate = gpu.peak_tflops * 1e12 * gpu.product_fraction / gpu.num_sms
    tiles = math.ceil(spans / gpu.vendor_tile) * math.ceil(hidden / gpu.vendor_tile)
    waves = math.ceil(tiles / gpu.num_sms)
    launch = gpu.launch_us * 1e-6
    gather = 2 * 2 * HALF * spans * hidden / (gpu.memory_tbytes * 1e12)
    product = waves * 2 * gpu.vendor_tile**2 * 2 * hidden / rate
    targets = HALF * hidden * (spans + model.num_sequences * model.sbo_rows)
    rest = targets / (gpu.memory_tbytes * 1e12)
    split = sum(max(seconds, launch) for seconds in (gather, product, rest))
    programs = math.ceil(spans / 16)
    busy = min(programs, gpu.num_sms)
    matrix = HALF * 2 * hidden**2
    port = min(gpu.cache_port * gpu.clock_ghz * 1e9, gpu.cache_tbytes * 1e12 / busy)
    turn = max(2 * 16 * 2 * hidden**2 / rate, matrix / port)
    whole = math.ceil(programs / gpu.num_sms) * turn + rest
    occupancy = tiles / (waves * gpu.num_sms), busy / gpu.num_sms
    return Boundary(split, max(whole, launch), *occupancy)


def input_table() -> Table:
    """Inputs of the model, one row each."""
    rows = [["input", *(gpu.name for gpu in GPUS), "source"]]
    for entry in dataclasses.fields(Gpu)[1:]:
        values = [f"{getattr(gpu, entry.name):g}" for gpu in GPUS]
        rows.append([entry.name, *values, entry.metadata["source"]])
    for shape in dataclasses.fields(Model)[5:-1]:  # a window is not in these tables
        value = f"{getattr(MODELS[0], shape.name):,}"
        rows.append([shape.name, value, value, shape.metadata["source"]])
    return rows


def step_table(gpu: Gpu, model: Model) -> Table:
    """Counts, time and bound of each kernel, then the step."""
    rows = [["kernel", "launches", "GFLOP", "10^9 exp", "MB", "ms, modelled", "bound by"]]
    times = step_times(gpu, model)
    for time in times:
        k = time.kernel
        counts = (f"{v:,.1f}" for v in (k.flops / 1e9, k.exps / 1e9, k.bytes / 1e6))
        rows.append([k.name, f"{k.launches}", *counts, f"{time.seconds * 1e3:.3f}", time.bound])
    total = sum(time.seconds for time in times)
    utilisation = flops_of_step(model) / total / (gpu.peak_tflops * 1e12)
    launches = sum(time.kernel.launches for time in times)
    speed = f"{model.num_sequences / total:,.0f} sequences/s, MFU {utilisation:.0%} (modelled)"
    rows.append(["step", f"{launches}", "", "", "", f"{total * 1e3:.3f}", speed])
    return rows


def boundary_table() -> Table:
    """Both ways of the first SBO layer."""
    rows = [["GPU, model", "split, us (modelled)", "SMs", "whole rows, us (modelled)", "SMs"]]
    for gpu in GPUS:
        for model in MODELS:
            b = boundary_layer(gpu, model)
            split = [f"{b.split * 1e6:.1f}", f"{b.split_occupancy:.0%}"]
            whole = [f"{b.whole_rows * 1e6:.1f}", f"{b.whole_rows_occupancy:.0%}"]
            rows.append([f"{gpu.name}, {model.name}", *split, *whole])
    return rows


_SECTIONS = {
    "inputs": "All times are modelled from these; no GPU was at hand. Dropout, which adds "
    "instructions but no bytes, and time on the host are left out. Values of data sheets and "
    "guides are quoted from memory.",
    "boundary": "The first SBO layer, forward. Split: gather, vendor's product, one kernel for the "
    "rest. Whole rows: one kernel in which a program owns 16 rows and streams the whole matrix "
    "from the second-level cache. SMs: the share of them that is at work.",
}


def sections() -> list[tuple[str, str, Table]]:
    """Title, text and table of each part."""
    parts = [("Inputs (modelled, not measured)", _SECTIONS["inputs"], input_table())]
    for gpu in GPUS:
        for m in MODELS:
            title = f"{gpu.name}, BERT {m.name}, {m.num_sequences} x {m.length}, bf16 (modelled)"
            parts.append((title, "One training step.", step_table(gpu, m)))
    title = "First SBO layer: split or one kernel (modelled)"
    return [*parts, (title, _SECTIONS["boundary"], boundary_table())]


def as_text(table: Table) -> str:
    """Columns of equal width."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def as_markdown(table: Table) -> str:
    """A table of GitHub's dialect."""
    head, *body = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([head, "|" + " --- |" * len(table[0]), *body])


def main() -> None:
    """Prints all tables, or writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path, help="file to write instead of printing")
    path = parser.parse_args().markdown
    if path is None:
        print("\n\n".join(f"{t}\n{text}\n\n{as_text(rows)}" for t, text, rows in sections()))
        return
    parts = "\n\n".join(f"## {t}\n\n{text}\n\n{as_markdown(r)}" for t, text, r in sections())
    path.write_text(f"# Roofline\n\nWritten by `python benchmarks/roofline.py`.\n\n{parts}\n")


if __name__ == "__main__":
    main()
