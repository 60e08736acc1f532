"""Memory and time of one pass over a long sequence, with an attention window and without.

    python benchmarks/attention_window.py memory    # every length in a process of its own, VmHWM
    python benchmarks/attention_window.py memory --picture memory.png
    python benchmarks/attention_window.py time      # windowed and full in turn, in one process

On a CPU, with two layers of 128 units and dropout 0.1 (`--hidden` and `--layers` change that).
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from spanbert_fast.config import Config
from spanbert_fast.diagnose.memory import sample_batch
from spanbert_fast.model.pretrained import Model

WINDOW = 256
"""Tokens on each side; Longformer's 512."""


def make_pass(arguments: argparse.Namespace, kind: str) -> Callable[[], float]:
    """A function that runs the model over one sequence: forward alone, or with its gradient."""
    torch.manual_seed(0)
    shape = {"hidden_size": arguments.hidden, "num_hidden_layers": arguments.layers}
    config = Config(
        vocab_size=4_000,
        num_attention_heads=arguments.hidden // 64,
        intermediate_size=4 * arguments.hidden,
        max_position_embeddings=arguments.length,
        attention_window=arguments.window or None,
        **shape,
    )
    model, batch = Model(config), sample_batch(1, arguments.length)

    def run() -> float:
        if kind == "forward":
            with torch.no_grad():
                return float(model.eval().bert.encode_packed(batch).last_hidden_state.sum())
        model.train().zero_grad()
        loss = model.forward_packed(batch, dropout_seed=torch.tensor(1)).loss
        loss.backward()
        return float(loss.detach())

    return run


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


def measure_once(arguments: argparse.Namespace) -> None:
    """Prints what one pass adds to the memory of this process, in bytes, and its seconds."""
    run = make_pass(arguments, arguments.kind)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, begun = peak_bytes(), time.perf_counter()
    run()
    print(peak_bytes() - before, time.perf_counter() - begun)


def memory(arguments: argparse.Namespace) -> None:
    """A table of the memory that a pass adds, one process for each entry; drawn on request."""
    lines: dict[str, list[tuple[int, float]]] = {}
    print("| pass | window | length | memory added | per 1,024 tokens | seconds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for kind in ("forward", "training step"):
        for window, longest in ((WINDOW, arguments.longest), (0, arguments.longest_full)):
            length = arguments.shortest
            while length <= longest:
                sizes = ["--hidden", str(arguments.hidden), "--layers", str(arguments.layers)]
                own = ["--kind", kind, "--window", str(window), "--length", str(length)]
                command = [sys.executable, __file__, "once", *own, *sizes]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                added, seconds = map(float, done.stdout.split())
                share = added / 2**20 / (length / 1024)
                name = f"{kind}, {f'window {window}' if window else 'all keys'}"
                lines.setdefault(name, []).append((length, added / 2**20))
                print(
                    f"| {kind} | {window or 'all'} | {length:,} | {added / 2**20:,.0f} MiB | "
                    f"{share:.1f} MiB | {seconds:.1f} |",
                    flush=True,
                )
                length *= 2
    if arguments.picture is not None:
        draw(lines, arguments)


def draw(lines: dict[str, list[tuple[int, float]]], arguments: argparse.Namespace) -> None:
    """Memory (MiB) against length, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    for (name, points), style in zip(
        lines.items(), ("o-C0", "^--C0", "o-C1", "^--C1"), strict=True
    ):
        axis.loglog(*zip(*points, strict=True), style, label=name)
    lengths = sorted({length for points in lines.values() for length, _ in points})
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.set_yticks(ticks := [50, 100, 200, 500, 1_000, 2_000], [f"{tick:,}" for tick in ticks])
    axis.set(xlabel="tokens in the sequence", ylabel="memory that one pass adds, MiB")
    axis.set_title(
        f"{arguments.layers} layers of {arguments.hidden} units, one CPU process a point"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(arguments.picture)


def times(arguments: argparse.Namespace) -> None:
    """A table of seconds of a pass, windowed and full in turn, medians."""
    print("| pass | length | window 256 | full | full / windowed |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind in ("forward", "training step"):
        length = arguments.shortest
        while length <= arguments.longest_full:
            arguments.length, passes = length, {}
            for window in (WINDOW, 0):
                arguments.window = window
                passes[window] = make_pass(arguments, kind)
            taken: dict[int, list[float]] = {WINDOW: [], 0: []}
            for repeat in range(arguments.repeats + 1):
                for window, run in passes.items():
                    begun = time.perf_counter()
                    run()
                    if repeat:  # the first one is warm-up
                        taken[window].append(time.perf_counter() - begun)
            near, full = (statistics.median(taken[window]) for window in (WINDOW, 0))
            print(
                f"| {kind} | {length:,} | {near:.2f} s | {full:.2f} s | {full / near:.1f} |",
                flush=True,
            )
            length *= 2


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["memory", "time", "once"])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shortest", type=int, default=4_096)
    parser.add_argument("--longest", type=int, default=65_536, help="with a window")
    parser.add_argument("--longest-full", type=int, default=8_192, help="without")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--picture", type=Path, help="file to draw the memory into")
    parser.add_argument("--kind", default="forward")
    parser.add_argument("--window", type=int, default=WINDOW, help="0: none")
    parser.add_argument("--length", type=int, default=4_096)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    {"memory": memory, "time": times, "once": measure_once}[arguments.what](arguments)


if __name__ == "__main__":
    main()
