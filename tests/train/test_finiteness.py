"""A bad step is flagged at once and named one step later; fp16 has a scale that gives way first."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from spanbert_fast.train.finiteness import FinitenessGuard, LossScale, NonFiniteError

IDS = [torch.tensor([1, 2]), torch.tensor([3])]
CPU = torch.device("cpu")


def test_finite_steps_pass() -> None:
    guard = FinitenessGuard()
    guard.check()
    assert guard.judge(1, torch.tensor([1.0, 2.0]), torch.tensor(3.0), IDS).item() == 0.0
    guard.check()
    guard.check()


def test_the_largest_losses_together_are_still_finite() -> None:
    guard, largest = FinitenessGuard(), torch.tensor(torch.finfo(torch.float32).max)
    assert guard.judge(1, [largest, largest], largest, IDS).item() == 0.0
    guard.check()


class Calls(TorchFunctionMode):
    """Names every function of torch that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "__get__":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_judging_takes_few_kernels() -> None:
    guard, losses, norm = FinitenessGuard(), [torch.tensor(1.0)], torch.tensor(2.0)
    with Calls() as seen:
        guard.judge(1, losses, norm, IDS[:1])
    # To the host and to fp32 there is nothing to do on a CPU in fp32.
    assert set(seen.names) == {"stack", "sub", "nan_to_num", "amax", "to", "float"}
    assert len(seen.names) == 6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_names_its_micro_batch(bad: float) -> None:
    guard = FinitenessGuard()
    flag = guard.judge(7, torch.tensor([1.0, bad]), torch.tensor(bad), IDS)
    assert flag.item() == 1.0
    assert flag.dtype == torch.float32
    with pytest.raises(NonFiniteError, match=r"step 7: the loss .* ids: 3$") as caught:
        guard.check()
    assert caught.value.step == 7
    assert caught.value.example_ids == (3,)


def test_a_bad_gradient_names_the_whole_step() -> None:
    guard = FinitenessGuard()
    assert guard.judge(2, torch.tensor([1.0, 2.0]), torch.tensor(math.nan), IDS).item() == 1.0
    with pytest.raises(NonFiniteError, match=r"the gradient .* ids: 1, 2, 3$"):
        guard.check()


def test_a_long_list_of_ids_is_cut_in_the_message_only() -> None:
    error = NonFiniteError(1, "loss", range(100))
    assert str(error).endswith("19 and 80 more")
    assert len(error.example_ids) == 100


def test_an_overflow_under_a_loss_scale_skips_but_does_not_stop() -> None:
    guard, scale = FinitenessGuard(), LossScale(CPU, enabled=True)
    losses = torch.tensor([1.0, 2.0])
    for _ in range(16):
        skip = guard.judge(2, losses, torch.tensor(math.inf), IDS, may_overflow=scale.may_overflow)
        assert skip.item() == 1.0
        guard.check()
        scale.update(skip)
    assert scale.state() == {"scale": 1.0, "good_steps": 0}
    guard.judge(3, losses, torch.tensor(math.inf), IDS, may_overflow=scale.may_overflow)
    with pytest.raises(NonFiniteError, match="step 3: the gradient"):
        guard.check()


def test_a_bad_loss_stops_under_a_loss_scale_too() -> None:
    guard, scale = FinitenessGuard(), LossScale(CPU, enabled=True)
    losses = torch.tensor([1.0, math.inf])
    guard.judge(2, losses, torch.tensor(1.0), IDS, may_overflow=scale.may_overflow)
    with pytest.raises(NonFiniteError, match="the loss"):
        guard.check()


def test_a_loss_scale_changes_no_gradient_and_grows() -> None:
    scale = LossScale(CPU, enabled=True)
    weight = torch.tensor([3.0], requires_grad=True)
    scale.multiply((weight**2).sum()).backward()
    scale.divide([weight, torch.zeros(1)])
    assert weight.grad is not None
    assert weight.grad.item() == 6.0
    scale.restore({"scale": 8.0, "good_steps": 1_999})
    scale.update(torch.tensor(0.0))
    assert scale.state() == {"scale": 16.0, "good_steps": 0}


def test_a_loss_scale_that_is_off_does_nothing() -> None:
    scale = LossScale(CPU, enabled=False)
    loss = torch.tensor(2.0)
    assert scale.multiply(loss) is loss
    before = scale.state()
    scale.update(torch.tensor(1.0))
    assert scale.state() == before
    assert scale.may_overflow is False
