"""The guides are true: their Python runs, block after block, and so do the examples they name."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from spanbert_fast.config import Config
from spanbert_fast.data.tokenizer import save_tokenizer
from spanbert_fast.data.wordpiece import train_tokenizer
from spanbert_fast.model.pretrained import Model

ROOT = Path(__file__).resolve().parents[1]
TEXT = "We must work together to keep the peace. I am happy to report to the Congress."


@pytest.fixture
def demo_model(tmp_path: Path) -> Iterator[Path]:
    """A folder in which `demo_output/run/model` is, as after `make demo`, a small SpanBERT."""
    logging.disable_progress_bar()
    disable_progress_bars()
    folder = tmp_path / "demo_output" / "run" / "model"
    tokenizer = train_tokenizer([TEXT], 100)
    save_tokenizer(tokenizer, folder)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    Model(Config(vocab_size=len(tokenizer), num_hidden_layers=1, **shape)).save_pretrained(folder)
    yield tmp_path
    enable_progress_bars()


def run_blocks(name: str, at_least: int) -> dict[str, object]:
    """The names that the Python blocks of a guide leave behind."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)
    assert len(blocks) >= at_least
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_export_guide(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_model)
    run_blocks("export.md", 3)
    written = {path.name for path in (demo_model / "demo_output" / "served").iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json"} <= written


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_python_blocks_run_in_order(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_model)
    names = run_blocks("huggingface.md", 5)
    assert "'mlm_loss', 'sbo_loss'" in capsys.readouterr().out
    assert isinstance(names["sbo"].loss, torch.Tensor)


def test_span_boundaries_train_an_encoder_that_is_no_bert(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--epochs", "3", "--paragraphs", "96"])
    runpy.run_path(str(ROOT / "examples" / "sbo_on_any_encoder.py"), run_name="__main__")
    lines = re.findall(r"mlm_loss ([\d.]+), sbo_loss ([\d.]+)", capsys.readouterr().out)
    assert len(lines) == 3
    for first, last in zip(lines[0], lines[-1], strict=True):
        assert float(last) < float(first) - 0.1
