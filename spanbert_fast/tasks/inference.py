"""A model as it predicts: no dropout, no gradients, and afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; every module's mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
