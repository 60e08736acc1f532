"""Dropout, residual and layer norm: the twin against its reference, interpreted and compiled."""

from __future__ import annotations

from kernels.in_process import needs_simulator, run_tests

OP = "dropout_add_layer_norm"


def test_twin_in_the_interpreter() -> None:
    run_tests("rows_in_interpreter", f"{OP} or norm_and_embedding or eps or its_arguments")


@needs_simulator
def test_compiled_kernels() -> None:
    run_tests("rows_in_simulator", f"{OP} and short")
