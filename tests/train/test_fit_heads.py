"""Heads on a frozen encoder: they learn, it keeps every bit, and the run is like any other."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel

from spanbert_fast.cli import main
from spanbert_fast.config import Config
from spanbert_fast.data.tokenizer import load_tokenizer
from spanbert_fast.model.pretrained import Model
from spanbert_fast.tasks.fill import fill_span
from spanbert_fast.train.fit_heads import fit_heads
from spanbert_fast.train.fit_options import FitHeadsOptions

# True, and the reason why anybody runs this.
pytestmark = pytest.mark.filterwarnings("ignore:.* has no complete MLM and SBO head:UserWarning")
RUN: dict[str, Any] = {
    "steps": 60,
    "global_batch_tokens": 512,
    "log_every": 5,
    "eval_every": 30,
    "save_every": 20,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def encoder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of plain transformers without heads, its dropout on in training."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = Config(
        vocab_size=len(load_tokenizer(shards / "tokenizer")),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.1,
    )
    Model(config).save_pretrained(folder / "ours")
    BertModel.from_pretrained(folder / "ours", add_pooling_layer=False).save_pretrained(
        folder / "bare"
    )
    return folder / "bare"


@pytest.fixture(scope="module")
def fitted(shards: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    fit_heads(FitHeadsOptions(init=str(encoder), data=shards, output=folder, **RUN))
    return folder


def losses(folder: Path, kind: str, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line["kind"] == kind]


def test_both_heads_learn(fitted: Path) -> None:
    """They begin at the unigram law, and have to come below it."""
    for name in ("mlm_loss", "sbo_loss"):
        found = losses(fitted, "train", name)
        assert sum(found[-3:]) / 3 < found[0] - 0.1, name


def test_the_encoder_keeps_every_bit(fitted: Path, encoder: Path) -> None:
    before, after = (
        load_file(folder / "model.safetensors") for folder in (encoder, fitted / "model")
    )
    assert len(before) > 30
    for name, value in before.items():
        assert torch.equal(value, after[f"bert.{name}"]), name


def test_the_folder_fills_spans_and_warns_of_nothing(fitted: Path, encoder: Path) -> None:
    with pytest.warns(UserWarning, match="no complete MLM and SBO head"):
        before = Model.from_pretrained(encoder)
    assert before.config.untrained_heads == ["mlm", "sbo"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Model.from_pretrained(fitted / "model")
    assert model.config.untrained_heads == []
    tokenizer = load_tokenizer(fitted / "model")
    found = fill_span(model, tokenizer, "The quiet [MASK] follows the garden.", head="sbo")
    assert found[0]
    assert "Heads for bare, trained on shards" in (fitted / "model" / "README.md").read_text()


def test_hidden_states_have_no_dropout(shards: Path, encoder: Path, tmp_path: Path) -> None:
    """Another dropout would be another loss of the first step, before anything is learned."""
    first = []
    for number, p in enumerate((0.1, 0.5)):
        source = tmp_path / f"source{number}"
        shutil.copytree(encoder, source)
        config = json.loads((source / "config.json").read_text())
        config |= {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
        (source / "config.json").write_text(json.dumps(config))
        output = tmp_path / f"output{number}"
        options = RUN | {"steps": 1, "log_every": 1, "eval_every": 0}
        fit_heads(FitHeadsOptions(init=str(source), data=shards, output=output, **options))
        first += losses(output, "train", "mlm_loss")
    assert first[0] == first[1]


def test_a_resumed_run_ends_with_the_same_bits(
    fitted: Path, shards: Path, encoder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(fitted, output)
    checkpoints = sorted((output / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    shutil.rmtree(output / "model")
    fit_heads(FitHeadsOptions(init=str(encoder), data=shards, output=output, **RUN))
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (fitted, output))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_command_and_mistakes(
    shards: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"fit-heads --init {encoder} --data {shards} --output {tmp_path}/run --eval-every 0"
    assert main([*words.split(), "--tokens", "600", "--global-batch-tokens", "256"]) == 0
    assert "heads on a frozen encoder" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["steps"] == 3
    other = tmp_path / "other"
    Model(
        Config(
            vocab_size=77,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    ).save_pretrained(other)
    for line, message in (
        (f"--init {other} --data {shards} --output {tmp_path}/a", "77"),
        (f"--init {encoder} --data {tmp_path}/none --output {tmp_path}/a", "none"),
        (f"--init ./none --data {shards} --output {tmp_path}/a", "no such folder: ./none"),
        (f"--init {encoder} --data {shards} --output {tmp_path}/a --steps 1 --tokens 1", "one of"),
        (f"--init {encoder} --data {shards} --output {tmp_path}/a --tokens 0", "at least 1, got 0"),
        (f"--init {encoder} --data {shards} --output {tmp_path}/run --steps 9 --eval-every 0",
         "not exact"),
    ):  # fmt: skip
        assert main(["fit-heads", *line.split()]) == 2
        assert message in capsys.readouterr().err, line
