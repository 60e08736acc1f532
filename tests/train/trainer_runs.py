"""A small run of a Hugging Face Trainer with everything of ours; also a script with two ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from spanbert_fast.config import Config
from spanbert_fast.data.collator import SpanMaskingCollator
from spanbert_fast.model.pretrained import Model
from spanbert_fast.train.trainer import Trainer

WORDS = ("the", "quiet", "river", "follows", "a", "broken", "engine", "while", "nobody", "reads")


def make_tokenizer() -> BertTokenizer:
    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(WORDS), "##s", "##ing"]
    return BertTokenizer(
        vocab={entry: index for index, entry in enumerate(entries)}, do_lower_case=False
    )


def make_rows(tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Sequences of very different lengths: a mean of means would show."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        length = 3 + 2 * (number % 13)
        ids = torch.randint(5, len(tokenizer), (length,), generator=generator).tolist()
        rows.append({"input_ids": [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]})
    return rows


def make_model(tokenizer: Any, **changes: Any) -> Model:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "span_position_embedding_size": 8,
        "initializer_range": 0.1,
    }
    return Model(Config(vocab_size=len(tokenizer), **settings | changes))


class KeepGradient(TrainerCallback):
    """Holds the gradient that the first optimizer step uses."""

    def __init__(self) -> None:
        self.gradient: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        if not self.gradient:
            self.gradient = {name: p.grad.clone() for name, p in model.named_parameters()}


def make_trainer(
    model: Any,
    collator: Any,
    rows: list[dict[str, Any]],
    folder: Path,
    *,
    kind: type = Trainer,
    callbacks: list[Any] | None = None,
    compute_metrics: Any = None,
    **arguments: Any,
) -> Any:
    logging.disable_progress_bar()
    settings = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"logging_steps": 1, "save_strategy": "no", **arguments},
    )
    return kind(
        model=model,
        args=settings,
        train_dataset=rows,
        eval_dataset=rows[:5],
        data_collator=collator,
        callbacks=callbacks or [],
        compute_metrics=compute_metrics,
    )


def one_step(
    folder: Path, size: int, accumulation: int, **arguments: Any
) -> dict[str, dict[str, Any]]:
    """Log entry and gradient of one step over 16 sequences, however they are split."""
    tokenizer = make_tokenizer()
    keep = KeepGradient()
    trainer = make_trainer(
        make_model(tokenizer).double(),
        SpanMaskingCollator(tokenizer, mask_ratio=0.3),
        make_rows(tokenizer, 16),
        folder,
        callbacks=[keep],
        max_steps=1,
        learning_rate=1e-9,
        max_grad_norm=1e9,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        **arguments,
    )
    trainer.train()
    return {"log": trainer.state.log_history[0], "gradient": keep.gradient}


def _rank(rank: int, folder: Path, size: int, accumulation: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    # They meet in a file: a port that was free a moment ago may be another process's by now.
    store = (folder / "meeting").absolute().as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    step = one_step(folder, size, accumulation, ddp_backend="gloo")
    assert torch.distributed.get_world_size() == 2
    torch.save(step, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    # Forked, as importing transformers takes most of the time; a new process for it, as one that
    # has trained already must not fork.
    torch.multiprocessing.start_processes(
        _rank,
        (Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])),
        nprocs=2,
        start_method="fork",
    )
