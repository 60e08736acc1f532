"""Runs every inner test file, each in a process of its own, and writes the summary.

`make verify-kernels` runs this. Results are kept under `build/verification/`, one JSON file and one
log for each inner file, so that running one again (`--only NAME`) refreshes its rows alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import triton

from kernels.closure import kernel_files
from kernels.in_process import HAS_SIMULATOR, HERE, NO_SIMULATOR, ROOT, command, environment
from kernels.verification import (
    FILES,
    RESULTS,
    SUMMARY,
    Result,
    has_failed,
    hash_of,
    load_results,
    render,
    source_hash,
)

_PROCESSES = 2
_SECONDS_PER_CASE = 3600


def run_file(path: Path, folder: Path) -> Result:
    """The result of all cases of an inner file; kept in `folder`, with a log."""
    name, source, start = path.stem, hash_of(kernel_files(path)), time.monotonic()
    outcomes = folder / f"{name}.outcomes"
    options = ["-p", "kernels.outcomes", f"--outcomes={outcomes}", f"--timeout={_SECONDS_PER_CASE}"]
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(
            command(path, *options), cwd=ROOT, env=environment(name), stdout=log, stderr=log
        )
    lines = outcomes.read_text().splitlines() if outcomes.exists() else []
    cases = [json.loads(line) for line in lines]
    # 0: all passed; 1: some failed, which the cases say.
    is_over = bool(cases) and done.returncode in (0, 1)
    result = {
        "source": source,
        "triton": triton.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": time.monotonic() - start,
        "error": "" if is_over else f"the process ended with {done.returncode}",
        "cases": cases,
    }
    partial = folder / f"{name}.partial"
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(folder / f"{name}.json")
    outcomes.unlink(missing_ok=True)
    return result


def _run_and_tell(name: str) -> Result:
    result = run_file(HERE / f"{name}.py", RESULTS)
    failed = [case["name"] for case in result["cases"] if not case["passed"]]
    verdict = result["error"] or f"{len(result['cases'])} cases, {len(failed)} failed"
    print(f"{name}: {verdict} ({result['seconds']:.0f} s)", *failed, sep="\n  ", flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every file that was asked for ran and passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=FILES, help="may be given again")
    asked = parser.parse_args(arguments).only or list(FILES)
    runnable = [name for name in asked if HAS_SIMULATOR or not FILES[name].needs_simulator]
    RESULTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_PROCESSES) as pool:
        ran = list(pool.map(_run_and_tell, runnable))
    SUMMARY.parent.mkdir(exist_ok=True)
    present = {name: source_hash(name) for name in FILES}
    SUMMARY.write_text(render(load_results(RESULTS), present, has_simulator=HAS_SIMULATOR))
    print(f"summary: {SUMMARY.relative_to(ROOT)}")
    if not HAS_SIMULATOR:
        print(f"The simulator's part is missing: {NO_SIMULATOR}.")
    return int(not HAS_SIMULATOR or any(has_failed(result) for result in ran))


if __name__ == "__main__":
    sys.exit(main())
