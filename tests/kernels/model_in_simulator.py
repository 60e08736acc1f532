"""The whole model's compiled kernels in the simulator; `test_model.py` runs this file."""

import ptxsim

from kernels.whole_model import assert_twins_agree
from spanbert_fast.ops.dispatch import twins_on_cpu


def test_the_whole_model() -> None:
    with ptxsim.patched() as reports, twins_on_cpu():
        assert_twins_agree()
    assert len(reports) > 20
    for report in reports:
        report.check()
