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

needs_simulator = pytest.mark.skipif(
    not (SIMULATOR / "ptxsim").is_dir(),
    reason="ptxsim is absent: SPANBERT_FAST_PTXSIM names the directory that holds it",
)


def run_tests(name: str, selected: str, *, timeout: int = 280) -> None:
    """Runs those tests of `name`.py whose names match `selected`; all have to pass.

    Triton reads `TRITON_INTERPRET` when a kernel is defined, so one process cannot do both.
    """
    environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    environment.pop("TRITON_INTERPRET", None)
    if name.endswith("in_interpreter"):
        environment["TRITON_INTERPRET"] = "1"
    paths = [ROOT / "tests", ROOT, SIMULATOR, environment.get("PYTHONPATH", "")]
    path = os.pathsep.join(str(each) for each in paths if str(each))
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    options = ["-q", "-x", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += [f"--timeout={timeout}", "-k", selected]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / f"{name}.py")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
