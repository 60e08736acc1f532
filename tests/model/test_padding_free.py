"""Hugging Face's padding-free inputs give the numbers of padded ones, and nothing leaks.

For `sf.Model` and for patched models. Hugging Face's own BERT mixes neighbours here, unless it runs
a flash kernel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model.patched_models import LENGTHS, VOCAB_SIZE, batch, make
from torch import Tensor
from transformers import DataCollatorWithFlattening

import spanbert_fast as sf
from spanbert_fast.config import Config
from spanbert_fast.model.inputs import pack_inputs
from spanbert_fast.model.pretrained import Model
from spanbert_fast.model.rows import Boundaries

CLOSE = {"rtol": 0, "atol": 1e-12}
COLLATORS: dict[str, dict[str, Any]] = {
    "positions": {},
    "positions from 2": {"position_ids_start": 2},
    "boundaries": {"return_flash_attn_kwargs": True},
    "boundaries alone": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "indices": {"return_seq_idx": True},
    "indices alone": {"return_seq_idx": True, "return_position_ids": False},
    "all": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
}


@pytest.fixture(params=["Model", "patched"])
def any_model(request: pytest.FixtureRequest, model: Model) -> Any:
    """fp64, evaluation mode."""
    if request.param == "Model":
        return model
    patched = make("BertForMaskedLM").double()
    sf.patch(patched)
    return patched


@pytest.fixture
def examples() -> list[dict[str, list[int]]]:
    """Ragged sequences as a data set gives them; every third token has a label."""
    inputs = batch()
    rows = []
    for ids, length in zip(inputs["input_ids"].tolist(), LENGTHS, strict=True):
        labels = [token if column % 3 == 0 else -100 for column, token in enumerate(ids)]
        rows.append({"input_ids": ids[:length], "labels": labels[:length]})
    return rows


def padded(examples: list[dict[str, list[int]]], keep_first_label: bool) -> dict[str, Tensor]:
    shape = (len(examples), max(len(row["input_ids"]) for row in examples))
    ids, mask = torch.zeros(shape).long(), torch.zeros(shape).long()
    labels = torch.full(shape, -100)
    for index, row in enumerate(examples):
        length = len(row["input_ids"])
        ids[index, :length], mask[index, :length] = torch.tensor(row["input_ids"]), 1
        labels[index, :length] = torch.tensor(row["labels"])
    if not keep_first_label:
        labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("form", COLLATORS)
def test_flattening_collator(any_model: Any, examples: Any, form: str) -> None:
    """Its labels lack the first token of each sequence: it is made for causal models."""
    flat = DataCollatorWithFlattening(**COLLATORS[form])(examples)
    assert flat["input_ids"].shape == (1, sum(LENGTHS))
    inputs = padded(examples, keep_first_label=False)
    if form == "positions from 2":
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None] + 2
    any_model.train()
    results = []
    for each in (inputs, flat):
        any_model.zero_grad()
        extra = {"return_logits": True} if isinstance(any_model, Model) else {}
        output = any_model(**each, **extra, output_hidden_states=True)
        output.loss.backward()
        grads = {
            name: p.grad.clone() for name, p in any_model.named_parameters() if p.grad is not None
        }
        results.append((output, grads))
    (a, a_grads), (b, b_grads) = results
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(b.logits[0], a.logits[kept], **CLOSE)
    for mine, judge in zip(b.hidden_states, a.hidden_states, strict=True):
        torch.testing.assert_close(mine[0], judge[kept], **CLOSE)
    torch.testing.assert_close(b.loss, a.loss, **CLOSE)
    assert len(b_grads) > 30
    for name, gradient in b_grads.items():
        torch.testing.assert_close(gradient, a_grads[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", COLLATORS)
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
@torch.no_grad()
def test_nothing_leaks(any_model: Any, examples: Any, form: str, changed: int) -> None:
    collator = DataCollatorWithFlattening(**COLLATORS[form])
    before = any_model(**collator(examples)).logits[0]
    for index, token in enumerate(examples[changed]["input_ids"]):
        examples[changed]["input_ids"][index] = 5 + (token + 3) % (VOCAB_SIZE - 5)
    after = any_model(**collator(examples)).logits[0]
    for index, (old, new) in enumerate(
        zip(before.split(LENGTHS), after.split(LENGTHS), strict=True)
    ):
        assert torch.equal(old, new) is (index != changed)


@pytest.mark.parametrize("form", ["positions", "indices"])
@torch.no_grad()
def test_several_flattened_rows(any_model: Any, form: str) -> None:
    """[2, T]: each row holds sequences of its own."""
    lengths = ((3, 5, 2), (6, 1, 3))
    ids = torch.randint(5, VOCAB_SIZE, (2, 10), generator=torch.Generator().manual_seed(2))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    flat = {"input_ids": ids, "position_ids": positions}
    if form == "indices":
        flat = {"input_ids": ids, "seq_idx": (positions == 0).cumsum(1) - 1}
    logits = any_model(**flat).logits
    assert logits.shape == (2, 10, VOCAB_SIZE)
    for row, (found, own) in enumerate(zip(logits, lengths, strict=True)):
        parts = zip(ids[row].split(own), found.split(own), strict=True)
        for sequence, mine in parts:
            alone = any_model(input_ids=sequence[None]).logits[0]
            torch.testing.assert_close(mine, alone, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
@pytest.mark.parametrize("lengths", [(3, 4), (0, 3, 0, 4, 0), (1, 1, 1, 1, 1, 1, 1), (7,)])
@torch.no_grad()
def test_boundaries_of_any_integers(
    any_model: Any, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Also with empty sequences, and with those of one token."""
    ids = torch.arange(5, 12)
    cu = torch.tensor((0, *lengths)).cumsum(0).to(dtype)
    logits = any_model(
        input_ids=ids[None],
        cu_seq_lens_q=cu,
        cu_seq_lens_k=cu.long(),
        max_length_q=9,
        max_length_k=9,
    ).logits[0]
    expected = [
        any_model(input_ids=part[None]).logits[0] for part in ids.split(lengths) if len(part)
    ]
    torch.testing.assert_close(logits, torch.cat(expected), **CLOSE)


