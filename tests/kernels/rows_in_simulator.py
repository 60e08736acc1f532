"""The compiled twins, executed by `ptxsim`; `test_*.py` runs this file in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ptxsim
import pytest
import torch
from torch import Tensor

from kernels.row_cases import OPS, Case, Shape, assert_obeys_rule, make_case, run
from spanbert_fast.kernels import common, cross_entropy

BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
# Arguments that no launch reads before it has written them, and that it writes whole.
OUTPUTS = {"out_ptr", "dx_ptr", "dresidual_ptr", "dtotal_ptr", "dspan_ptr", "slots_ptr"} | {
    "partial_ptr",
    "loss_ptr",
    "correct_ptr",
}
# They fill in those rows of zeros that have a key.
SPARSE = ("_sum_windows", "_join_windows")
SHORT = {
    80: Shape(35, 136, BRAIN, None, 0.1, unaligned=True, classes=200, label_smoothing=0.1),
    90: Shape(37, 72, HALF, SINGLE, 0.1, classes=200, class_weights=True, label_smoothing=0.1),
}
SWEEP = [
    Shape(rows, size, dtype, parameters, dropout, unaligned, 333, smoothing, weights)
    for rows, size, unaligned, dropout, smoothing, weights in (
        (150, 768, False, 0.1, 0.0, False),
        (67, 264, True, 0.0, 0.1, True),
        (1, 40, False, 0.1, 0.0, True),
    )
    for dtype, parameters in ((BRAIN, None), (BRAIN, SINGLE), (HALF, None), (SINGLE, None))
]
CASES = [
    pytest.param(op, SHORT[target], target, id=f"{op}-{target}-short")
    for target in SHORT
    for op in OPS
    # Without a product the two targets get much the same code; the sweep has them all.
    if target == 80 or op in ("linear_cross_entropy", "span_boundary_hidden")
] + [
    pytest.param(op, shape, target, id=f"{op}-{target}-sweep{index}")
    for target in SHORT
    for index, shape in enumerate(SWEEP)
    for op in OPS
]


@pytest.fixture(autouse=True)
def _fill_empty_tensors_with_nan() -> None:
    torch.use_deterministic_algorithms(True)


def simulate(case: Case, target: int, order: str) -> tuple[list[Tensor], Sequence[Any]]:
    """Results and reports of a forward and a backward pass."""
    options: dict[str, Any] = {"target": target, "order": order, "uninit": list(OUTPUTS)}
    with ptxsim.patched(**options) as reports:
        return run(case, "triton"), reports


@pytest.mark.parametrize(("op", "shape", "target"), CASES)
def test_compiled(op: str, shape: Shape, target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "_ARCHITECTURE_WITHOUT_GPU", target)
    # Several chunks of the vocabulary, and two blocks in each part of it.
    monkeypatch.setattr(cross_entropy, "_SLOPE_BYTES", 1 << 13)
    monkeypatch.setattr(cross_entropy, "_PROGRAMS", 3)
    case = make_case(op, shape)
    ours, reports = simulate(case, target, "forward")
    assert reports
    for report in reports:
        report.check()
        written = set() if report.name in SPARSE else OUTPUTS & report._unwritten.keys()
        for name in written:
            assert report.unwritten(name) == 0, f"{report.name}: {name}"
    assert_obeys_rule(case, ours)
    reverse, _ = simulate(case, target, "reverse")
    for result, other in zip(ours, reverse, strict=True):
        assert torch.equal(result, other), "another order of programs gives other bits"
