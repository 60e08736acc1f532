"""The first SBO layer: the twin against its reference, interpreted and compiled."""

from __future__ import annotations

from kernels.in_process import needs_simulator, run_tests

OP = "span_boundary"


def test_twin_in_the_interpreter() -> None:
    run_tests("rows_in_interpreter", OP)


@needs_simulator
def test_compiled_kernels() -> None:
    run_tests("rows_in_simulator", f"{OP} and short")
