"""The compiled attention kernels, executed by `ptxsim`; `test_attention.py` runs this file."""

from __future__ import annotations

from typing import Any

import ptxsim
import pytest
import torch
from torch import Tensor

from kernels.attention_cases import Case, assert_obeys_rule, run
from spanbert_fast.kernels import common
from spanbert_fast.kernels.attention import operators

BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
OUTPUTS = {
    "forward": ["output_ptr", "lse_ptr"],
    "backward_query": ["delta_ptr", "grad_query_ptr"],
    "backward_key_value": ["grad_key_ptr", "grad_value_ptr"],
}
SHORT = [
    Case((37, 0, 1, 140), 1, 64, BRAIN, 0.1),
    Case((9, 131), 1, 64, HALF, 0.1, window=50, unaligned=True, lse_has_gradient=True),
]
SWEEP = [
    Case(lengths, 2, head_size, dtype, dropout, window, unaligned, bool(window))
    for head_size in (32, 64, 128)
    for dtype in (BRAIN, HALF)
    for lengths, dropout, window, unaligned in (
        ((0, 1, 127), 0.1, None, False),
        ((64, 33), 0.0, 13, True),
        ((257, 1), 0.1, None, True),
        ((300,), 0.5, 70, False),
        ((0, 130, 128), 0.0, None, False),
    )
] + [Case((70, 0, 9), 1, size, SINGLE, 0.1, None, True, True) for size in (32, 64, 128)]
PARAMETERS = [
    pytest.param(case, target, id=f"{name}-{target}-{index}")
    for name, cases in (("short", SHORT), ("sweep", SWEEP))
    for target in (80, 90)
    for index, case in enumerate(cases)
]


def simulate(
    case: Case, target: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Any]]:
    """Results and reports of a forward and a backward pass."""
    launch, reports = operators._launch, []

    def checked(kernel: Any, which: str, *args: Any, **kwargs: Any) -> None:
        with ptxsim.patched(target=target, order=order, uninit=OUTPUTS[which]) as found:
            launch(kernel, which, *args, **kwargs)
        for report in found:
            report.check()
            for name in OUTPUTS[which]:
                assert report.unwritten(name) == 0, f"{which}: {name}"
        reports.extend(found)

    with monkeypatch.context() as patch:
        patch.setattr(operators, "_launch", checked)
        patch.setattr(common, "_ARCHITECTURE_WITHOUT_GPU", target)
        return run(case, "triton"), reports


@pytest.mark.parametrize(("case", "target"), PARAMETERS)
def test_compiled(case: Case, target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)
    ours, reports = simulate(case, target, "forward", monkeypatch)
    assert len(reports) == 3
    assert_obeys_rule(case, ours)
    if case.dtype is not SINGLE:
        assert all(report.totals["mma_flops"] for report in reports)
    reverse, _ = simulate(case, target, "reverse", monkeypatch)
    for result, other in zip(ours, reverse, strict=True):
        assert torch.equal(result, other), "another order of programs gives other bits"
