"""Hugging Face's Trainer, which also logs the two losses and keeps masks replayable."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from spanbert_fast.data.collator import SpanMaskingCollator
from spanbert_fast.train.callback import SpanMaskingCallback, innermost

_TARGETS = {"mlm_loss": "labels", "sbo_loss": "sbo_targets"}


class Trainer(transformers.Trainer):
    """`transformers.Trainer` that logs `mlm_loss` and `sbo_loss`, and adds `SpanMaskingCallback`.

    Both are means over all targets since the last log, over all ranks. Nothing else differs: the
    plain Trainer trains `sf.Model` to the same numbers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what `transformers.Trainer` takes."""
        super().__init__(*args, **kwargs)
        self._sums: dict[str, Tensor] = {}
        has_one = any(isinstance(c, SpanMaskingCallback) for c in self.callback_handler.callbacks)
        if not has_one and isinstance(innermost(self.data_collator), SpanMaskingCollator):
            self.add_callback(SpanMaskingCallback())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, as in `transformers.Trainer`."""
        targets = {name: inputs.get(key) for name, key in _TARGETS.items()}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name, ids in targets.items() if model.training else ():
            if ids is not None and isinstance(outputs, dict) and name in outputs:
                count = (ids != -100).sum()
                seen = torch.stack([outputs[name].mean().double() * count, count.double()])
                self._sums[name] = self._sums.get(name, torch.zeros_like(seen)) + seen
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Writes a log entry; one of the training loss gets both losses."""
        if "loss" in logs:
            for name, seen in sorted(self._sums.items()):
                total, count = self.accelerator.reduce(seen, reduction="sum").tolist()
                logs[name] = total / max(count, 1)
            self._sums.clear()
        super().log(logs, start_time)
