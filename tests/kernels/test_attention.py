"""Variable-length attention: the twin against its reference, interpreted and compiled."""

from __future__ import annotations

import pytest

from kernels.in_process import needs_simulator, run_tests


def test_twin_in_the_interpreter() -> None:
    run_tests("attention_in_interpreter", "")


@needs_simulator
def test_compiled_kernels() -> None:
    run_tests("attention_in_simulator", "short")


@needs_simulator
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sweep_of_compiled_kernels() -> None:
    run_tests("attention_in_simulator", "sweep", timeout=3600)
