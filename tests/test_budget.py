"""The plan of a run: its figures are those of the model, and its memory is what a step takes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spanbert_fast.cli import main
from spanbert_fast.config import Config
from spanbert_fast.diagnose.budget import parse_device, plan
from spanbert_fast.diagnose.memory import sample_batch, step_memory
from spanbert_fast.diagnose.options import PlanOptions
from spanbert_fast.model.pretrained import Model
from spanbert_fast.train.metrics import model_flops
from spanbert_fast.train.presets import RECIPES

SHAPE: dict[str, Any] = {
    "vocab_size": 12_000,
    "hidden_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 1_536,
}
SEQUENCES, LENGTH = 8, 256


def one_step_really() -> None:
    """Run by a process of its own: prints what it held before, and its peak."""
    peaks = []
    model: Any = None
    for config, sequences, length in (
        (Config(**SHAPE | {"num_hidden_layers": 1, "vocab_size": 99}), 1, 8),
        (Config(**SHAPE), SEQUENCES, LENGTH),
    ):
        del model
        model = Model(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        batch = sample_batch(sequences, length)
        for _ in range(2):
            model.forward_packed(batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        # Not ru_maxrss: a child inherits the peak of whoever started it.
        status = Path("/proc/self/status").read_text()
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024)
    print(json.dumps(peaks))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of a process")
def test_memory_is_what_a_step_takes() -> None:
    counted = step_memory(
        Config(**SHAPE), num_sequences=SEQUENCES, length=LENGTH, autocast=None, accumulates=False
    )
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    before, peak = json.loads(done.stdout)
    assert before + counted.total == pytest.approx(peak, rel=0.15)
    assert counted.total > 0.5 * before  # or the process alone would carry the comparison


def test_parts_of_the_memory() -> None:
    config = Config(**SHAPE)
    size = sum(parameter.numel() for parameter in Model(config).parameters())
    shape = {"num_sequences": 8, "length": 128, "autocast": None}
    found = step_memory(config, accumulates=False, **shape)
    assert found.weights == pytest.approx(4 * size, rel=1e-3)
    assert found.gradients == pytest.approx(4 * size, rel=1e-3)
    assert found.optimizer == pytest.approx(8 * size, rel=1e-3)
    deeper = Config(**SHAPE | {"num_hidden_layers": 8})

    def four_layers(num_sequences: int) -> int:
        sizes = shape | {"num_sequences": num_sequences}
        deep, flat = (step_memory(c, accumulates=False, **sizes) for c in (deeper, config))
        return deep.activations - flat.activations

    # What layers save for the backward pass grows with the batch.
    assert four_layers(16) == pytest.approx(2 * four_layers(8), rel=0.15)
    lean = step_memory(config, accumulates=False, activation_checkpointing=True, **shape)
    assert lean.activations < 0.8 * found.activations
    # Gradients that stay while the next micro-batch is computed.
    assert step_memory(config, accumulates=True, **shape).total > found.total


@pytest.mark.parametrize("preset", sorted(RECIPES))
def test_size_and_work(preset: str) -> None:
    pytest.importorskip("triton", reason="time on a GPU is modelled from the kernels")
    recipe = RECIPES[preset]
    budget = plan(PlanOptions(preset=preset, device="h100", micro_batches=64))
    assert budget.steps == recipe.steps
    assert budget.tokens == recipe.steps * recipe.global_batch_tokens
    with torch.device("meta"):
        model = Model(Config.preset(preset, **recipe.model))
    assert budget.parameters == sum(parameter.numel() for parameter in model.parameters())
    batch = sample_batch(budget.micro_batch_sequences, 512)
    per_token = model_flops(model.config, batch) / batch.num_tokens
    assert budget.flops == pytest.approx(per_token * budget.tokens)
    assert budget.seconds == pytest.approx(budget.tokens / budget.tokens_per_second)
    assert "modelled" in budget.basis


def test_eight_gpus_are_faster_than_one_but_not_eight_times() -> None:
    pytest.importorskip("triton", reason="time on a GPU is modelled from the kernels")
    one, eight = (plan(PlanOptions(device=name, tokens=1e9)) for name in ("a100", "a100x8"))
    assert 6 < one.seconds / eight.seconds < 8
    assert one.steps == eight.steps == math.ceil(1e9 / RECIPES["base"].global_batch_tokens)
    assert not one.notes
    assert eight.notes == ("the training loop of this version runs on one device",)


@pytest.mark.parametrize("name", ["h200", "cpux2", "h100x0", "a100 x8", ""])
def test_devices_that_are_not_known(name: str) -> None:
    with pytest.raises(ValueError, match="device must be cpu, a100 or h100"):
        parse_device(name)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"preset": "huge"}, "preset must be one of"),
        ({"tokens": 0.0}, "tokens must be at least 1"),
        ({"seq_length": 4}, "seq_length must be at least 8"),
    ],
)
def test_sizes_that_are_not_possible(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanOptions(**choice)


def test_the_command_speaks_and_gives_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "tiny on cpu, fp32" in shown
    assert "measured now" in shown
    assert main(["plan", "--preset", "tiny", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["peak_bytes"] == values["process_bytes"] + sum(values["memory"].values())


if __name__ == "__main__":
    one_step_really()
