"""A step whose loss or gradient is not finite changes nothing, and ends the run by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_INITIAL_SCALE = 2.0**16
_GROWTH_INTERVAL = 2_000


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a step is infinite or no number.

    The parameters and the optimizer are as they were before that step.
    """

    def __init__(self, step: int, what: str, example_ids: Sequence[int]) -> None:
        self.step = step
        """The bad step, counted from 1."""
        self.what = what
        self.example_ids = tuple(example_ids)
        """Blocks of the micro-batches whose loss is not finite; of the whole step if none is."""
        listed = ", ".join(map(str, self.example_ids[:20]))
        more = len(self.example_ids) - 20
        super().__init__(
            f"step {step}: the {what} is not finite; no parameter was changed by it. "
            f"Example ids: {listed}" + (f" and {more} more" if more > 0 else "")
        )


@dataclass(frozen=True)
class _Verdict:
    step: int
    values: Tensor
    """On the host: the loss of each micro-batch, the norm, and whether the norm may overflow."""
    copied: torch.cuda.Event | None
    example_ids: Sequence[Tensor]


class FinitenessGuard:
    """Judges each step on the device and looks at the verdict one step later.

    The host never waits for the step that it has just launched: the flags travel behind it.
    """

    def __init__(self) -> None:
        self._last: _Verdict | None = None

    def judge(
        self,
        step: int,
        losses: Sequence[Tensor],
        norm: Tensor,
        example_ids: Sequence[Tensor],
        *,
        may_overflow: Tensor | bool = False,
    ) -> Tensor:
        """1.0 where the update must not happen, 0.0 else: fp32, 0-dim, on the device.

        Args:
            step: Counted from 1.
            losses: Of each micro-batch, 0-dim, on the device.
            norm: Global norm of the gradient, 0-dim, on the device.
            example_ids: Of each micro-batch, on the host.
            may_overflow: A gradient that is not finite skips the update but does not end the run,
                because a loss scale will give way.
        """
        values = torch.stack([*losses, norm])
        # Each kernel counts in a short step. What is infinite, minus itself, is no number.
        skip = torch.nan_to_num(values - values, nan=1.0).amax()
        if may_overflow is not False:
            values = torch.cat([values, torch.as_tensor(may_overflow, device=norm.device)[None]])
        values = values.to("cpu", non_blocking=True)
        copied = None
        if norm.device.type == "cuda":
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(norm.device))
        self._last = _Verdict(step, values, copied, example_ids)
        return skip.float()

    def check(self) -> None:
        """Look at the verdict on the last judged step.

        Raises:
            NonFiniteError: It was bad.
        """
        if self._last is None:
            return
        verdict, self._last = self._last, None
        if verdict.copied is not None:
            verdict.copied.synchronize()
        values, num_losses = verdict.values.tolist(), len(verdict.example_ids)
        bad_losses = [not math.isfinite(loss) for loss in values[:num_losses]]
        norm, *may_overflow = values[num_losses:]
        if not any(bad_losses) and (math.isfinite(norm) or any(may_overflow)):
            return
        named = [i for i, is_bad in enumerate(bad_losses) if is_bad] or range(len(bad_losses))
        ids = [example for index in named for example in verdict.example_ids[index].tolist()]
        raise NonFiniteError(verdict.step, "loss" if any(bad_losses) else "gradient", ids)


class LossScale:
    """Keeps fp16 gradients out of underflow: the loss is multiplied, the gradient divided.

    The factor halves when a gradient overflowed and doubles after 2,000 steps without that; it
    lives on the device, so nothing waits. Without `enabled` everything passes unchanged.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self._scale = torch.tensor(_INITIAL_SCALE, device=device)
        self._good_steps = torch.tensor(0, device=device)

    @property
    def may_overflow(self) -> Tensor | bool:
        """Whether there is a factor left to halve."""
        return self._scale > 1 if self.enabled else False

    def multiply(self, loss: Tensor) -> Tensor:
        """The loss to call `backward` on."""
        return loss * self._scale if self.enabled else loss

    def divide(self, parameters: Iterable[Tensor]) -> None:
        """Turn the gradients into those of the unscaled loss."""
        gradients = [p.grad for p in parameters if p.grad is not None] if self.enabled else []
        if gradients:
            torch._foreach_mul_(gradients, 1 / self._scale)

    def update(self, skipped: Tensor) -> None:
        """Adapt the factor to whether the last update was skipped."""
        if self.enabled:
            self._good_steps = torch.where(skipped > 0, 0, self._good_steps + 1)
            grown = self._good_steps == _GROWTH_INTERVAL
            self._scale = self._scale * torch.where(skipped > 0, 0.5, torch.where(grown, 2.0, 1.0))
            self._good_steps = torch.where(grown, 0, self._good_steps)

    def state(self) -> dict[str, float]:
        """JSON values for a checkpoint."""
        return {"scale": float(self._scale), "good_steps": int(self._good_steps)}

    def restore(self, state: dict[str, float]) -> None:
        """Put back what `state` gave."""
        self._scale.fill_(state["scale"])
        self._good_steps.fill_(int(state["good_steps"]))
