"""The model that a run begins with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from spanbert_fast.config import HEADS, Config
from spanbert_fast.model.pretrained import Model
from spanbert_fast.train.machine import without_progress_bars
from spanbert_fast.train.options import Settings
from spanbert_fast.train.source import Source


def build_model(settings: Settings, source: Source) -> Model:
    """A model with random weights, or with those of `init`.

    Raises:
        ValueError: A field of the model is unknown, or the model does not fit the data.
    """
    known = {field.name for field in dataclasses.fields(Config)}
    if settings.init:
        known.add("position_extension")  # how the table of `init` gets longer; not of the shape
    if unknown := sorted(set(settings.model) - known):
        raise ValueError(f"model has no field {unknown[0]!r}; known are {', '.join(sorted(known))}")
    source.check_length(settings.seq_length)
    manifest = source.shards.manifest
    if settings.init:
        with without_progress_bars():
            model: Model = Model.from_pretrained(
                settings.init, dtype=torch.float32, **settings.model
            )
        source.check_vocabulary(settings.init, int(model.config.vocab_size))
        if settings.freeze_encoder:
            # The decoder's matrix is the table of word vectors, so it stays as it is, too.
            model.bert.requires_grad_(False)
            if settings.unigram_bias:
                _start_from_unigram_law(model, source, model.config.untrained_heads)
    else:
        fields: dict[str, Any] = {
            "vocab_size": manifest.vocab_size,
            "pad_token_id": manifest.special_token_ids["pad"],
            # A position that no block reaches would keep a random vector.
            "max_position_embeddings": manifest.seq_length,
        }
        model = Model(Config.preset(settings.preset, **(fields | settings.model)))
        if settings.unigram_bias:
            _start_from_unigram_law(model, source, HEADS)
        if model.config.sbo_weight == 0 and "sbo" not in model.config.untrained_heads:
            model.config.untrained_heads.append("sbo")  # random, and nothing will train it
    source.check_positions(int(model.config.max_position_embeddings))
    if settings.activation_checkpointing:
        model.activation_checkpointing_enable()
    return model


@torch.no_grad()
def _start_from_unigram_law(model: Model, source: Source, heads: Iterable[str]) -> None:
    """Give the heads the counts, so that no step and no vector is spent on learning them."""
    counts = source.token_counts().double() + 1
    law = (counts / counts.sum()).log()
    biases = {"mlm": model.cls.predictions.bias, "sbo": model.cls.span_boundary.bias}
    for head in heads:
        biases[head][: len(law)] = law
