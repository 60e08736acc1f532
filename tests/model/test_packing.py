"""Packed, padded and one by one are the same model; what does not fit is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.model.inputs import pack_inputs
from spanbert_fast.model.pretrained import Model

CLOSE = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def packed(config: Config, padded: dict[str, Tensor]) -> PackedBatch:
    return pack_inputs(config, **padded).batch


@pytest.fixture
def flat(packed: PackedBatch) -> dict[str, Any]:
    """The packed batch as one row in Hugging Face's shapes."""
    labels = torch.full((packed.num_tokens,), -100)
    labels[packed.mlm_positions] = packed.mlm_labels
    counts = packed.sbo_cu.diff().tolist()
    targets = torch.full((len(counts), 5), -100)
    for row, ids in zip(targets, packed.sbo_targets.split(counts), strict=True):
        row[: len(ids)] = ids
    return {
        "input_ids": packed.input_ids[None],
        "token_type_ids": packed.token_type_ids[None],
        "labels": labels[None],
        "sbo_spans": torch.stack([packed.sbo_left, packed.sbo_right], dim=1)[None],
        "sbo_targets": targets[None],
    }


def test_packed_equals_padded(model: Model, padded: dict[str, Tensor], packed: PackedBatch) -> None:
    a, b = model(**padded), model.forward_packed(packed)
    kept = padded["attention_mask"].bool()
    torch.testing.assert_close(a.logits[kept], b.logits, **CLOSE)
    assert a.logits.shape == (4, 14, 64)
    for name in ("loss", "mlm_loss", "sbo_loss", "sbo_logits"):
        torch.testing.assert_close(a[name], b[name], **CLOSE)


def test_one_by_one_equals_padded(model: Model, padded: dict[str, Tensor]) -> None:
    whole = model(**padded)
    sums = torch.zeros(2, dtype=torch.float64)
    sbo_logits = []
    for row in range(4):
        length = int(padded["attention_mask"][row].sum())
        single = {
            name: value[row : row + 1] if name.startswith("sbo") else value[row : row + 1, :length]
            for name, value in padded.items()
        }
        alone = model(**single)
        torch.testing.assert_close(alone.logits[0], whole.logits[row, :length], **CLOSE)
        num_sbo = int((single["sbo_targets"] != -100).sum())
        num_mlm = int((single["labels"] != -100).sum())
        sums += torch.stack([alone.mlm_loss * num_mlm, alone.sbo_loss * num_sbo])
        sbo_logits += [] if alone.sbo_logits is None else [alone.sbo_logits]
    torch.testing.assert_close(torch.cat(sbo_logits), whole.sbo_logits, **CLOSE)
    total = sums.sum() / (padded["labels"] != -100).sum()
    torch.testing.assert_close(total, whole.loss.detach(), **CLOSE)


@pytest.mark.parametrize("form", ["boundaries", "boundaries and lengths", "restarting positions"])
def test_one_packed_row(model: Model, flat: dict[str, Any], packed: PackedBatch, form: str) -> None:
    if form == "restarting positions":
        flat["position_ids"] = packed.position_ids[None]
    else:
        flat["cu_seq_lens_q"] = packed.cu_seqlens
    if form == "boundaries and lengths":
        flat |= {"cu_seq_lens_k": packed.cu_seqlens, "max_length_q": 14, "max_length_k": 14}
    expected = model.forward_packed(packed)
    output = model(**flat)
    torch.testing.assert_close(output.logits[0], expected.logits, **CLOSE)
    torch.testing.assert_close(output.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(output.sbo_logits, expected.sbo_logits, **CLOSE)
    names = ("input_ids", "token_type_ids", "position_ids", "cu_seq_lens_q")
    states = model.bert(**{name: flat[name] for name in names if name in flat})
    expected_states = model.bert.encode_packed(packed).last_hidden_state
    torch.testing.assert_close(states.last_hidden_state[0], expected_states, **CLOSE)


@pytest.mark.parametrize("with_boundaries", [False, True])
def test_padding_free_collator_of_hugging_face(
    model: Model, padded: dict[str, Tensor], with_boundaries: bool
) -> None:
    """Hugging Face's own BERT mixes neighbours here, unless it runs a flash kernel."""
    rows = [
        {"input_ids": ids[: int(mask.sum())].tolist()}
        for ids, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)
    ]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=with_boundaries)
    batch = collator(rows, return_tensors="pt")
    assert ("cu_seq_lens_q" in batch) is with_boundaries
    logits = model(**batch).logits[0]
    names = ("input_ids", "attention_mask")
    expected = model(**{name: padded[name] for name in names}).logits
    kept = padded["attention_mask"].bool()
    torch.testing.assert_close(logits, expected[kept], **CLOSE)


def test_one_row_with_shifted_positions_is_one_sequence(model: Model) -> None:
    ids = torch.arange(5, 15)[None]
    shifted = model(input_ids=ids, position_ids=torch.arange(2, 12)[None]).logits
    masked = model(
        input_ids=ids, position_ids=torch.arange(2, 12)[None], attention_mask=torch.ones_like(ids)
    ).logits
    torch.testing.assert_close(shifted, masked, **CLOSE)


