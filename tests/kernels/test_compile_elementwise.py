"""Kernels that work on rows, compiled ahead of time; their traffic; offsets beyond 2^31."""

from __future__ import annotations

from kernels.in_process import needs_simulator, run_tests


def test_usual_variants() -> None:
    run_tests("rows_compiled", "usual")


def test_number_of_variants() -> None:
    run_tests("rows_compiled", "number")


def test_offsets_beyond_2_31() -> None:
    run_tests("rows_far_in_interpreter", "")


@needs_simulator
def test_traffic() -> None:
    run_tests("rows_traffic", "")
