"""The whole model's compiled kernels in the simulator; `test_model.py` runs this file."""

import ptxsim
import pytest
import torch

from kernels.whole_model import assert_autocast_is_as_accurate, assert_twins_agree
from spanbert_fast.kernels import common
from spanbert_fast.ops.dispatch import twins_on_cpu


def test_the_whole_model() -> None:
    with ptxsim.patched() as reports, twins_on_cpu():
        assert_twins_agree()
    assert len(reports) > 20
    for report in reports:
        report.check()


@pytest.mark.parametrize("target", [80, 90])
def test_the_whole_model_under_autocast(target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "_ARCHITECTURE_WITHOUT_GPU", target)
    with ptxsim.patched(target=target) as reports, twins_on_cpu():
        assert_autocast_is_as_accurate(torch.bfloat16)
    assert sum(bool(report.check().totals["mma_flops"]) for report in reports) > 6
