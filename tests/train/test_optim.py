"""Schedule, parameter groups and the update that a bad gradient cannot touch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from spanbert_fast.train import optim


def rates(peak: float, warmup: int, steps: int) -> list[float]:
    return [
        optim.learning_rate(step, peak=peak, warmup_steps=warmup, steps=steps)
        for step in range(steps)
    ]


def test_schedule_rises_from_above_zero_to_the_peak_and_falls_towards_zero() -> None:
    assert rates(8.0, 4, 8) == [2.0, 4.0, 6.0, 8.0, 8.0, 6.0, 4.0, 2.0]
    assert optim.learning_rate(8, peak=8.0, warmup_steps=4, steps=8) == 0.0


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert rates(1.0, 0, 4) == [1.0, 0.75, 0.5, 0.25]


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def test_only_matrices_decay_and_a_tied_one_counts_once() -> None:
    model = layers()
    model[1].bias.requires_grad_(False)
    decayed, others = optim.parameter_groups(model, weight_decay=0.01)
    assert decayed["params"] == [model[0].weight]
    assert decayed["weight_decay"] == 0.01
    assert [id(p) for p in others["params"]] == [
        id(p) for p in (model[0].bias, model[1].weight, model[2].bias)
    ]
    assert others["weight_decay"] == 0.0


def test_reference_optimizer_decays_everything_with_its_epsilon() -> None:
    groups = optim.build_optimizer(layers(), weight_decay=0.01, reference=True).param_groups
    assert [len(group["params"]) for group in groups] == [5, 0]
    assert groups[0]["eps"] == 1e-8
    assert optim.build_optimizer(layers(), weight_decay=0.01).param_groups[0]["eps"] == 1e-6


def test_update_equals_the_formula() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    model = nn.Module()
    model.register_parameter("weight", weight)
    optimizer = optim.build_optimizer(model, weight_decay=0.1)
    optim.set_learning_rate(optimizer, 0.5)
    weight.grad = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    optim.step_unless(optimizer, torch.tensor(0.0))
    for value, start, gradient in zip(weight[0], (1.0, -2.0), (0.3, 0.4), strict=True):
        # At the first step the bias-corrected moments are the gradient and its square.
        expected = start * (1 - 0.5 * 0.1) - 0.5 * gradient / (math.sqrt(gradient**2) + 1e-6)
        assert value.item() == pytest.approx(expected, rel=1e-9)


def test_no_parameter_keeps_a_gradient() -> None:
    model = layers()
    model(torch.ones(2, 4)).sum().backward()
    optim.forget_gradients(model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_flagged_update_changes_neither_parameters_nor_moments() -> None:
    model = layers()
    optimizer = optim.build_optimizer(model, weight_decay=0.01)
    optim.set_learning_rate(optimizer, 0.1)
    model(torch.ones(2, 4)).square().sum().backward()
    optim.step_unless(optimizer, torch.tensor(0.0))

    def everything() -> dict[str, torch.Tensor]:
        named = dict(model.named_parameters())
        tensors = optim.optimizer_tensors(optimizer, named.items())
        return {k: v.detach().clone() for k, v in (named | tensors).items()}

    before = everything()
    model[0].weight.grad[0, 0] = math.nan
    optim.step_unless(optimizer, torch.tensor(1.0))
    after = everything()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model[0].weight.grad.zero_()
    optim.step_unless(optimizer, torch.tensor(0.0))
    assert not torch.equal(before["0.weight"], model[0].weight)


def test_optimizer_tensors_return_to_their_parameters() -> None:
    model, twin = layers(), layers()
    first = optim.build_optimizer(model, weight_decay=0.01)
    second = optim.build_optimizer(twin, weight_decay=0.01)
    data = torch.randn(3, 4)
    for optimizer, module, restored in ((first, model, False), (second, twin, True)):
        optim.set_learning_rate(optimizer, 0.1)
        if restored:
            tensors = optim.optimizer_tensors(first, model.named_parameters())
            optim.load_optimizer_tensors(second, twin.named_parameters(), tensors)
            twin.load_state_dict(model.state_dict())
        for _ in range(1 if restored else 2):
            optimizer.zero_grad()
            module(data).square().sum().backward()
            optim.step_unless(optimizer, torch.tensor(0.0))
    optim.step_unless(first, torch.tensor(1.0))
    model_again = optim.optimizer_tensors(first, model.named_parameters())
    twin_again = optim.optimizer_tensors(second, twin.named_parameters())
    assert twin_again["step.0.weight"] == model_again["step.0.weight"] + 1


def test_foreign_or_partial_optimizer_tensors_are_refused() -> None:
    model = layers()
    optimizer = optim.build_optimizer(model, weight_decay=0.01)
    model(torch.ones(2, 4)).sum().backward()
    optim.step_unless(optimizer, torch.tensor(0.0))
    tensors = optim.optimizer_tensors(optimizer, model.named_parameters())
    with pytest.raises(ValueError, match=r"exp_avg\.other belongs to no parameter"):
        optim.load_optimizer_tensors(
            optimizer, model.named_parameters(), {**tensors, "exp_avg.other": torch.zeros(1)}
        )
    del tensors["exp_avg_sq.0.weight"]
    with pytest.raises(ValueError, match=r"exp_avg_sq of 0\.weight is missing"):
        optim.load_optimizer_tensors(optimizer, model.named_parameters(), tensors)
