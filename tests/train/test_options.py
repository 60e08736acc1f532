"""Command line wins over file, file over preset, preset over defaults; mistakes are named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from spanbert_fast.train.options import EvaluateOptions, PretrainOptions, Settings, resolve
from spanbert_fast.train.presets import RECIPES


def settings(**given: Any) -> Settings:
    return resolve(PretrainOptions(data=Path("data"), output=Path("run"), **given))[0]


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("preset", "rate", "batch", "steps"),
    [("base", 5e-4, 2048 * 512, 300_000), ("large", 1e-4, 256 * 512, 2_400_000)],
)
def test_presets_are_the_published_recipes(
    preset: Any, rate: float, batch: int, steps: int
) -> None:
    found = settings(preset=preset)
    assert (found.learning_rate, found.global_batch_tokens, found.steps) == (rate, batch, steps)
    assert (found.warmup_steps, found.weight_decay, found.clip_norm) == (10_000, 0.01, 1.0)


def test_nothing_given_is_the_tiny_preset() -> None:
    found = settings()
    assert found.preset == "tiny"
    assert found.learning_rate == RECIPES["tiny"].learning_rate
    assert found.threads == 1


def test_torch_chooses_the_threads_of_the_others() -> None:
    assert settings(preset="small").threads == torch.get_num_threads()
    assert settings(preset="small", threads=3).threads == 3


def test_command_line_wins_over_file_wins_over_preset(tmp_path: Path) -> None:
    config = toml(
        tmp_path,
        'preset = "small"\nsteps = 700\nwarmup_steps = 30\nseed = 5\ncompile = true\n'
        'output = "elsewhere"\n[model]\nhidden_size = 64\nnum_hidden_layers = 1\n'
        "[masking]\nmask_ratio = 0.2\n",
    )
    found = settings(
        config=config, seed=9, compile=False, model={"hidden_size": 32}, masking={"scheme": "token"}
    )
    assert found.output == Path("run")  # command line
    assert (found.seed, found.compile) == (9, False)
    assert (found.steps, found.warmup_steps) == (700, 30)  # file
    assert found.learning_rate == RECIPES["small"].learning_rate  # preset
    assert found.model == {"hidden_size": 32, "num_hidden_layers": 1}
    assert found.masking == {"mask_ratio": 0.2, "scheme": "token"}


def test_the_shape_of_a_preset_gives_way_to_the_user_and_to_foreign_weights() -> None:
    assert settings().model == RECIPES["tiny"].model
    assert settings(model={"initializer_range": 0.5}).model == (
        dict(RECIPES["tiny"].model) | {"initializer_range": 0.5}
    )
    assert settings(init="folder", model={"sbo_weight": 2.0}).model == {"sbo_weight": 2.0}
    assert settings(preset="base").model == {}


def test_a_file_may_hold_everything(tmp_path: Path) -> None:
    config = toml(tmp_path, 'data = "d"\noutput = "o"\nallow_inexact_resume = true\n')
    found, inexact = resolve(PretrainOptions(config=config))
    assert (found.data, found.output, inexact) == (Path("d"), Path("o"), True)


def test_unknown_keys_are_refused_and_the_known_ones_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'learning_rat'; known are .*learning_rate") as caught:
        settings(config=toml(tmp_path, "learning_rat = 1.0\n"))
    known = {field.name for field in dataclasses.fields(PretrainOptions)} - {"config"}
    assert all(name in str(caught.value) for name in known)
    with pytest.raises(ValueError, match=r"masking knows mask_ratio.*got ratio"):
        settings(config=toml(tmp_path, "[masking]\nratio = 0.1\n"))


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.toml is no TOML file"):
        settings(config=toml(tmp_path, "steps = \n"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": True}, "steps must be an integer"),
        ({"steps": 50}, r"warmup_steps must be below steps \(50\)"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and positive, got nan"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and positive, got 0"),
        ({"clip_norm": "much"}, "clip_norm must be a number, got 'much'"),
        ({"precision": "fp8"}, r"precision must be one of .*'bf16'.*got 'fp8'"),
        ({"preset": "huge"}, r"preset must be one of .*'tiny'.*got 'huge'"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be an integer of at least 1"),
        ({"compile": "yes"}, "compile must be true or false, got 'yes'"),
        ({"eval_every": 2.5}, "eval_every must be an integer"),
    ],
)
def test_wrong_values_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**given)


@pytest.mark.parametrize("missing", ["data", "output"])
def test_a_missing_folder_is_named(missing: str) -> None:
    given = {"data": Path("d"), "output": Path("o")}
    del given[missing]
    with pytest.raises(ValueError, match=f"{missing} must be given"):
        resolve(PretrainOptions(**given))


def test_a_large_step_is_split() -> None:
    assert settings(global_batch_tokens=100_000).micro_batches == 7
    assert settings(global_batch_tokens=100_000, micro_batches=2).micro_batches == 2


def test_evaluation_checks_its_numbers() -> None:
    with pytest.raises(ValueError, match="max_blocks must not be negative, got -1"):
        EvaluateOptions(model="m", data=Path("d"), max_blocks=-1)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        EvaluateOptions(model="m", data=Path("d"), threads=0)
