"""Runs every file of the suite in a process of its own, then writes tables and plots.

A file whose results stand in the folder is not run again: a run that was cut goes on. `--again`
starts anew. The measured sizes and one thread are the default; see `workload.py`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUITE = (
    "training",
    "inference",
    "onnx",
    "heads",
    "floor",
    "dropout",
    "attention",
    "memory",
    "sampler",
    "pretrain",
    "growth",
)
"""The order of importance; `bench_step`, `bench_prepare` and `bench_span_masker` run by name."""
ENDS = ("report.py", "plot.py")


def main() -> int:
    """Runs what is missing; 1 if a file failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE.parent / "build" / "benchmarks")
    parser.add_argument("--again", action="store_true", help="forget the results of before")
    parser.add_argument("--only", nargs="+", choices=SUITE, default=SUITE)
    options = parser.parse_args()
    failed = []
    for name in options.only:
        result = options.output / f"bench_{name}.json"
        if options.again:
            result.unlink(missing_ok=True)
        if result.exists():
            print(f"{result} stands", flush=True)
            continue
        begun = time.perf_counter()
        file = HERE / f"bench_{name}.py"
        command = [sys.executable, "-m", "pytest", str(file), "--benchmark-only", "-q"]
        environment = {"PYTHONPATH": str(HERE.parent)} | dict(os.environ)
        environment["SPANBERT_FAST_BENCH_OUTPUT"] = str(result)
        if subprocess.run(command, env=environment, cwd=HERE.parent).returncode:
            failed.append(name)
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}; the others stand in {options.output}")
        return 1
    ends = ([sys.executable, str(HERE / name), str(options.output)] for name in ENDS)
    return max(subprocess.run(command).returncode for command in ends)


if __name__ == "__main__":
    sys.exit(main())
