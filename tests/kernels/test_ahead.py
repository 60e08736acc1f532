"""The warm-up: what it compiles is all that steps look for, and it lies where it was told to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.in_process import run_tests
from spanbert_fast.cli import main
from spanbert_fast.config import Config
from spanbert_fast.kernels import cache

VARIABLE = "SPANBERT_FAST_TRITON_CACHE"  # its name is documented


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of a small model in `model/`."""
    path = tmp_path_factory.mktemp("warmup")
    Config(
        vocab_size=1003,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=256,
    ).save_pretrained(path / "model")
    return path


@pytest.fixture(scope="module")
def warmed(folder: Path) -> dict[str, Any]:
    """The report of a warm-up of that model into `cache/`."""
    environment = {key: value for key, value in os.environ.items() if "TRITON" not in key}
    environment |= {"OMP_NUM_THREADS": "1", VARIABLE: str(folder / "cache")}
    words = ["warmup", str(folder / "model"), "--arch", "90", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "spanbert_fast", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_report_and_directory(folder: Path, warmed: dict[str, Any]) -> None:
    assert warmed["directory"] == str(folder / "cache")
    assert warmed["cached"] == 0
    binaries = list((folder / "cache").rglob("*.cubin"))
    assert len(binaries) == warmed["compiled"] == sum(k["compiled"] for k in warmed["kernels"])
    kernels = {kernel["kernel"]: kernel for kernel in warmed["kernels"]}
    # Two buckets of training; in evaluation one setting for float32, and two buckets of bf16.
    assert kernels["attention.attention_forward"]["compiled"] == 5
    assert {kernel["arch"] for kernel in warmed["kernels"]} == {90}


def test_steps_of_another_process_find_everything(
    folder: Path, warmed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert warmed["compiled"] > 0
    monkeypatch.setenv(VARIABLE, str(folder / "cache"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    run_tests("ahead_compiled", "")


def test_interpreter_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["warmup", str(folder / "model"), "--arch", "90"]) == 1
    assert capsys.readouterr().err.startswith("error: TRITON_INTERPRET is set")


def test_directory_that_cannot_be_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = str(folder / "model" / "config.json" / "cache")
    monkeypatch.setenv(VARIABLE, wrong)
    message = f"{VARIABLE} is {wrong!r}, allowed is a directory that can be made and written: "
    with pytest.raises(ValueError, match=re.escape(message)):
        cache.use_named_directory()
    assert str(cache.directory()) != wrong


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder / "model"
    mistakes = {
        f"{model} --arch 90 70": "arch is 70, allowed are 80, 86",
        f"{model} --arch 90 --max-length 0": "max_length is 0, allowed is 1 to 256",
        f"{model} --arch 90 --max-length 257": "max_length is 257, allowed is 1 to 256",
        f"{tmp_path} --arch 90": f"{tmp_path} holds no config.json",
    }
    if not torch.cuda.is_available():
        mistakes[str(model)] = "arch must be given where torch sees no CUDA device"
    for words, message in mistakes.items():
        assert main(["warmup", *words.split()]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}"), words
