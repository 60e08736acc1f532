"""The last layer computes the rows that the heads read, and every number stays what it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import spanbert_fast as sf
from spanbert_fast.batch import PackedBatch
from spanbert_fast.model.layout import ReadRows
from spanbert_fast.train.metrics import model_flops

LENGTHS = (11, 1, 24, 9)
NONE = torch.zeros(0, dtype=torch.int64)


def make_batch(**changes: Any) -> PackedBatch:
    """Two spans with one token between them, which is read twice, and a label without a span."""
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    total = int(cu_seqlens[-1])
    batch = PackedBatch(
        input_ids=torch.randint(5, 50, (total,)),
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS]),
        token_type_ids=torch.zeros(total, dtype=torch.int64),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(LENGTHS),
        sequence_ids=torch.tensor([7, 3, 9, 4]),
        mlm_positions=torch.tensor([2, 3, 5, 20, 40]),
        mlm_labels=torch.tensor([6, 7, 8, 9, 10]),
        sbo_left=torch.tensor([1, 4]),
        sbo_right=torch.tensor([4, 6]),
        sbo_cu=torch.tensor([0, 2, 3], dtype=torch.int32),
        sbo_targets=torch.tensor([6, 7, 8]),
    )
    return dataclasses.replace(batch, **changes)


def make_model(dropout: float = 0.1, layers: int = 2, **fields: Any) -> sf.Model:
    torch.manual_seed(1)
    config = sf.Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        span_position_embedding_size=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **fields,
    )
    return sf.Model(config).double().train()


def step(model: sf.Model, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and all gradients."""
    model.zero_grad()
    output = model.forward_packed(batch, dropout_seed=torch.tensor(5))
    assert output.loss is not None
    output.loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing
    return output.loss.detach(), gradients


def watch(model: sf.Model) -> Any:
    """A hook that looks at the last layer's feed-forward: all rows have to be there."""
    seen = []
    layer = model.bert.encoder.layer[-1].intermediate
    handle = layer.register_forward_hook(lambda _, rows, __: seen.append(rows[0].shape[0]))
    return handle, seen


def feed_forward_rows(model: sf.Model, call: Any) -> int:
    """Rows that meet the feed-forward of the last layer, told by the work that is done there."""
    counter = FlopCounterMode(display=False, depth=9)
    with counter:
        call()
    width = model.config.hidden_size * model.config.intermediate_size
    name = f"Encoder.layer.{model.config.num_hidden_layers - 1}.intermediate"
    return int(sum(counter.get_flop_counts()[name].values()) // (2 * width))


CASES = {
    "dropout": ({}, {}),
    "no dropout": ({"dropout": 0.0}, {}),
    "one layer": ({"layers": 1}, {}),
    "an attention window": ({"attention_window": 3}, {}),
    "the eager attention": ({"attn_implementation": "eager"}, {}),
    "the reference's normalisation": ({"loss_normalization": "reference"}, {}),
    "no spans": (
        {},
        {
            "sbo_left": NONE,
            "sbo_right": NONE,
            "sbo_targets": NONE,
            "sbo_cu": NONE.new_zeros(1).int(),
        },
    ),
    "no labels": ({}, {"mlm_positions": NONE, "mlm_labels": NONE}),
    "nothing to learn": (
        {},
        {
            "mlm_positions": NONE,
            "mlm_labels": NONE,
            "sbo_left": NONE,
            "sbo_right": NONE,
            "sbo_targets": NONE,
            "sbo_cu": NONE.new_zeros(1).int(),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_step_is_that_of_all_rows(case: str, checkpoints: bool) -> None:
    fields, changes = CASES[case]
    model, batch = make_model(**fields), make_batch(**changes)
    if checkpoints:
        model.activation_checkpointing_enable()
    found, gradients = step(model, batch)
    handle, seen = watch(model)
    expected, wanted = step(model, batch)
    handle.remove()
    assert seen[0] == batch.num_tokens
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-13, msg=name)


def test_only_the_rows_that_are_read_meet_the_feed_forward() -> None:
    model, batch = make_model(), make_batch()
    read = len(batch.mlm_positions) + 2 * len(batch.sbo_left)
    with torch.no_grad():
        assert ReadRows.count(batch) == read < batch.num_tokens
        assert feed_forward_rows(model, lambda: model.forward_packed(batch)) == read
        assert feed_forward_rows(model, lambda: model.score_packed(batch)) == read
        # Whoever sees more than the loss gets everything.
        for asked in ("return_logits", "output_hidden_states", "output_attentions"):
            call = lambda asked=asked: model.forward_packed(batch, **{asked: True})  # noqa: E731
            assert feed_forward_rows(model, call) == batch.num_tokens, asked
        model.eval()
        assert feed_forward_rows(model, lambda: model.forward_packed(batch)) == batch.num_tokens


def test_the_states_that_a_user_sees_are_whole() -> None:
    model, batch = make_model(0.0).eval(), make_batch()
    with torch.no_grad():
        expected = model.bert.encode_packed(batch).last_hidden_state
        states = model.forward_packed(batch, output_hidden_states=True).hidden_states
        watched: list[Tensor] = []
        hook = model.bert.encoder.register_forward_hook(
            lambda *call: watched.append(call[2].last_hidden_state)
        )
        model.train().forward_packed(batch)
        hook.remove()
    assert states is not None
    torch.testing.assert_close(states[-1], expected, rtol=0, atol=0)
    torch.testing.assert_close(watched[0], expected, rtol=0, atol=0)


def test_scores_are_those_of_all_rows() -> None:
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        found = model.score_packed(batch, dropout_seed=torch.tensor(5))
        handle, _ = watch(model)
        expected = model.score_packed(batch, dropout_seed=torch.tensor(5))
        handle.remove()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_row_that_is_read_twice_is_put_back_once() -> None:
    batch = make_batch()
    read = ReadRows.of(batch)
    assert read is not None
    assert read.rows.tolist() == [1, 2, 3, 4, 4, 5, 6, 20, 40]
    assert len(set(read.places.tolist())) == len(read.places)
    full = torch.randn(batch.num_tokens, 4)
    back = read.put(read.take(full), batch.num_tokens)
    expected = torch.zeros_like(full)
    expected[[1, 2, 3, 4, 5, 6, 20, 40]] = full[[1, 2, 3, 4, 5, 6, 20, 40]]
    assert torch.equal(back, expected)


def test_where_most_rows_are_read_all_are_computed() -> None:
    total = sum(LENGTHS)
    for number in (0, 1, 3 * total // 4, 3 * total // 4 + 1, total):
        rows = torch.arange(number)
        batch = make_batch(
            mlm_positions=rows, mlm_labels=torch.full_like(rows, 7), sbo_left=NONE, sbo_right=NONE
        )
        is_part = 4 * number <= 3 * total
        assert (ReadRows.of(batch) is not None) == is_part
        assert ReadRows.count(batch) == (number if is_part else total)


def test_the_work_that_is_reported_is_the_work_that_is_done() -> None:
    """Of a forward pass. Torch sees no product inside of our operators, but for the table of span
    offsets one that the report leaves out.
    """
    model, batch = make_model(0.0, layers=3), make_batch()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.forward_packed(batch)
    attention = 3 * 2 * 2 * 16 * sum(length**2 for length in LENGTHS)
    decoder = 2 * (len(batch.mlm_labels) + len(batch.sbo_targets)) * 16 * 50
    offsets = 2 * model.config.max_span_targets * 8 * 16
    found = counter.get_total_flops() + attention + decoder - offsets
    assert found == model_flops(model.config, batch) / 3
