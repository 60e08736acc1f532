"""What the tests of the converters share."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from spanbert_fast.convert import fairseq, unpickle, weights


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of `unpickle.main` in this process must not put limits on it."""
    monkeypatch.setattr(unpickle, "limit_memory", lambda num_bytes: None)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Does the work of the separate process in this one, for tests of what happens after it."""

    def read(path: Path, *, timeout_seconds: float) -> tuple[dict[str, Tensor], list[str]]:
        assert timeout_seconds > 0
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        target = tmp_path / "read.safetensors"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert unpickle.main(1 << 30, str(path), str(target)) == 0
        tensors = load_file(target)
        target.unlink()
        return tensors, json.loads(printed.getvalue())

    monkeypatch.setattr(fairseq, "read_pickled_tensors", read)
    monkeypatch.setattr(weights, "read_pickled_tensors", read)
