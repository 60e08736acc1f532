"""The models that `long_context.py` measures: adapted to a text, and trained on on longer ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spanbert_fast.data.options import PrepareOptions
from spanbert_fast.data.prepare import prepare
from spanbert_fast.model.pretrained import Model
from spanbert_fast.train.options import PretrainOptions
from spanbert_fast.train.pretrain import pretrain

HELD_OUT_EVERY = 10
ADAPT_RATE, EXTEND_RATE = 1e-3, 3e-4
"""Peaks of the learning rate."""
Fields = dict[str, Any]
"""Of the model, and how its position table gets longer."""


def split(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files to train on, and files to measure on."""
    files = sorted(folder.glob("*.txt"))
    held = files[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    if not held:
        raise ValueError(f"{folder} has {len(files)} files *.txt, needs {HELD_OUT_EVERY}")
    return [file for file in files if file not in held], held


def shards(options: argparse.Namespace, length: int) -> Path:
    """The training text in blocks of `length` tokens."""
    folder: Path = options.output / f"shards-{length}"
    if not (folder / "manifest.json").exists():
        prepare(
            PrepareOptions(
                input=tuple(map(str, split(options.text)[0])),
                output=folder,
                tokenizer=options.model,
                seq_length=length,
                validation_permille=0,
                workers=1,
            )
        )
    return folder


def adapted(options: argparse.Namespace) -> Path:
    """The model of the command line, trained on as a masked language model at its own length."""
    limit = Model.from_pretrained(options.model).config.max_position_embeddings
    return _trained(
        options.output / "adapted",
        data=shards(options, limit),
        init=options.model,
        steps=options.adapt_steps,
        global_batch_tokens=options.adapt_batch_tokens,
        learning_rate=ADAPT_RATE,
    )


def extended(
    options: argparse.Namespace,
    init: Path,
    name: str,
    length: int,
    fields: dict[str, Any],
    seed: int,
) -> Path:
    """The adapted model, changed by `fields` and trained on in blocks of `length` tokens."""
    return _trained(
        options.output / f"{name.replace(' ', '-')}-{length}-{seed}",
        data=shards(options, length),
        init=str(init),
        steps=options.extend_steps,
        global_batch_tokens=options.extend_batch_tokens,
        learning_rate=EXTEND_RATE,
        seed=seed,
        model=fields,
    )


def _trained(output: Path, **settings: Any) -> Path:
    """The model of a run; one that was stopped goes on, one that is done is taken as it is."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = still | settings.pop("model", {})
    if not (output / "model" / "config.json").exists():
        pretrain(
            PretrainOptions(
                output=output,
                model=model,
                warmup_steps=settings["steps"] // 10,
                scheme="token",
                eval_every=0,
                save_every=settings["steps"],
                log_every=20,
                threads=1,
                device="cpu",
                precision="fp32",
                **settings,
            )
        )
    return output / "model"
