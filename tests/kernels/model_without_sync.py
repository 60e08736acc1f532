"""The host's side of a training step on fake tensors; `test_model.py` runs this file in a process.

A fake tensor has no values, so whatever would make the host wait for the GPU raises here. Operators
run their real bodies instead of their fake ones; kernels are recorded instead of launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._library.custom_ops import OPDEFS, CustomOpDef
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kernels.row_launches import recorded
from kernels.whole_model import make_batch, make_model
from spanbert_fast import use_backend
from spanbert_fast.batch import PackedBatch
from spanbert_fast.ops.dispatch import op_names, set_backend, twins_on_cpu

KERNELS = {
    "attention_forward",
    "attention_backward_query",
    "attention_backward_key_value",
    "score_vocabulary",
    "gradient_of_rows",
    "gradient_of_weight",
    "_sum_windows",
}


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> list[CustomOpDef]:
    """Our Triton operators, each with its body where `torch.compile` would see its shapes."""
    with use_backend("triton"):
        assert len(op_names()) >= 6
    found = [operator for name, operator in OPDEFS.items() if "triton" in name]
    for operator in found:
        monkeypatch.setattr(operator, "_abstract_fn", operator._init_fn)
    return found


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode, twins_on_cpu():
        set_backend("triton")
        yield mode
        set_backend("auto")


def fake_batch(mode: FakeTensorMode) -> PackedBatch:
    values: dict[str, Any] = {
        name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
        for name, value in vars(BATCH).items()
    }
    return PackedBatch(**values)


BATCH = make_batch()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_never_waits_for_the_gpu(
    operators: list[CustomOpDef], fake: FakeTensorMode, precision: torch.dtype
) -> None:
    model = make_model()
    with recorded() as launches:
        with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
            loss = model.forward_packed(fake_batch(fake)).loss
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert {launch.kernel.__name__ for launch in launches} >= KERNELS
    assert len(operators) >= 14


def test_a_step_that_waits_is_noticed(operators: list[CustomOpDef], fake: FakeTensorMode) -> None:
    body = next(operator for operator in operators if operator._qualname.endswith("attention"))

    def waits(*arguments: Any) -> Any:
        arguments[3].tolist()
        return body._init_fn(*arguments)

    body._abstract_fn = waits
    model = make_model()
    with recorded(), pytest.raises(DataDependentOutputException):
        model.forward_packed(fake_batch(fake))
