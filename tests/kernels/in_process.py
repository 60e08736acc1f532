"""Runs tests in a process of their own, with or without Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# A tool beside the project, not a part of it.
SIMULATOR = Path(
    os.environ.get("SPANBERT_FAST_PTXSIM", str(ROOT.parent / "shared" / "tools" / "ptxsim"))
)
HAS_SIMULATOR = (SIMULATOR / "ptxsim").is_dir()
NO_SIMULATOR = "ptxsim is absent: SPANBERT_FAST_PTXSIM names the directory that holds it"
TIMEOUT = 1100  # below that of a test, so that what was printed is shown

needs_simulator = pytest.mark.skipif(not HAS_SIMULATOR, reason=NO_SIMULATOR)


def command(path: Path, *options: str) -> list[str]:
    """The command that runs a file of tests; goes with `environment`."""
    common = ["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return [sys.executable, "-m", "pytest", *common, *options, str(path)]


def environment(name: str) -> dict[str, str]:
    """The environment for the tests of `name`.py.

    Triton reads `TRITON_INTERPRET` when a kernel is defined, so one process cannot do both.
    """
    variables = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    variables.pop("TRITON_INTERPRET", None)
    if name.endswith("in_interpreter"):
        variables["TRITON_INTERPRET"] = "1"
    paths = [ROOT / "tests", ROOT, SIMULATOR, variables.get("PYTHONPATH", "")]
    path = os.pathsep.join(str(each) for each in paths if str(each))
    return variables | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def run_tests(name: str, selected: str) -> None:
    """Runs those tests of `name`.py whose names match `selected`; all have to pass."""
    done = subprocess.run(
        command(HERE / f"{name}.py", "-x", f"--timeout={TIMEOUT}", "-k", selected),
        cwd=ROOT,
        env=environment(name),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
