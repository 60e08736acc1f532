"""The rule of accuracy, in one place.

Against a float64 reference, an op may err at most twice (forward) or three times (backward) what
plain PyTorch errs in the same dtype. An error is the root mean square over a tensor: a maximum
would compare the luck of single elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FORWARD, BACKWARD = 2.0, 3.0


def error_of(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).square().mean().sqrt())


def assert_as_accurate(
    result: Tensor, plain: Tensor, exact: Tensor, factor: float, name: str
) -> None:
    # Half a unit in the last place is what rounding an exact result may cost.
    rounding = torch.finfo(result.dtype).eps / 2 * float(exact.square().mean().sqrt())
    error, allowed = error_of(result, exact), max(factor * error_of(plain, exact), rounding)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_obeys_rule(
    op: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """Output and gradients of `op` against `plain`, both in `dtype`, both against float64."""
    rounded = [value.to(dtype) for value in inputs]

    def run(function: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        leaves = [value.to(kind).clone().requires_grad_() for value in rounded]
        output = function(*leaves)
        generator = torch.Generator().manual_seed(1)
        above = torch.randn(output.shape, generator=generator).to(dtype).to(output.dtype)
        return [output.detach(), *torch.autograd.grad(output, leaves, above)]

    exact, ours, theirs = run(plain, torch.float64), run(op, dtype), run(plain, dtype)
    for index, (result, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        name = f"gradient {index - 1}" if index else "output"
        assert_as_accurate(result, other, truth, BACKWARD if index else FORWARD, name)
