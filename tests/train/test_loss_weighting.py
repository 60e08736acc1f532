"""Loss weights in a run: off by default, exact under accumulation and resume, told to the user."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spanbert_fast.batch import PackedBatch
from spanbert_fast.data.loss_weighting import LossWeighting
from spanbert_fast.train import pretrain, run
from spanbert_fast.train.events import CheckpointSaved, Event, RunStarted
from spanbert_fast.train.machine import machine_settings, only_user
from spanbert_fast.train.metrics import read_metrics
from spanbert_fast.train.options import PretrainOptions, resolve

MakeOptions = Callable[..., PretrainOptions]
WEIGHTING = {"sequence_length": 1, "span_length": 0.5, "inverse_frequency": 0.5}


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def stop_after(step: int) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == step:
            raise Interrupted

    return on_event


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def built(options: PretrainOptions) -> run.Run:
    settings = resolve(options)[0]
    with only_user(settings.output), machine_settings(1):
        result = run.build_run(settings, lambda _: None, allow_inexact_resume=False)
        result.log.close()
    return result


def first_step(options: PretrainOptions) -> tuple[run.Run, list[PackedBatch]]:
    """A run in float64, and the micro-batches of its first step of some size."""
    made = built(options)
    made.model.double()
    steps = made.steps()
    step = next(step for step in steps if len(step.example_ids) >= 4)
    steps.close()
    assert len(step.micro_batches) == made.settings.micro_batches
    return made, step.micro_batches


def gradients(options: PretrainOptions) -> dict[str, torch.Tensor]:
    made, batches = first_step(options)
    num_sbo = sum(len(batch.sbo_targets) for batch in batches)
    seed = torch.tensor(1)
    for batch in batches:
        output = made.model.forward_packed(batch, dropout_seed=seed, num_sbo_items=num_sbo)
        output.loss.backward()
    named = made.model.named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


@pytest.mark.parametrize("normalization", ["tokens", "reference"])
def test_accumulation_does_not_change_the_gradient(
    normalization: str, options: MakeOptions, tmp_path: Path
) -> None:
    shape = options(tmp_path).model | {"loss_normalization": normalization}
    changes: dict[str, Any] = {"weighting": WEIGHTING, "model": shape}
    whole = gradients(options(tmp_path / "1", micro_batches=1, **changes))
    parts = gradients(options(tmp_path / "4", micro_batches=4, **changes))
    plain = gradients(options(tmp_path / "plain", micro_batches=1, model=shape))
    assert whole.keys() == parts.keys() == plain.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=0, atol=1e-9)
    decoder = "bert.embeddings.word_embeddings.weight"
    assert (whole[decoder] - plain[decoder]).norm() > 0.05 * plain[decoder].norm()


def test_the_loss_is_weighted_and_the_two_means_are_not(
    options: MakeOptions, tmp_path: Path
) -> None:
    shape = options(tmp_path).model | {"sbo_weight": 0.5}
    made, (batch,) = first_step(
        options(tmp_path / "run", micro_batches=1, weighting=WEIGHTING, model=shape)
    )
    made.model.eval()
    output = made.model.forward_packed(batch)
    scores = made.model.score_packed(batch)
    rows = torch.cat([scores.mlm_loss, 0.5 * scores.sbo_loss])
    assert batch.row_weights is not None
    assert len(scores.sbo_loss) > 0
    expected = (rows * batch.row_weights).sum() / len(scores.mlm_loss)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.mlm_loss, scores.mlm_loss.mean())
    torch.testing.assert_close(output.sbo_loss, scores.sbo_loss.mean())
    plain = dataclasses.replace(batch, row_weights=None)
    ones = dataclasses.replace(batch, row_weights=torch.ones(len(rows)))
    assert made.model.forward_packed(ones).loss == made.model.forward_packed(plain).loss
    wrong = dataclasses.replace(batch, row_weights=torch.ones(1))
    with pytest.raises(ValueError, match=rf"one weight for each of {len(rows)} targets.*\(1,\)"):
        made.model.forward_packed(wrong)


@pytest.fixture(scope="module")
def weighted(options: MakeOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with weights."""
    output = tmp_path_factory.mktemp("weighted") / "run"
    pretrain.pretrain(options(output, weighting=WEIGHTING))
    return output


def test_resumed_run_equals_an_uninterrupted_one(
    weighted: Path, options: MakeOptions, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    for step in (4, 8):
        with pytest.raises(Interrupted):
            pretrain.pretrain(options(parts, weighting=WEIGHTING), on_event=stop_after(step))
    events: list[Event] = []
    pretrain.pretrain(options(parts, weighting=WEIGHTING), on_event=events.append)
    assert isinstance(events[0], RunStarted)
    assert events[0].start_step == 8
    assert events[0].weighting == (
        "sequence_length 1, span_length 0.5, inverse_frequency 0.5, frequency_cap 10"
    )
    left, right = weights(weighted), weights(parts)
    assert all(torch.equal(left[name], right[name]) for name in left)
    losses = [
        [line.get("loss") for line in read_metrics(path / "metrics.jsonl")]
        for path in (weighted, parts)
    ]
    assert losses[0] == losses[1]


def test_a_run_says_how_it_was_weighted(weighted: Path) -> None:
    description = json.loads((weighted / "run.json").read_text())
    assert description["settings"]["weighting"] == {
        **{name: float(value) for name, value in WEIGHTING.items()},
        "frequency_cap": 10.0,
    }
    assert description["environment"]["mean_loss_weight"] > 0
    card = (weighted / "model" / "README.md").read_text()
    assert "| weighting | {'sequence_length': 1.0" in card
    assert "| mean_loss_weight | " in card


def test_other_weights_make_a_resume_inexact(
    weighted: Path, options: MakeOptions, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(weighted, output)
    for changes in ({}, {"weighting": WEIGHTING | {"span_length": 1}}):
        with pytest.raises(ValueError, match=r"not exact: .*mean_loss_weight was .*weighting was"):
            pretrain.pretrain(options(output, **changes))


def test_a_checkpoint_from_before_there_were_weights_goes_on(
    options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings_of_then(self: Any) -> dict[str, Any]:
        return {k: v for k, v in as_json(self).items() if k != "weighting"}

    as_json = run.Settings.as_json
    monkeypatch.setattr(run.Settings, "as_json", settings_of_then)
    with pytest.raises(Interrupted):
        pretrain.pretrain(options(tmp_path), on_event=stop_after(4))
    monkeypatch.undo()
    assert not (tmp_path / "model").exists()
    pretrain.pretrain(options(tmp_path))
    assert (tmp_path / "model").is_dir()


def test_weights_come_from_file_and_command_line(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("[weighting]\nsequence_length = 1\nspan_length = 1\n")
    given: dict[str, Any] = {"data": Path("d"), "output": Path("o"), "config": config}
    settings = resolve(PretrainOptions(**given, weighting={"span_length": 0.5}))[0]
    assert settings.weighting == LossWeighting(sequence_length=1.0, span_length=0.5)
    with pytest.raises(ValueError, match=r"weighting knows sequence_length.*got sequences"):
        PretrainOptions(**given, weighting={"sequences": 1})
    config.write_text("[weighting]\nspan_length = 9\n")
    with pytest.raises(ValueError, match=r"weighting span_length must be in .*got 9"):
        resolve(PretrainOptions(**given))
