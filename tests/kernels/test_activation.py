"""Bias, GELU and norm: the twin against its reference, interpreted and compiled."""

from __future__ import annotations

from kernels.in_process import needs_simulator, run_tests

OP = "bias_gelu"


def test_twin_in_the_interpreter() -> None:
    run_tests("rows_in_interpreter", f"{OP} or activation_passes")


@needs_simulator
def test_compiled_kernels() -> None:
    run_tests("rows_in_simulator", f"{OP} and short")
