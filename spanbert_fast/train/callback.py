"""The callback that tells a `SpanMaskingCollator` which epoch the Hugging Face Trainer is in."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spanbert_fast.data.collator import SpanMaskingCollator


class SpanMaskingCallback(TrainerCallback):
    """Sets the collator's epoch at each epoch's begin, so that masks can be replayed.

    Epochs count from 0 at the beginning of the training, not of the process: a run that resumes in
    its third epoch masks as one that never stopped.
    """

    def __init__(self, collator: SpanMaskingCollator | None = None) -> None:
        """Builds the callback.

        Args:
            collator: whose epoch to set; by default that of the Trainer's training batches. Needed
                if the Trainer's collator calls it from inside a function of yours.
        """
        self._collator = collator
        self._epoch: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets the epochs of an earlier call of `train`."""
        self._epoch = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the epoch, before the workers begin with it.

        Raises:
            ValueError: the Trainer has another collator, and none was given.
        """
        # Counted from where the run begins: for data without a length, state.epoch is a share of
        # all steps and does not tell passes over the data apart.
        self._epoch = int(state.epoch or 0) if self._epoch is None else self._epoch + 1
        used = innermost(getattr(kwargs.get("train_dataloader"), "collate_fn", None))
        collator = self._collator or used
        if not isinstance(collator, SpanMaskingCollator):
            raise ValueError(
                f"the Trainer's data_collator is a {type(used).__name__}, must be a "
                "SpanMaskingCollator, or give yours: SpanMaskingCallback(collator)"
            )
        collator.set_epoch(self._epoch)


def innermost(collate: object) -> object:
    """What a DataLoader calls, without the Trainer's own wrapping that removes columns."""
    while (wrapped := getattr(collate, "data_collator", None)) is not None:
        collate = wrapped
    return collate
