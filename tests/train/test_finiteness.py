"""A bad step is flagged at once and named one step later."""

from __future__ import annotations

import math

import pytest
import torch

from spanbert_fast.train.finiteness import FinitenessGuard, NonFiniteError

IDS = [[1, 2], [3]]


def test_finite_steps_pass() -> None:
    guard = FinitenessGuard()
    guard.check()
    assert guard.judge(1, torch.tensor([1.0, 2.0]), torch.tensor(3.0), IDS).item() == 0.0
    guard.check()
    guard.check()


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


def test_a_scaler_may_watch_the_norm_instead() -> None:
    guard = FinitenessGuard()
    losses = torch.tensor([1.0, 2.0])
    flag = guard.judge(2, losses, torch.tensor(math.inf), IDS, norm_may_overflow=True)
    assert flag.item() == 0.0
    guard.check()


def test_a_long_list_of_ids_is_cut_in_the_message_only() -> None:
    error = NonFiniteError(1, "loss", range(100))
    assert str(error).endswith("19 and 80 more")
    assert len(error.example_ids) == 100
