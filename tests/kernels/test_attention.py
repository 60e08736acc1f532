"""Variable-length attention: the twin against its reference, interpreted and compiled."""

from __future__ import annotations

from kernels.in_process import needs_simulator, run_tests


def test_twin_in_the_interpreter() -> None:
    run_tests("attention_in_interpreter", "")


@needs_simulator
def test_compiled_kernels() -> None:
    run_tests("attention_in_simulator", "short")
