"""The compiled kernels of the banded op, executed by `ptxsim`, and the bytes that they move.

`test_banded_attention.py` runs this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ptxsim
import pytest
import torch
from torch import Tensor

from kernels.banded_cases import Case, assert_obeys_rule, run
from spanbert_fast.kernels import banded_attention as banded
from spanbert_fast.kernels import common
from spanbert_fast.ops.dispatch import twins_on_cpu

BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
OUTPUTS = ["near_ptr", "grad_own_ptr", "grad_lse_ptr"]
SHORT = {
    80: Case((37, 0, 1, 30), 2, 64, BRAIN, 20),
    90: Case((9, 60), 3, 64, HALF, 33, unaligned=True),
}
# Lengths, band and alignment: empty and short sequences, no band, bands of one tile and of more.
FORMS: dict[torch.dtype, list[tuple[tuple[int, ...], int, bool]]] = {
    BRAIN: [((0, 1, 127), 9, False), ((70, 1, 2, 60), 70, True)],
    HALF: [((64, 33), 0, True), ((65, 0, 64), 32, False)],
    SINGLE: [((40, 0, 1, 9), 11, True)],
}
SWEEP = [
    Case(lengths, 2, head_size, dtype, band, unaligned)
    for head_size in (32, 64, 128)
    for dtype, forms in FORMS.items()
    for lengths, band, unaligned in forms
]
PARAMETERS = [
    *(pytest.param(case, target, id=f"short-{target}") for target, case in SHORT.items()),
    *(
        pytest.param(case, target, id=f"sweep-{target}-{index}")
        for target in SHORT
        for index, case in enumerate(SWEEP)
    ),
]


@pytest.fixture(autouse=True)
def _fill_empty_tensors_with_nan() -> None:
    torch.use_deterministic_algorithms(True)


def simulate(case: Case, target: int, order: str) -> tuple[list[Tensor], Sequence[Any]]:
    """Results and reports of a forward and a backward pass."""
    with ptxsim.patched(target=target, order=order, uninit=OUTPUTS) as reports:
        return run(case, "triton"), reports


@pytest.mark.parametrize(("case", "target"), PARAMETERS)
def test_compiled(case: Case, target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "_ARCHITECTURE_WITHOUT_GPU", target)
    ours, reports = simulate(case, target, "forward")
    assert [report.name for report in reports] == ["banded_forward", *["banded_backward"] * 2]
    for report in reports:
        report.check()
        for name in set(OUTPUTS) & report._unwritten.keys():
            assert report.unwritten(name) == 0, f"{report.name}: {name}"
        if case.dtype is not SINGLE:
            assert report.totals["mma_flops"]
    assert_obeys_rule(case, ours)
    reverse, _ = simulate(case, target, "reverse")
    for result, other in zip(ours, reverse, strict=True):
        assert torch.equal(result, other), "another order of programs gives other bits"


@pytest.mark.parametrize("target", [80, 90])
def test_every_byte_is_fetched_once(target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key, log-sum-exp and band, from and to memory; nothing of the size of all pairs."""
    monkeypatch.setattr(common, "_ARCHITECTURE_WITHOUT_GPU", target)
    num_tokens, num_heads, size, band = 512, 12, 64, 24
    query, key = (torch.randn(num_tokens, num_heads, size).to(BRAIN) for _ in range(2))
    lse = torch.full((num_heads, num_tokens), 9.0)
    cu = torch.tensor([0, 200, 512], dtype=torch.int32)
    with ptxsim.patched(target=target) as reports, twins_on_cpu():
        banded._forward_op(query, key, lse, cu, 0.1, band)
    (report,) = reports
    totals = report.check().totals
    near = 4 * num_tokens * (2 * band + 1)
    rows = 2 * num_tokens * num_heads * (2 * size + 2)
    print(f"sm_{target}: {totals['dram_read']} read, {totals['dram_written']} written, {totals}")
    assert rows <= totals["dram_read"] <= rows + 64
    assert near <= totals["dram_written"] <= near + 64
    assert totals["coalescing"]["load"] >= 0.95
    # Rows of the band are runs of 2 band + 1 numbers that begin anywhere in a sector.
    assert totals["coalescing"]["store"] >= 0.8
