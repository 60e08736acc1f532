"""Tiny models and batches that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.utils import logging

from spanbert_fast.config import Config
from spanbert_fast.model.pretrained import Model

LENGTHS = (14, 9, 14, 5)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture
def config() -> Config:
    """Two small layers, no dropout."""
    return Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_span_targets=5,
        span_position_embedding_size=8,
        initializer_range=0.2,
    )


@pytest.fixture
def model(config: Config) -> Model:
    """Random weights, fp64, evaluation mode; biases and norms are not at their initial 0 and 1."""
    model = Model(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def padded() -> dict[str, Tensor]:
    """Four ragged rows with labels and spans, in Hugging Face's shapes."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    ids = torch.randint(5, 64, shape, generator=generator)
    mask = (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    # An uneven number of labels per row: a mean of means would show.
    chance = torch.tensor([0.8, 0.1, 0.3, 0.5])[:, None]
    is_label = (torch.rand(shape, generator=generator) < chance) & (mask == 1)
    none = [-1, -1]
    spans = torch.tensor(
        [
            [[1, 3], [5, 9], [8, 12]],
            [[2, 4], none, none],
            [[0, 6], [7, 9], none],
            [none, none, none],
        ]
    )
    targets = torch.full((4, 3, 5), -100)
    for row, span in (spans[..., 0] >= 0).nonzero().tolist():
        left, right = spans[row, span].tolist()
        targets[row, span, : right - left - 1] = ids[row, left + 1 : right]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
        "labels": torch.where(is_label, ids, -100),
        "sbo_spans": spans,
        "sbo_targets": targets,
    }


@pytest.fixture
def gradients() -> Callable[[Model], dict[str, Tensor]]:
    """All gradients by name, after checking that there are some for every parameter."""

    def collect(model: Model) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in model.named_parameters()}
        assert [name for name, grad in found.items() if grad is None] == []
        return {name: grad.clone() for name, grad in found.items() if grad is not None}

    return collect
