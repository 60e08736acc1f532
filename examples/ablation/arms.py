"""The four arms of the ablation, and their pre-training by `spanbert-fast`."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spanbert_fast.cli import main as spanbert_fast

FINISHED = "finished"
"""An empty file in the folder of a run that needs no step more."""


@dataclass(frozen=True)
class Arm:
    """What is masked, and whether the span boundary objective takes part."""

    scheme: str
    sbo_weight: int


ARMS = {
    "token": Arm("token", 0),
    "whole word": Arm("whole_word", 0),
    "geometric": Arm("spanbert", 0),
    "geometric + SBO": Arm("spanbert", 1),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every arm gets, and what it is given to."""

    steps: int
    batch_tokens: int
    layers: int
    hidden_size: int
    learning_rate: float
    threads: int


def command(*words: object) -> None:
    """Runs one `spanbert-fast` command in this process.

    Raises:
        RuntimeError: It failed; it has said why.
    """
    if status := spanbert_fast([str(word) for word in words]):
        raise RuntimeError(f"spanbert-fast {words[0]} ended with status {status}")


def prepare(corpus: list[Path], column: str, output: Path, **options: object) -> None:
    """Writes the token shards, with a tokenizer that is trained on the text, unless they stand."""
    if (output / "manifest.json").exists():
        return
    words = [word for name, value in options.items() for word in (f"--{_dashed(name)}", value)]
    command("prepare", "--input", *corpus, "--text-column", column, "--output", output,
            "--train-tokenizer", *words)  # fmt: skip


def pretrain(arm: Arm, seed: int, budget: Budget, data: Path, output: Path) -> dict[str, Any]:
    """Pre-trains one arm, or goes on where it was killed; the last line of its metrics.

    The seed alone decides the weights at the beginning and the order of the text, so the arms of a
    seed differ in their masks and in the loss, and in nothing else.
    """
    if not (output / FINISHED).exists():
        command(
            "pretrain", "--data", data, "--output", output, "--preset", "tiny",
            "--seed", seed, "--steps", budget.steps, "--warmup-steps", budget.steps // 30,
            "--global-batch-tokens", budget.batch_tokens, "--threads", budget.threads,
            "--learning-rate", budget.learning_rate, "--precision", "fp32", "--device", "cpu",
            "--log-every", max(1, budget.steps // 20), "--eval-every", 0,
            "--save-every", max(1, budget.steps // 4), "--keep-checkpoints", 1,
            "--masking", "scheme", arm.scheme,
            "--model", "sbo_weight", arm.sbo_weight, "num_hidden_layers", budget.layers,
            "hidden_size", budget.hidden_size, "intermediate_size", 4 * budget.hidden_size,
        )  # fmt: skip
        (output / FINISHED).touch()
        # A finished arm needs its model alone.
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    last: dict[str, Any] = [line for line in map(json.loads, lines) if line["kind"] == "train"][-1]
    return last


def _dashed(name: str) -> str:
    return name.replace("_", "-")
