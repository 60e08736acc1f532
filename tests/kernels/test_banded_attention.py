"""The banded op: the twin against its reference, interpreted, compiled, and in machine code."""

from __future__ import annotations

from kernels.in_process import needs_simulator, run_tests
from spanbert_fast.kernels import banded_attention
from spanbert_fast.kernels.attention import operators


def test_twin_in_the_interpreter() -> None:
    run_tests("banded_in_interpreter", "not tile_size")


@needs_simulator
def test_compiled_kernels() -> None:
    run_tests("banded_in_simulator", "short or byte")


def test_machine_code() -> None:
    run_tests(
        "banded_compiled", "once or (forward-torch.bfloat16-64) or (90 and query-torch.bfloat16-64)"
    )


def test_head_sizes_are_those_that_a_log_sum_exp_comes_from() -> None:
    assert banded_attention.HEAD_SIZES == operators.HEAD_SIZES
