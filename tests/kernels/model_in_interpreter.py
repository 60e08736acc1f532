"""The whole model under Triton's interpreter; `test_model.py` runs this file in a process."""

from kernels.whole_model import assert_twins_agree


def test_the_whole_model() -> None:
    assert_twins_agree()
