"""The whole model on the Triton twins: the loss and gradients of the reference, dropout on."""

from __future__ import annotations

from kernels.in_process import needs_simulator, run_tests


def test_whole_model_in_the_interpreter() -> None:
    run_tests("model_in_interpreter", "")


@needs_simulator
def test_whole_model_compiled() -> None:
    run_tests("model_in_simulator", "")


def test_the_host_never_waits() -> None:
    run_tests("model_without_sync", "")
