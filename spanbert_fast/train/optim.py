"""The optimizer, its parameter groups and its schedule."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
EPSILON = 1e-6
REFERENCE_EPSILON = 1e-8
_STATE = ("step", "exp_avg", "exp_avg_sq")


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int) -> float:
    """The rate of update `step`, counted from 0: linear warm-up, then linear decay.

    Update `s < warmup_steps` runs at `peak * (s + 1) / warmup_steps`, so the first one does
    something and the last one of the warm-up runs at the peak. Later updates run at
    `peak * (steps - s) / (steps - warmup_steps)`: the peak once more at `s = warmup_steps`,
    `peak / (steps - warmup_steps)` at the last update, and 0 after it.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * max(0, steps - step) / (steps - warmup_steps)


def parameter_groups(
    model: nn.Module, *, weight_decay: float, decay_all: bool = False
) -> list[dict[str, object]]:
    """Two groups: matrices, which decay, and vectors (biases, norms), which do not.

    Args:
        model: Parameters that need no gradient are left out; tied ones count once.
        weight_decay: Of the first group.
        decay_all: Put everything into the first group, as the reference does.
    """
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if decay_all or parameter.ndim >= 2 else others).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, *, weight_decay: float, reference: bool = False
) -> torch.optim.AdamW:
    """Fused AdamW as the paper sets it; its rate is set before each update.

    Fused, because only that kernel takes `found_inf`: a device flag that turns one update,
    moments included, into nothing.
    """
    return torch.optim.AdamW(
        parameter_groups(model, weight_decay=weight_decay, decay_all=reference),
        lr=0.0,
        betas=BETAS,
        eps=REFERENCE_EPSILON if reference else EPSILON,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let every group run at `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def step_unless(optimizer: torch.optim.AdamW, found_inf: Tensor) -> None:
    """One update, or none where `found_inf` (fp32, 0-dim) is 1; the host does not learn which."""
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    optimizer.step()


def forget_gradients(parameters: Iterable[Tensor]) -> None:
    """Leave no parameter a gradient: `zero_grad` of the optimizer without its bookkeeping."""
    for parameter in parameters:
        parameter.grad = None


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """The optimizer's tensors, called `<state>.<parameter>`, for example `exp_avg.bert...`."""
    return {
        f"{key}.{name}": value
        for name, parameter in named_parameters
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    tensors: dict[str, Tensor],
) -> None:
    """Put back copies of what `optimizer_tensors` gave.

    Raises:
        ValueError: A tensor belongs to no parameter, or a parameter has some of its tensors only.
    """
    left = dict(tensors)
    for name, parameter in named_parameters:
        found = {k: left.pop(f"{k}.{name}") for k in _STATE if f"{k}.{name}" in left}
        if not found:  # the parameter had no gradient yet
            continue
        if missing := [key for key in _STATE if key not in found]:
            raise ValueError(f"the optimizer's {missing[0]} of {name} is missing")
        optimizer.state[parameter] = {
            # The fused kernel wants its counters on the device, too.
            key: value.to(parameter.device, copy=True)
            for key, value in found.items()
        }
    if left:
        raise ValueError(f"the optimizer's {min(left)} belongs to no parameter of this model")
