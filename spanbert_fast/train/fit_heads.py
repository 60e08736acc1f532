"""Heads for an encoder that was published without: the pre-training loop with a frozen encoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from spanbert_fast.train.events import Event, PretrainSummary
from spanbert_fast.train.fit_options import FitHeadsOptions
from spanbert_fast.train.options import MICRO_BATCH_TOKENS, Settings
from spanbert_fast.train.presets import HEADS
from spanbert_fast.train.pretrain import train

__all__ = ["FitHeadsOptions", "fit_heads"]


def fit_heads(
    options: FitHeadsOptions, *, on_event: Callable[[Event], None] | None = None
) -> PretrainSummary:
    """Train the heads of a BERT, or continue the run that stands in the output folder.

    The encoder, whose word vectors are the decoder's matrix as well, keeps every bit and runs
    without dropout and without a backward pass. What learns: both transforms with their norms, the
    position vectors of the SBO head, and the output biases. Heads that the checkpoint lacks begin
    at the unigram law; heads that it has are trained further. The output folder is that of
    `pretrain`, and so are resuming and failing.

    Args:
        options: What the user chose.
        on_event: Called in this thread with what happens.

    Raises:
        ValueError: An option is out of range, the shards are made with another vocabulary than the
            encoder's or are longer than it, or the run in the output folder is another one.
        NonFiniteError: The loss or the gradient of a step is not finite.
        OSError: The encoder is not there, or the disk is full or fails.
    """
    return train(
        settings_of(options), allow_inexact_resume=options.allow_inexact_resume, on_event=on_event
    )


def settings_of(options: FitHeadsOptions) -> Settings:
    """The settings of a run: what was given wins over the recipe.

    Raises:
        ValueError: An option is out of range.
    """
    names = {field.name for field in dataclasses.fields(Settings)}
    recipe = {k: v for k, v in dataclasses.asdict(HEADS).items() if k in names}
    given = {k: v for k, v in dataclasses.asdict(options).items() if k in names and v is not None}
    values = recipe | {"model": {}, "language": None} | given
    batch = values["global_batch_tokens"]
    if options.tokens is not None:
        values["steps"] = math.ceil(options.tokens / max(1, batch))
    if options.warmup_steps is None:
        values["warmup_steps"] = min(HEADS.warmup_steps, values["steps"] // 10)
    if values["threads"] is None:
        values["threads"] = torch.get_num_threads()
    values.setdefault("micro_batches", max(1, math.ceil(batch / MICRO_BATCH_TOKENS)))
    return Settings(
        **values,
        preset="heads",
        reference_optimizer=False,
        keep_checkpoints=2,
        activation_checkpointing=False,
        compile=False,
        freeze_encoder=True,
    )
