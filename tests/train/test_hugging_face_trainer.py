"""The Trainer of transformers with `Model` and `SpanMaskingCollator`: exact, and replayable."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from trainer_runs import make_model, make_rows, make_tokenizer, make_trainer, one_step
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

from spanbert_fast.data.collator import SpanMaskingCollator
from spanbert_fast.model.pretrained import Model
from spanbert_fast.train.callback import SpanMaskingCallback
from spanbert_fast.train.trainer import Trainer

PLAIN = transformers.Trainer


class Recording(SpanMaskingCollator):
    """Keeps every batch and the epoch it was made for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int | None, dict[str, Tensor]]] = []

    def __call__(self, features: Any) -> Any:
        batch = super().__call__(features)
        self.seen.append((self.epoch, dict(batch)))
        return batch


def entries(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two steps: both losses, their sum and every gradient."""
    for name in ("loss", "mlm_loss", "sbo_loss", "grad_norm"):
        assert one["log"][name] == pytest.approx(other["log"][name], rel=1e-9), name
    torch.testing.assert_close(one["gradient"], other["gradient"], rtol=1e-8, atol=1e-11)


@pytest.fixture(scope="module")
def whole_step(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    step = one_step(tmp_path_factory.mktemp("whole"), 16, 1)
    zero = [name for name, grad in step["gradient"].items() if grad.abs().max() < 1e-9]
    # A key's bias adds the same to all scores of a query: its gradient is 0 by nature.
    assert all(name.endswith("key.bias") for name in zero), zero
    return step


@pytest.mark.parametrize(("size", "accumulation"), [(4, 4), (1, 16)])
def test_accumulation(
    whole_step: dict[str, Any], size: int, accumulation: int, tmp_path: Path
) -> None:
    assert_close(one_step(tmp_path, size, accumulation), whole_step)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_checkpointing_by_both_names(whole_step: dict[str, Any], name: str, tmp_path: Path) -> None:
    assert_close(one_step(tmp_path, 8, 2, **{name: True}), whole_step)


def test_two_processes(whole_step: dict[str, Any], tmp_path: Path) -> None:
    """Hugging Face's BERT gives a gradient four times as large here: 2 ranks, 2 micro-batches."""
    script = Path(__file__).with_name("trainer_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "4", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        step = torch.load(tmp_path / f"rank{rank}.pt")
        if rank == 0:
            assert_close(step, whole_step)
        else:
            torch.testing.assert_close(step["gradient"], whole_step["gradient"])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(("workers", "save_steps"), [(0, 6), (1, 4)])
def test_a_resumed_run_ends_with_the_same_bits(
    workers: int, save_steps: int, tmp_path: Path
) -> None:
    """Dropout on; 3 epochs of 4 steps, resumed amid the second or at the third's begin."""
    tokenizer = make_tokenizer()
    rows = make_rows(tokenizer, 16)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}

    def run(folder: Path, resume: bool, **arguments: Any) -> tuple[Model, Recording]:
        model, collator = make_model(tokenizer, **dropout), Recording(tokenizer)
        trainer = make_trainer(
            model,
            collator,
            rows,
            folder,
            kind=PLAIN,
            callbacks=[SpanMaskingCallback()],
            num_train_epochs=3,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            dataloader_num_workers=workers,
            save_strategy="steps",
            save_steps=save_steps,
            **arguments,
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, collator

    whole, collator = run(tmp_path / "a", False)
    saved = {f"checkpoint-{step}" for step in range(save_steps, 13, save_steps)}
    assert {path.name for path in (tmp_path / "a").iterdir()} == saved
    if not workers:
        assert [epoch for epoch, _ in collator.seen] == [0] * 4 + [1] * 4 + [2] * 4
    (tmp_path / "a" / "checkpoint-12").rename(tmp_path / "last")
    resumed, again = run(tmp_path / "a", True, save_total_limit=1)
    if not workers:
        assert [epoch for epoch, _ in again.seen] == [1] * 2 + [2] * 4
        for (_, one), (_, other) in zip(again.seen, collator.seen[6:], strict=True):
            assert_equal(one, other)
    assert_equal(weights(resumed), weights(whole))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["checkpoint-12"]
    for folder in (tmp_path / "a" / "checkpoint-12", tmp_path / "last"):
        assert_equal(weights(Model.from_pretrained(folder)), weights(whole))


def test_both_losses_are_logged_and_fall_in_both_trainers(tmp_path: Path) -> None:
    """And the plain Trainer ends with the same bits as ours."""
    tokenizer = make_tokenizer()
    ends = []
    for kind, callbacks in ((Trainer, []), (PLAIN, [SpanMaskingCallback()])):
        model = make_model(tokenizer)
        trainer = make_trainer(
            model,
            SpanMaskingCollator(tokenizer),
            make_rows(tokenizer, 8),
            tmp_path,
            kind=kind,
            callbacks=callbacks,
            max_steps=40,
            learning_rate=1e-2,
            per_device_train_batch_size=8,
        )
        trainer.train()
        for name in ("loss", "mlm_loss", "sbo_loss") if kind is Trainer else ("loss",):
            losses = entries(trainer, name)
            assert len(losses) == 40
            assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), name
        ends.append(weights(model))
    assert_equal(*ends)


def test_logged_losses_are_means_over_all_targets_since_the_last_log(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model, collator = make_model(tokenizer), Recording(tokenizer)
    trainer = make_trainer(
        model,
        collator,
        make_rows(tokenizer, 12),
        tmp_path,
        max_steps=4,
        logging_steps=2,
        learning_rate=0.0,
        weight_decay=0.0,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,  # Must not count.
        per_device_eval_batch_size=5,
    )
    trainer.train()
    batches = [batch for _, batch in collator.seen if len(batch["labels"]) == 3]
    assert len(batches) == 8
    model.train()
    for name, key in (("mlm_loss", "labels"), ("sbo_loss", "sbo_targets")):
        for part, logged in zip((batches[:4], batches[4:]), entries(trainer, name), strict=True):
            counts = [int((batch[key] != -100).sum()) for batch in part]
            means = [float(getattr(model(**batch), name)) for batch in part]
            expected = np.dot(counts, means) / sum(counts)
            assert logged == pytest.approx(expected, rel=1e-5)
            assert abs(np.mean(means) - expected) > 1e-4  # The counts do matter.


def test_evaluation_has_metrics_and_spares_the_log(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()

    def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
        labels, logits = prediction.label_ids, prediction.predictions
        assert logits.shape == (*labels.shape, len(tokenizer))
        return {"accuracy": float((logits.argmax(-1) == labels)[labels != -100].mean())}

    trainer = make_trainer(
        make_model(tokenizer),
        SpanMaskingCollator(tokenizer, mask_ratio=0.3),
        make_rows(tokenizer, 5),
        tmp_path,
        compute_metrics=accuracy,
        num_train_epochs=30,
        learning_rate=1e-2,
        per_device_train_batch_size=5,
        per_device_eval_batch_size=2,
        eval_strategy="epoch",
    )
    trainer.train()
    found = entries(trainer, "eval_accuracy")
    assert len(found) == 30
    assert np.mean(found[-5:]) > np.mean(found[:5]) + 0.2
    assert all(math.isfinite(loss) for loss in entries(trainer, "eval_loss"))
    assert not any("eval_mlm_loss" in entry for entry in trainer.state.log_history)


def test_epochs_count_passes_over_data_without_a_length(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    rows = make_rows(tokenizer, 6)

    class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Any:
            return iter(rows)

    collator = Recording(tokenizer)
    trainer = make_trainer(
        make_model(tokenizer),
        collator,
        rows,
        tmp_path,
        max_steps=6,
        per_device_train_batch_size=3,
    )
    trainer.train_dataset = Stream()
    trainer.train()
    assert [epoch for epoch, _ in collator.seen] == [0, 0, 1, 1, 2, 2]
    # A second call of `train` begins anew.
    trainer.train()
    assert [epoch for epoch, _ in collator.seen[6:]] == [0, 0, 1, 1, 2, 2]


def test_the_callback_finds_the_collator_or_says_so(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    rows, arguments = make_rows(tokenizer, 4), {"max_steps": 1}
    collator = SpanMaskingCollator(tokenizer)

    def wrapped(features: Any) -> Any:
        return collator(features)

    for callbacks in ([], [SpanMaskingCallback(collator)]):
        trainer = make_trainer(
            make_model(tokenizer), wrapped, rows, tmp_path, callbacks=callbacks, **arguments
        )
        trainer.train()
        assert collator.epoch == (0 if callbacks else None)
    trainer = make_trainer(
        make_model(tokenizer),
        wrapped,
        rows,
        tmp_path,
        callbacks=[SpanMaskingCallback()],
        **arguments,
    )
    with pytest.raises(ValueError, match="data_collator is a function, must be a SpanMasking"):
        trainer.train()
    given = make_trainer(
        make_model(tokenizer),
        collator,
        rows,
        tmp_path,
        callbacks=[SpanMaskingCallback()],
        **arguments,
    )
    added = [c for c in given.callback_handler.callbacks if isinstance(c, SpanMaskingCallback)]
    assert len(added) == 1


def test_the_reference_loss_is_refused(tmp_path: Path) -> None:
    """It would need a count of the step's SBO targets, which the Trainer does not give."""
    tokenizer = make_tokenizer()
    trainer = make_trainer(
        make_model(tokenizer, loss_normalization="reference"),
        SpanMaskingCollator(tokenizer),
        make_rows(tokenizer, 4),
        tmp_path,
        max_steps=1,
    )
    with pytest.raises(ValueError, match="num_sbo_items_in_batch"):
        trainer.train()


def test_our_trainer_trains_other_models_too(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    masking = DataCollatorForLanguageModeling(tokenizer, seed=1)
    for collator in (masking, SpanMaskingCollator(tokenizer, spans=False)):
        trainer = make_trainer(
            BertForMaskedLM(config), collator, make_rows(tokenizer, 4), tmp_path, max_steps=1
        )
        trainer.train()
        assert math.isfinite(entries(trainer, "loss")[0])
        assert entries(trainer, "mlm_loss") == []