@torch.no_grad()
def test_no_token_at_all(any_model: Any) -> None:
    nothing = torch.zeros(1, 0).long()
    for extra in ({}, {"position_ids": nothing}, {"cu_seq_lens_q": torch.tensor([0, 0])}):
        assert any_model(input_ids=nothing, **extra).logits.shape == (1, 0, VOCAB_SIZE)


def test_eager_attention_of_flattened_rows(any_model: Any, examples: Any) -> None:
    any_model.set_attn_implementation("eager")
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(examples)
    found = any_model(**flat, output_attentions=True).attentions
    names = ("input_ids", "attention_mask")
    inputs = {name: padded(examples, True)[name] for name in names}
    expected = any_model(**inputs, output_attentions=True).attentions
    for mine, judge in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, judge, **CLOSE)


@torch.no_grad()
def test_one_pooled_vector_for_each_sequence() -> None:
    patched = make("BertForSequenceClassification").double()
    sf.patch(patched)
    inputs = batch()
    kept = inputs["attention_mask"].bool()
    expected = patched(**inputs).logits
    flat = {name: inputs[name][kept][None] for name in ("input_ids", "token_type_ids")}
    cu = torch.tensor((0, *LENGTHS)).cumsum(0)
    labels = torch.tensor([0, 1, 2, 1])
    output = patched(**flat, cu_seq_lens_q=cu, labels=labels)
    torch.testing.assert_close(output.logits, expected, **CLOSE)
    torch.testing.assert_close(output.loss, patched(**inputs, labels=labels).loss, **CLOSE)
    with_empty = torch.cat([cu[:2], cu[1:]])
    logits = patched(**flat, cu_seq_lens_q=with_empty).logits
    torch.testing.assert_close(logits[[0, 2, 3, 4]], expected, **CLOSE)
    zero = patched.classifier(patched.bert.pooler(torch.zeros(1, 1, 32).double()))
    torch.testing.assert_close(logits[1:2], zero, **CLOSE)


