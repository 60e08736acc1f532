"""The plain Hugging Face Trainer, its own collator, and our model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    BertTokenizer,
    DataCollatorForLanguageModeling,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from spanbert_fast.config import Config
from spanbert_fast.model.pretrained import Model

# Jane Austen, Pride and Prejudice, chapter 1.
SENTENCES = [
    "it is a truth universally acknowledged that a single man in possession of a good fortune",
    "must be in want of a wife",
    "however little known the feelings or views of such a man may be on his first entering",
    "this truth is so well fixed in the minds of the surrounding families",
]


class Rows(Dataset[dict[str, Any]]):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizer:
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    return BertTokenizer(vocab=str(tmp_path / "vocab.txt"), do_lower_case=False)


@pytest.fixture
def model(tokenizer: BertTokenizer, config: Config) -> Model:
    return Model(Config(**config.to_dict() | {"vocab_size": len(tokenizer)}))


def trainer(model: Model, data: Rows, collator: Any, folder: Path, **arguments: Any) -> Trainer:
    metrics = arguments.pop("compute_metrics", None)
    settings = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **{"logging_steps": 1, **arguments},
    )
    return Trainer(
        model=model,
        args=settings,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator,
        compute_metrics=metrics,
    )


@pytest.mark.parametrize("with_spans", [False, True])
def test_evaluation(
    model: Model, tokenizer: BertTokenizer, tmp_path: Path, with_spans: bool
) -> None:
    rows = [dict(tokenizer(sentence)) for sentence in SENTENCES]
    masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=1)

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = dict(masking(features))
        if with_spans:
            batch["sbo_spans"] = torch.tensor([[[1, 3]]] * len(features))
            batch["sbo_targets"] = batch["input_ids"][:, 2:3, None]
        return batch

    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"accuracy": 0.5}

    run = trainer(
        model,
        Rows(rows),
        collate,
        tmp_path,
        compute_metrics=compute_metrics,
        per_device_eval_batch_size=3,
        remove_unused_columns=False,
    )
    assert run.label_names == ["labels"]
    report = run.evaluate()
    assert math.isfinite(report["eval_loss"])
    assert report["eval_accuracy"] == 0.5
    logits, labels = seen[0].predictions, seen[0].label_ids
    assert isinstance(logits, np.ndarray)
    assert isinstance(labels, np.ndarray)
    assert logits.shape == (*labels.shape, len(tokenizer))
    assert labels.shape[0] == 4


def test_training_learns_and_saves(model: Model, tokenizer: BertTokenizer, tmp_path: Path) -> None:
    rows = Rows([dict(tokenizer(sentence)) for sentence in SENTENCES * 4])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=1)
    run = trainer(
        model,
        rows,
        collator,
        tmp_path / "run",
        max_steps=40,
        learning_rate=5e-3,
        per_device_train_batch_size=16,
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    run.save_model(str(tmp_path / "model"))
    again = Model.from_pretrained(tmp_path / "model")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_accumulation_does_not_change_loss_or_gradient_norm(config: Config, tmp_path: Path) -> None:
    """Hugging Face's own BERT multiplies both by the number of accumulated batches."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(16):
        ids = torch.randint(5, 64, (12,), generator=generator)
        is_label = torch.rand(12, generator=generator) < 0.05 + 0.04 * index
        is_label[3] = True
        labels = torch.where(is_label, ids, -100)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})

    def step(size: int, accumulation: int) -> tuple[float, float]:
        set_seed(0)
        run = trainer(
            Model(config),
            Rows(rows),
            None,
            tmp_path,
            max_steps=1,
            learning_rate=1e-9,
            max_grad_norm=1e9,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        run.train()
        entry = run.state.log_history[0]
        return entry["loss"], entry["grad_norm"]

    whole = step(16, 1)
    assert step(4, 4) == pytest.approx(whole, rel=1e-5)
    assert step(1, 16) == pytest.approx(whole, rel=1e-5)
