"""Diagnosis: a healthy machine is healthy, folders are recognised, and damage is found by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from spanbert_fast import _core
from spanbert_fast.config import Config
from spanbert_fast.data.options import PrepareOptions
from spanbert_fast.data.prepare import prepare
from spanbert_fast.diagnose import machine
from spanbert_fast.diagnose.folders import recognise, show, verify
from spanbert_fast.kernels import cache
from spanbert_fast.model.pretrained import Model
from spanbert_fast.ops.dispatch import op_names, use_backend
from spanbert_fast.train.checkpoint import save_checkpoint


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    text = "\n\n".join(f"The cat sat on mat {i}. It was glad." for i in range(200))
    (folder / "text.txt").write_text(text)
    output = folder / "data"
    prepare(
        PrepareOptions(
            input=(str(folder / "text.txt"),),
            output=output,
            train_tokenizer=True,
            vocab_size=60,
            seq_length=32,
            validation_permille=100,
            workers=1,
        )
    )
    return output


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """The shards, free to be damaged."""
    for file in shards.rglob("*"):
        target = tmp_path / "data" / file.relative_to(shards)
        if file.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return tmp_path / "data"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = Config.preset("tiny", vocab_size=64, max_position_embeddings=32)
    Model(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {"a": torch.arange(1000.0)}
    state = {"settings": {"steps": 7}, "random": {"cpu": "AAAA"}}
    return save_checkpoint(
        tmp_path / "run" / "checkpoints", 7, weights=tensors, optimizer=tensors, state=state, keep=2
    )


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_doctor_finds_this_machine_healthy() -> None:
    report = machine.doctor()
    assert report.is_healthy, report.checks
    assert len(report.checks) == 5
    assert report.checks[-1].detail.startswith(f"{cache.directory()}, {cache.VARIABLE} is")
    assert report.versions["torch"] == torch.__version__
    assert [choice.op for choice in report.backends] == op_names()
    assert {choice.backend for choice in report.backends} == {
        "triton" if torch.cuda.is_available() else "torch"
    }
    with use_backend("torch"):
        assert {c.reason for c in machine.doctor().backends} == {"backend 'torch' is set"}


def test_doctor_notices_wrong_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "philox4x32", lambda counters, key: np.ones((1, 4), np.uint32))
    report = machine.doctor()
    assert not report.is_healthy
    failed = [check for check in report.checks if not check.passed]
    assert [check.name for check in failed] == ["random bits: published vector"]
    assert "00000001" in failed[0].detail


def test_any_failure_of_a_check_is_reported() -> None:
    check = machine.run_check("division", lambda: str(1 // 0))
    assert not check.passed
    assert check.detail.startswith("ZeroDivisionError")


def test_shards(shards: Path) -> None:
    report = verify(shards)
    assert report.kind == "token shards"
    assert report.is_intact, report.checks
    shown = show(shards)
    assert shown.kind == "token shards"
    assert shown.sections["shards"]["sequence length"] == 32
    assert shown.sections["settings"]["validation_permille"] == 100


def test_every_damaged_shard_file_is_named(copy: Path) -> None:
    flip(copy / "train-00000.arrow", 900)
    flip(copy / "tokenizer" / "tokenizer.json", 100)
    report = verify(copy)
    assert not report.is_intact
    names = {check.name for check in report.checks}
    assert {"train-00000.arrow", "tokenizer/tokenizer.json"} < names
    assert "validation-00000.arrow" not in names


def test_truncated_manifest(copy: Path) -> None:
    manifest = copy / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:500])
    report = verify(copy)
    assert [check.passed for check in report.checks] == [False]
    assert "manifest.json is not a manifest" in report.checks[0].detail
    with pytest.raises(ValueError, match=r"manifest.json is not a manifest"):
        show(copy)


def test_checkpoint_and_run(checkpoint: Path) -> None:
    run = checkpoint.parents[1]
    for path, kind in ((checkpoint, "checkpoint"), (run, "run")):
        report = verify(path)
        assert (report.kind, report.is_intact) == (kind, True)
    assert show(checkpoint).sections["settings"] == {"steps": 7}
    assert "random" not in show(checkpoint).sections
    assert list(show(run).sections["checkpoints"]) == ["step-0000007"]
    flip(checkpoint / "model.safetensors", -1)
    for path in (checkpoint, run):
        [check] = verify(path).checks
        assert not check.passed
        assert "model.safetensors was changed" in check.detail


def test_run_without_anything(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no checkpoint and no model yet"):
        verify(tmp_path)


def test_model(model: Path) -> None:
    report = verify(model)
    assert (report.kind, report.is_intact) == ("model", True)
    shown = show(model).sections
    assert shown["configuration"]["num_hidden_layers"] == 2
    assert "F32" in shown["weights"]["model.safetensors"]


def test_damaged_models(model: Path) -> None:
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert not verify(model).is_intact
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors["bert.encoder.layer.0.output.dense.bias"][3] = torch.inf
    save_file(tensors, weights, metadata={"format": "pt"})
    [check] = verify(model).checks
    assert not check.passed
    assert check.detail == "bert.encoder.layer.0.output.dense.bias holds values that are not finite"
    del tensors["bert.encoder.layer.0.output.dense.bias"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "lacks 1 tensors of the encoder" in verify(model).checks[0].detail


def test_tokenizer_that_does_not_fit_the_model(model: Path, shards: Path) -> None:
    for file in (shards / "tokenizer").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    assert [check.passed for check in verify(model).checks] == [True, True]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 10}))
    assert [check.passed for check in verify(model).checks] == [False, False]


def test_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        recognise(tmp_path / "absent")
    with pytest.raises(ValueError, match="it holds nothing"):
        recognise(tmp_path)
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(ValueError, match=r"it holds holiday.jpg"):
        recognise(tmp_path)
