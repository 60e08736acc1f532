"""A step whose loss or gradient is not finite changes nothing, and ends the run by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class NonFiniteError(ArithmeticError):
    """The loss or the gradient of a step is infinite or no number.

    The parameters and the optimizer are as they were before that step.
    """

    def __init__(self, step: int, what: str, example_ids: Sequence[int]) -> None:
        self.step = step
        """The bad step, counted from 1."""
        self.what = what
        self.example_ids = tuple(example_ids)
        """Blocks of the micro-batches whose loss is not finite; of the whole step if all are."""
        listed = ", ".join(map(str, self.example_ids[:20]))
        more = len(self.example_ids) - 20
        super().__init__(
            f"step {step}: the {what} is not finite; no parameter was changed by it. "
            f"Example ids: {listed}" + (f" and {more} more" if more > 0 else "")
        )


@dataclass(frozen=True)
class _Verdict:
    step: int
    flags: Tensor
    """[1 + micro-batches] on the host: the step is bad; the loss of a micro-batch is bad."""
    copied: torch.cuda.Event | None
    example_ids: tuple[tuple[int, ...], ...]


class FinitenessGuard:
    """Judges each step on the device and looks at the verdict one step later.

    The host never waits for the step that it has just launched: the flags travel behind it.
    """

    def __init__(self) -> None:
        self._last: _Verdict | None = None

    def judge(
        self,
        step: int,
        losses: Tensor,
        norm: Tensor,
        example_ids: Sequence[Sequence[int]],
        *,
        norm_may_overflow: bool = False,
    ) -> Tensor:
        """1.0 where the update must not happen, 0.0 else: fp32, 0-dim, on the device.

        Args:
            step: Counted from 1.
            losses: [micro-batches], on the device.
            norm: Global norm of the gradient, 0-dim, on the device.
            example_ids: Of each micro-batch.
            norm_may_overflow: A scaler watches the norm; judge the losses alone.
        """
        bad_losses = ~torch.isfinite(losses)
        bad = bad_losses.any()
        if not norm_may_overflow:
            bad = bad | ~torch.isfinite(norm)
        flags = torch.cat([bad[None], bad_losses]).to("cpu", non_blocking=True)
        copied = None
        if losses.device.type == "cuda":
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(losses.device))
        self._last = _Verdict(step, flags, copied, tuple(tuple(ids) for ids in example_ids))
        return bad.float()

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
        bad, *bad_losses = verdict.flags.tolist()
        if not bad:
            return
        named = [i for i, is_bad in enumerate(bad_losses) if is_bad] or range(len(bad_losses))
        ids = [example for index in named for example in verdict.example_ids[index]]
        raise NonFiniteError(verdict.step, "loss" if any(bad_losses) else "gradient", ids)
