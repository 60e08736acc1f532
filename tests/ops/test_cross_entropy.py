"""Product with the vocabulary matrix and cross-entropy in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import BACKWARD, FORWARD, assert_as_accurate, assert_obeys_rule
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from spanbert_fast import ops
from spanbert_fast.ops import cross_entropy, cross_entropy_reference

NUM_MLM, IGNORED = 3, 4
TARGETS = torch.tensor([5, 0, 10, 2, -100, 7, 7, 1])


@pytest.fixture(autouse=True, params=["kept", "computed again", "in chunks"])
def _memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits kept; not kept; not kept and three float64 rows of 11 classes at a time."""
    if request.param != "kept":
        monkeypatch.setattr(cross_entropy, "_KEPT_BYTES", -1)
    if request.param == "in chunks":
        monkeypatch.setattr(cross_entropy_reference, "CHUNK_BYTES", 3 * 11 * 8)


@pytest.fixture(params=["plain", "smoothed", "class weights", "both"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if request.param in ("smoothed", "both"):
        chosen["label_smoothing"] = 0.2
    if request.param in ("class weights", "both"):
        chosen["class_weight"] = torch.rand(11, dtype=torch.float64)
    return chosen


def losses(*inputs: Tensor, targets: Tensor = TARGETS, **options: Any) -> Tensor:
    rows, weight, mlm_bias, sbo_bias = inputs
    return ops.linear_cross_entropy(
        rows, weight, mlm_bias, sbo_bias, NUM_MLM, targets, **options
    ).loss


def logits(rows: Tensor, weight: Tensor, mlm_bias: Tensor, sbo_bias: Tensor) -> Tensor:
    mlm = functional.linear(rows[:NUM_MLM], weight, mlm_bias)
    return torch.cat([mlm, functional.linear(rows[NUM_MLM:], weight, sbo_bias)])


def plain(*inputs: Tensor, class_weight: Tensor | None = None, **options: Any) -> Tensor:
    return functional.cross_entropy(
        logits(*inputs), TARGETS, weight=class_weight, reduction="none", **options
    )


@pytest.fixture
def inputs(doubles: Callable[..., Tensor]) -> list[Tensor]:
    return [doubles(8, 4), doubles(11, 4), doubles(11), doubles(11)]


def test_gradients(inputs: list[Tensor], options: dict[str, Any]) -> None:
    """The gradient that arrives differs from row to row, as gradcheck's own does."""
    row_weight = torch.rand(8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda *leaves: losses(*leaves[:4], row_weight=leaves[4], **options),
        [*inputs, row_weight],
    )


def test_equals_cross_entropy(inputs: list[Tensor], options: dict[str, Any]) -> None:
    result, expected = losses(*inputs, **options), plain(*inputs, **options)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    above = torch.randn(8, dtype=torch.float64)
    ours = torch.autograd.grad(result, inputs, above)
    theirs = torch.autograd.grad(expected, inputs, above)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(losses(*inputs, **options), result)


def test_row_weights_scale_losses_and_gradients(
    inputs: list[Tensor], options: dict[str, Any]
) -> None:
    """Also 0 and negative ones; the prediction is right or wrong whatever the weight."""
    row_weight = torch.tensor([2.0, 0.0, 0.5, -1.0, 3.0, 1.0, 1e-3, 7.0])
    rows, *others = inputs
    result = ops.linear_cross_entropy(
        rows, *others, NUM_MLM, TARGETS, row_weight=row_weight, **options
    )
    expected = plain(*inputs, **options) * row_weight
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-12)
    bare = ops.linear_cross_entropy(rows, *others, NUM_MLM, TARGETS, **options)
    assert torch.equal(result.correct, bare.correct)
    ours = torch.autograd.grad(result.loss.sum(), inputs)
    theirs = torch.autograd.grad(expected.sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_weights_cost_no_pass_over_the_logits(
    inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one more product with the matrix nor one more softmax."""
    calls: list[str] = []
    for name in ("_logits", "_slope"):
        function = getattr(cross_entropy_reference, name)
        monkeypatch.setattr(
            cross_entropy_reference,
            name,
            lambda *arguments, name=name, function=function: (
                calls.append(name) or function(*arguments)
            ),
        )
    counts = []
    for weights in (
        {},
        {"row_weight": torch.rand(8), "class_weight": torch.rand(11), "label_smoothing": 0.1},
    ):
        calls.clear()
        torch.autograd.grad(losses(*inputs, **weights).sum(), inputs)
        counts.append(sorted(calls))
    assert counts[0] == counts[1]
    assert "_slope" in counts[0]


def test_row_weights_keep_the_loss_wide() -> None:
    inputs = [torch.randn(8, 64), torch.randn(11, 64) * 0.2, torch.randn(11), torch.randn(11)]
    row_weight = torch.rand(8)

    def ours(*leaves: Tensor) -> Tensor:
        return losses(*leaves, row_weight=row_weight)

    def theirs(*leaves: Tensor) -> Tensor:
        return plain(*leaves) * row_weight

    assert ours(*(value.bfloat16() for value in inputs)).dtype is torch.float32
    assert_obeys_rule(ours, theirs, inputs, torch.bfloat16)


def test_correct_and_ignored_rows(inputs: list[Tensor]) -> None:
    best = logits(*inputs).argmax(-1)
    targets = torch.where(torch.arange(8) % 2 == 0, best, (best + 1) % 11)
    targets[IGNORED] = -7
    rows, *others = inputs
    result = ops.linear_cross_entropy(rows, *others, NUM_MLM, targets, ignore_index=-7)
    assert result.correct.tolist() == [True, False, True, False, False, False, True, False]
    assert result.loss[IGNORED] == 0
    result.loss.sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad[IGNORED], torch.zeros(4, dtype=torch.float64))


def test_first_of_equal_logits_is_the_prediction() -> None:
    zeros = torch.zeros(2, 4), torch.zeros(11, 4), torch.zeros(11), torch.zeros(11)
    result = ops.linear_cross_entropy(*zeros, 1, torch.tensor([0, 1]))
    assert result.correct.tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy(dtype: torch.dtype) -> None:
    inputs = [torch.randn(8, 64), torch.randn(11, 64) * 0.2, torch.randn(11), torch.randn(11)]
    assert_obeys_rule(losses, plain, inputs, dtype)


def test_autocast_is_as_accurate_as_pytorchs() -> None:
    inputs = [torch.randn(8, 64), torch.randn(11, 64) * 0.2, torch.randn(11), torch.randn(11)]
    results = []
    for function, dtype, enabled in (
        (losses, torch.float32, True),
        (plain, torch.float32, True),
        (plain, torch.float64, False),
    ):
        leaves = [value.to(dtype).requires_grad_() for value in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = function(*leaves)
        assert loss.dtype is dtype
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    for index, (ours, theirs, exact) in enumerate(zip(*results, strict=True)):
        factor = BACKWARD if index else FORWARD
        assert_as_accurate(ours, theirs, exact, factor, f"result {index}")


@pytest.mark.parametrize(("num_rows", "num_mlm"), [(0, 0), (5, 5), (5, 0)])
def test_heads_without_rows_get_gradients_of_zero(num_rows: int, num_mlm: int) -> None:
    rows, weight = torch.randn(num_rows, 4), torch.randn(11, 4, requires_grad=True)
    mlm_bias, sbo_bias = (torch.zeros(11, requires_grad=True) for _ in range(2))
    targets = torch.arange(num_rows)
    ops.linear_cross_entropy(
        rows, weight, mlm_bias, sbo_bias, num_mlm, targets
    ).loss.sum().backward()
    assert weight.grad is not None
    assert bool(weight.grad.any()) == (num_rows > 0)
    for bias, count in ((mlm_bias, num_mlm), (sbo_bias, num_rows - num_mlm)):
        assert bias.grad is not None
        assert bool(bias.grad.any()) == (count > 0)


def test_backward_can_run_twice(inputs: list[Tensor]) -> None:
    loss = losses(*inputs).sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, inputs)))


def test_two_threads_give_the_same_bits_every_time() -> None:
    inputs = [torch.randn(40, 32), torch.randn(3000, 32), torch.zeros(3000), torch.zeros(3000)]
    targets = torch.randint(0, 3000, (40,))
    threads, grads = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            leaves = [value.clone().requires_grad_() for value in inputs]
            loss = losses(*leaves, targets=targets)
            grads.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for again in grads[1:]:
        assert all(map(torch.equal, grads[0], again))


def test_wrong_arguments_are_named(inputs: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="num_mlm is 9, allowed is 0 to 8, the rows"):
        ops.linear_cross_entropy(*inputs, 9, TARGETS)
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.5, allowed is 0 to 1"):
        losses(*inputs, label_smoothing=1.5)
    for wrong in (11, -1):
        targets = TARGETS.clone()
        targets[2] = wrong
        with pytest.raises(ValueError, match=f"a target is {wrong}, allowed is 0 to 10, or -100"):
            losses(*inputs, targets=targets)
