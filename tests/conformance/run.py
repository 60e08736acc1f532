"""Runs the whole suite for every locked version: `python tests/conformance/run.py`.

Prints a table of counts per version and set of classes, writes them with the reasons of all skips
to `build/conformance/results.json`, and fails if one test failed or one suite is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from conformance.fetch import ROOT, folder_of, locked  # noqa: E402  (the path comes first)

SUITES = {"sf.Model": "test_model_suite.py", "patched BERT": "test_patched_suite.py"}
COLUMNS = ("passed", "subtests", "skipped", "by contract", "failed")
RESULTS = ROOT / "build" / "conformance" / "results.json"


class Tally:
    """Counts outcomes while pytest runs; a plugin."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.counts["failed"] += 1
        elif hasattr(report, "context"):  # one subtest; those skipped are in no total
            self.counts["subtests"] += report.passed
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.counts["by contract" if reason.startswith("contract: ") else "skipped"] += 1
            self.reasons[reason] += 1
        elif report.when == "call":
            self.counts["passed"] += 1

    def pytest_collectreport(self, report: Any) -> None:
        # A suite that cannot be collected, or skips itself as a whole, has proven nothing.
        self.counts["failed"] += report.outcome != "passed"


def run_one(file: str, results: Path) -> int:
    """Runs one suite in this process and writes its counts."""
    tally = Tally()
    arguments = ["-q", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider", "--tb=short"]
    code = pytest.main([*arguments, "-r", "fE", str(HERE / file)], plugins=[tally])
    results.write_text(json.dumps({"counts": tally.counts, "reasons": tally.reasons}))
    return int(code)


def run_suite(version: str, file: str) -> dict[str, Any]:
    """Runs one suite under one version of transformers, in a process of its own."""
    site = folder_of(version) / "site"
    if not site.is_dir():
        sys.exit(f"{site} is not there: the suite of transformers {version} was not fetched")
    results = site.parent / f"{file}.json"
    results.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    command = [sys.executable, __file__, "--file", file, "--results", str(results)]
    code = subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
    found: dict[str, Any] = json.loads(results.read_text())
    if code and not found["counts"].get("failed"):
        sys.exit(f"pytest ended with {code} on {file} under transformers {version}")
    return found


def main() -> None:
    """Runs everything, or with `--file` one suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.file:
        sys.exit(run_one(asked.file, asked.results))
    found = {
        version: {classes: run_suite(version, file) for classes, file in SUITES.items()}
        for version in locked()["transformers"]
    }
    RESULTS.write_text(json.dumps(found, indent=2))
    print(f"| transformers | classes | {' | '.join(COLUMNS)} |")
    print("| --- " * (2 + len(COLUMNS)) + "|")
    failed = 0
    for version, suites in found.items():
        for classes, result in suites.items():
            numbers = [result["counts"].get(column, 0) for column in COLUMNS]
            print(f"| {version} | {classes} | {' | '.join(map(str, numbers))} |")
            failed += numbers[-1]
    if failed:
        sys.exit(f"{failed} tests of Hugging Face's suite failed")


if __name__ == "__main__":
    main()