def test_rows_without_a_token_are_zero(model: Model) -> None:
    ids = torch.arange(5, 13).view(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        logits = model(input_ids=ids, attention_mask=mask).logits
        assert not logits[1].any()
        torch.testing.assert_close(logits[:1], model(input_ids=ids[:1]).logits, **CLOSE)


def test_spans_without_targets_are_predicted(model: Model, padded: dict[str, Tensor]) -> None:
    learned = model(**padded)
    names = ("input_ids", "attention_mask", "token_type_ids", "sbo_spans")
    predicted = model(**{name: padded[name] for name in names})
    assert predicted.loss is None
    assert predicted.sbo_loss is None
    torch.testing.assert_close(predicted.sbo_logits, learned.sbo_logits, **CLOSE)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("both", {"inputs_embeds": torch.zeros(4, 14, 32)}, "exactly one of input_ids"),
    ("neither", {"input_ids": None}, "exactly one of input_ids"),
    ("one dimension", {"input_ids": torch.zeros(14).long()}, "2 dimensions, got shape"),
    ("float ids", {"input_ids": torch.zeros(4, 14)}, "input_ids must hold integers, got torch.f"),
    ("id too large", {"input_ids": torch.full((4, 14), 64)}, r"input_ids must be in \[0, 64\)"),
    ("type", {"token_type_ids": torch.full((4, 14), 2)}, r"token_type_ids .*\[0, 2\), got 2"),
    ("position", {"position_ids": torch.full((4, 14), -1)}, r"position_ids .*got -1"),
    ("3 dimensions", {"attention_mask": torch.ones(4, 14, 14)}, "3 or 4 dimensions"),
    ("4 dimensions", {"attention_mask": torch.ones(4, 1, 14, 14)}, "3 or 4 dimensions"),
    ("additive", {"attention_mask": torch.full((4, 14), -1e4)}, "zeros and ones"),
    ("labels' shape", {"labels": torch.zeros(4, 13).long()}, "labels must have shape"),
    ("label", {"labels": torch.full((4, 14), 64)}, "labels must be -100 where"),
    ("decoder", {"encoder_hidden_states": torch.zeros(1)}, "encoder_hidden_states must be None"),
    ("cross", {"encoder_attention_mask": torch.zeros(1)}, "encoder_attention_mask must be None"),
    ("keys", {"cu_seq_lens_k": torch.zeros(1)}, "cu_seq_lens_k must equal"),
    ("rows", {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 14])}, "one row, got 4"),
    ("mask", {"cu_seq_lens_q": torch.tensor([0, 14])}, "attention_mask must be None"),
    ("no spans", {"sbo_spans": None}, "sbo_targets need sbo_spans"),
    ("spans' shape", {"sbo_spans": torch.zeros(4, 2).long()}, "sbo_spans must have shape"),
    ("targets' shape", {"sbo_targets": torch.zeros(4, 2, 5).long()}, "sbo_targets must have sh"),
    ("order", {"sbo_spans": torch.tensor([[[5, 3]] * 3] * 4)}, "left < right < 14, got"),
    ("seed", {"dropout_seed": torch.tensor(1.0)}, "dropout_seed must be an int64 scalar"),
    ("names", {"sequence_ids": torch.arange(3)}, r"sequence_ids must be integers of shape \(4,"),
]


@pytest.mark.parametrize(("change", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_input(
    model: Model, padded: dict[str, Tensor], change: dict[str, Any], message: str
) -> None:
    model.train()
    model.config.hidden_dropout_prob = 0.1
    with pytest.raises((ValueError, TypeError), match=message):
        model(**(padded | change))


def test_wrong_spans(model: Model, padded: dict[str, Tensor]) -> None:
    base = {name: padded[name] for name in ("input_ids", "attention_mask")}

    def predict(left: int, right: int, row: int = 1) -> None:
        spans = torch.full((4, 1, 2), -1)
        spans[row, 0] = torch.tensor([left, right])
        model(**base, sbo_spans=spans)

    for left, right, message in (
        (5, 3, "left < right < 14"),
        (3, 4, "1 to 5 targets"),
        (0, 7, "1 to 5 targets"),
        (-1, 2, "left < right < 14"),
        (11, 14, "left < right < 14"),
        (7, 10, "in one sequence, not in padding"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(left, right)
    with pytest.raises(ValueError, match="in one sequence"):
        model(
            input_ids=torch.arange(5, 15)[None],
            cu_seq_lens_q=torch.tensor([0, 5, 10]),
            sbo_spans=torch.tensor([[[3, 6]]]),
        )


def test_wrong_targets(model: Model, padded: dict[str, Tensor]) -> None:
    gap = padded["sbo_targets"].clone()
    gap[0, 1, 0] = -100
    with pytest.raises(ValueError, match="ids of a span first"):
        model(**(padded | {"sbo_targets": gap}))
    large = torch.where(padded["sbo_targets"] == -100, -100, 64)
    with pytest.raises(ValueError, match=r"sbo_targets must be -100 or in \[0, 64\), got 64"):
        model(**(padded | {"sbo_targets": large}))
    label = torch.where(padded["labels"] == -100, -100, 64)
    with pytest.raises(ValueError, match=r"labels must be -100 or in \[0, 64\), got 64"):
        model(**(padded | {"labels": label}))


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([0, 5], "rise from 0 to 10"),
        ([1, 10], "rise from 0 to 10"),
        ([0, 7, 3, 10], "rise from 0 to 10"),
        ([0.0, 10.0], "cu_seq_lens_q must be integers"),
    ],
)
def test_wrong_boundaries(model: Model, boundaries: list[float], message: str) -> None:
    ids = torch.arange(5, 15)[None]
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, cu_seq_lens_q=torch.tensor(boundaries))
    with pytest.raises(ValueError, match="max_length_q must be at least 6, got 5"):
        model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 6, 10]), max_length_q=5)
    with pytest.raises(ValueError, match=r"32 tokens \(max_position_embeddings\), got 33"):
        model(input_ids=torch.ones(1, 33).long())
