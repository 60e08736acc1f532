"""The whole model under Triton's interpreter; `test_model.py` runs this file in a process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, DataCollatorWithFlattening

import spanbert_fast as sf
from kernels.whole_model import assert_twins_agree
from spanbert_fast import Config, Model, use_backend

LENGTHS = (11, 1, 6)
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}
FORMS: list[dict[str, Any]] = [
    {},
    {"return_flash_attn_kwargs": True},
]


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "Model":
        return Model(Config(**SHAPE)).train()
    model = BertForMaskedLM(BertConfig(**SHAPE)).train()
    sf.patch(model)
    return model


def examples() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 61, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": row} for row in rows]


def padded() -> dict[str, Tensor]:
    rows = [torch.tensor(row["input_ids"]) for row in examples()]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (ids > 0).long()
    labels = torch.where(ids > 0, ids, -100)
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_the_whole_model() -> None:
    assert_twins_agree()


@pytest.mark.parametrize("kind", ["Model", "patched"])
@pytest.mark.parametrize("form", FORMS, ids=["positions", "boundaries"])
def test_padding_free(kind: str, form: dict[str, Any]) -> None:
    """Loss and gradients of the padded reference, dropout on."""
    model = make(kind)
    twin = copy.deepcopy(model)
    batch = DataCollatorWithFlattening(**form)(examples())
    torch.manual_seed(4)
    with use_backend("torch"):
        expected = model(**padded()).loss
        expected.backward()
    torch.manual_seed(4)
    with use_backend("triton"):
        loss = twin(**batch).loss
        loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    for (name, mine), judge in zip(twin.named_parameters(), model.parameters(), strict=True):
        if judge.grad is None:
            assert mine.grad is None
            continue
        assert mine.grad is not None
        # Key biases move no probability: their gradient is zero but for rounding.
        scale = 1.0 if name.endswith("self.key.bias") else float(judge.grad.abs().max())
        assert float((mine.grad - judge.grad).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("kind", ["Model", "patched"])
@torch.no_grad()
def test_nothing_leaks(kind: str) -> None:
    model = make(kind).eval()
    collator = DataCollatorWithFlattening()
    rows = examples()
    with use_backend("triton"):
        before = model(**collator(rows)).logits[0]
        rows[1]["input_ids"] = [7 if rows[1]["input_ids"][0] != 7 else 8]
        after = model(**collator(rows)).logits[0]
    for index, (old, new) in enumerate(
        zip(before.split(LENGTHS), after.split(LENGTHS), strict=True)
    ):
        assert torch.equal(old, new) is (index != 1)
