"""A compiled model trains as a plain one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spanbert_fast.train.events import Progress
from spanbert_fast.train.options import PretrainOptions
from spanbert_fast.train.pretrain import pretrain


@pytest.mark.slow
def test_a_compiled_model_has_the_same_losses(
    options: Callable[..., PretrainOptions], tmp_path: Path
) -> None:
    found = []
    for is_compiled in (False, True):
        losses: list[float] = []

        def keep(event: object, losses: list[float] = losses) -> None:
            if isinstance(event, Progress):
                losses.append(event.loss)

        pretrain(options(tmp_path / str(is_compiled), compile=is_compiled, steps=6), on_event=keep)
        found.append(losses)
    plain, compiled = found
    assert compiled == pytest.approx(plain, rel=1e-4)