def test_spans_and_labels_of_several_rows(
    model: Model, config: Config, padded: dict[str, Tensor]
) -> None:
    """Four ragged rows in two flattened ones; columns count in the flattened row."""
    packed = pack_inputs(config, **padded).batch
    cut = 14 + 9
    ids, types = packed.input_ids, packed.token_type_ids
    labels = torch.full_like(ids, -100).index_put((packed.mlm_positions,), packed.mlm_labels)
    seq_idx = torch.repeat_interleave(torch.arange(4), packed.cu_seqlens.diff())
    # The second row is shorter: a sequence of its own fills it up, without labels.
    rest = 2 * cut - len(ids)
    fill = {"ids": 5, "types": 0, "labels": -100, "seq_idx": 9}
    tensors = {"ids": ids, "types": types, "labels": labels, "seq_idx": seq_idx}
    rows = {
        name: torch.cat([value, value.new_full((rest,), fill[name])]).view(2, cut)
        for name, value in tensors.items()
    }
    spans, targets = torch.full((2, 4, 2), -1), torch.full((2, 4, 5), -100)
    counts = packed.sbo_cu.diff().tolist()
    used = [0, 0]
    for left, right, own in zip(
        packed.sbo_left.tolist(),
        packed.sbo_right.tolist(),
        packed.sbo_targets.split(counts),
        strict=True,
    ):
        row = left // cut
        spans[row, used[row]] = torch.tensor([left, right]) - row * cut
        targets[row, used[row], : len(own)] = own
        used[row] += 1
    output = model(
        input_ids=rows["ids"],
        token_type_ids=rows["types"],
        labels=rows["labels"],
        seq_idx=rows["seq_idx"],
        sbo_spans=spans,
        sbo_targets=targets,
    )
    expected = model.forward_packed(packed)
    for name in ("loss", "mlm_loss", "sbo_loss", "sbo_logits"):
        torch.testing.assert_close(output[name], expected[name], **CLOSE)
    assert used == [4, 2]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("fall to another value", {"position_ids": [2, 3, 4, 1, 2, 3]}, "got 1 after 4 in row 0"),
    ("jump", {"position_ids": [0, 1, 5, 6, 7, 8]}, "got 5 after 1 in row 0"),
    ("backwards", {"position_ids": [5, 4, 3, 2, 1, 0]}, "must rise by 1 or return to 0"),
    ("indices fall", {"seq_idx": [1, 1, 0, 0, 2, 2]}, "seq_idx must not fall inside a row"),
    ("index shape", {"seq_idx": [0, 0, 1]}, r"seq_idx must have shape \(1, 6\), got \(1, 3\)"),
    ("disagree", {"seq_idx": [0, 0, 0, 1, 1, 1], "cu": [0, 2, 6]}, "seq_idx must change at the b"),
    ("mask", {"seq_idx": [0, 0, 0, 1, 1, 1], "mask": 1}, "None with seq_idx: packed rows have no"),
    ("mask and boundaries", {"cu": [0, 2, 6], "mask": 1}, "must be None with cu_seq_lens_q"),
    ("uint8 falls", {"cu": torch.tensor([0, 5, 3, 6]).byte()}, "must rise from 0 to 6"),
    ("keys", {"cu": [0, 2, 6], "cu_seq_lens_k": torch.tensor([0, 3, 6])}, "cu_seq_lens_k must eq"),
    ("key length", {"cu": [0, 2, 6], "max_length_k": 3}, r"max_length_q \(None\), got 3"),
    ("short", {"cu": [0, 2, 6], "max_length_q": 3}, "max_length_q must be at least 4, got 3"),
]


@pytest.mark.parametrize(("given", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_could_be_misread(any_model: Any, given: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {"input_ids": torch.arange(5, 11)[None]}
    for name, value in given.items():
        if name == "cu":
            inputs["cu_seq_lens_q"] = torch.as_tensor(value)
        elif name == "mask":
            inputs["attention_mask"] = torch.ones(1, 6)
        else:
            inputs[name] = torch.tensor(value)[None] if isinstance(value, list) else value
    with pytest.raises(ValueError, match=message):
        any_model(**inputs)


@pytest.mark.parametrize(
    ("positions", "lengths"),
    [
        ([7, 8, 0, 1, 2, 3], (2, 4)),
        ([2, 3, 2, 3, 4, 5], (2, 4)),
        ([4, 4, 4, 5, 0, 4], (1, 1, 2, 1, 1)),
        ([3, 0, 1, 2, 3, 4], (1, 5)),
        ([5, 6, 7, 8, 9, 10], (6,)),
    ],
)
def test_positions_that_do_not_begin_at_zero(
    config: Config, positions: list[int], lengths: tuple[int, ...]
) -> None:
    ids = torch.arange(5, 11)[None]
    given = torch.tensor(positions)[None]
    packed = pack_inputs(config, input_ids=ids, position_ids=given).batch
    assert packed.cu_seqlens.diff().tolist() == list(lengths)
    assert packed.position_ids.tolist() == positions
    one = pack_inputs(
        config, input_ids=ids, position_ids=given, attention_mask=torch.ones(1, 6)
    ).batch
    assert one.cu_seqlens.tolist() == [0, 6]
    assert one.position_ids.tolist() == positions


def test_boundaries_win_over_positions(config: Config) -> None:
    """Positions are then nothing but rows of a table."""
    packed = pack_inputs(
        config,
        input_ids=torch.arange(5, 11)[None],
        position_ids=torch.tensor([[0, 3, 0, 1, 1, 1]]),
        boundaries=Boundaries(cu_seq_lens_q=torch.tensor([0, 4, 6])),
    ).batch
    assert packed.cu_seqlens.tolist() == [0, 4, 6]
    assert packed.position_ids.tolist() == [0, 3, 0, 1, 1, 1]
