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
from spanbert_fast.diagnose.memory import _LiveBytes, sample_batch, step_memory
from spanbert_fast.diagnose.options import PlanOptions
from spanbert_fast.model.pretrained import Model
from spanbert_fast.ops.attention_planes import Dropout, backward_bytes, backward_planes
from spanbert_fast.train.metrics import model_flops
from spanbert_fast.train.presets import RECIPES

SHAPE: dict[str, Any] = {
    "vocab_size": 12_000,
    "hidden_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 1_536,
}
# Sequences, length, window, layers: short blocks, and long ones with a window and without.
STEPS = [(8, 256, None, 4), (1, 4_096, 256, 2), (1, 4_096, None, 1)]


def shaped(length: int, window: int | None, layers: int) -> Config:
    changes = {"num_hidden_layers": layers, "max_position_embeddings": length}
    return Config(**SHAPE | changes, attention_window=window)


def one_step_really(number: int) -> None:
    """Run by a process of its own: prints what it held before, and its peak."""
    peaks = []
    model: Any = None
    of_step = STEPS[number]
    for config, sequences, length in (
        (Config(**SHAPE | {"num_hidden_layers": 1, "vocab_size": 99}), 1, 8),
        (shaped(*of_step[1:]), *of_step[:2]),
    ):
        del model
        model = Model(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        batch = sample_batch(sequences, length)
        for _ in range(2):
            model.forward_packed(batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(peak_bytes())
    print(json.dumps(peaks))


def peak_bytes() -> int:
    # Not ru_maxrss: a child inherits the peak of whoever started it.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of a process")
@pytest.mark.parametrize("number", range(len(STEPS)))
def test_memory_is_what_a_step_takes(number: int) -> None:
    sequences, length, *rest = STEPS[number]
    counted = step_memory(
        shaped(length, *rest),
        num_sequences=sequences,
        length=length,
        autocast=None,
        accumulates=False,
    )
    command = [sys.executable, __file__, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = json.loads(done.stdout)
    assert before + counted.total == pytest.approx(peak, rel=0.15)
    assert counted.total > 0.5 * before  # or the process alone would carry the comparison


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 40], ids=["all", "window"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_what_attention_holds_inside(
    dtype: torch.dtype, window: int | None, sequences: int
) -> None:
    planes = (sequences, 2, 640, 32)
    dropout = Dropout(6_554, torch.tensor(1), torch.arange(sequences), 0)
    with _LiveBytes() as live:
        packed = (torch.randn(sequences, 640, 2, 32, dtype=dtype) for _ in range(4))
        rows = [part.transpose(1, 2) for part in packed]
        delta = torch.zeros(planes[:3])
        live.peak = before = live.now
        backward_planes(*rows, delta, 1.0, window, dropout, list(range(2 * sequences)))
    assert backward_bytes(planes, dtype, window, True) == pytest.approx(live.peak - before, rel=0.1)


def test_a_window_saves_work() -> None:
    def long(window: int | None) -> Any:
        choice = {"tokens": 1e6, "micro_batches": 32, "seq_length": 2_048}
        return plan(PlanOptions(preset="tiny", attention_window=window, **choice))

    near, full, whole = long(64), long(None), long(4_096)
    assert whole.flops == full.flops
    hidden = int(Config.preset("tiny").hidden_size)
    # Both passes, two products of two operations a pair; 2 w + 1 pairs but for the ends.
    pairs = 2_048**2 - (2_048 * 129 - 64 * 65)
    assert full.flops - near.flops == pytest.approx(1e6 * 3 * 2 * 2 * hidden * pairs / 2_048)


def test_a_window_saves_time_on_a_gpu() -> None:
    roofline = pytest.importorskip("spanbert_fast.diagnose.roofline", reason="needs Triton")
    assert roofline.computed_scores(4_096, None) == roofline.computed_scores(4_096, 4_095)
    # A tile in the middle has 128 queries and 128 + 2 * 64 keys: four steps of 64.
    assert roofline.computed_scores(4_096, 64) == 128 * (32 * 256 - 2 * 64)
    near, full = (
        plan(PlanOptions(device="h100", tokens=1e9, seq_length=4_096, attention_window=window))
        for window in (256, None)
    )
    assert near.seconds < 0.9 * full.seconds


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
        ({"attention_window": 0}, "attention_window must be at least 1"),
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
    one_step_really(int(sys.argv[1]))
