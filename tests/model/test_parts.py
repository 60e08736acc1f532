"""A large batch that is encoded part by part on a CPU gives what one pass gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import spanbert_fast as sf
from spanbert_fast.batch import PackedBatch
from spanbert_fast.model import backbone
from spanbert_fast.model.parts import split_by_length
from spanbert_fast.tasks.texts import pack

LENGTHS = (5, 1, 12, 5, 30, 7, 5, 2)


@pytest.fixture
def batch() -> PackedBatch:
    return pack([torch.randint(5, 50, (length,)).tolist() for length in LENGTHS])


@pytest.fixture
def model() -> sf.Model:
    config = sf.Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
    )
    return sf.Model(config).double().eval()


@pytest.fixture
def calls(model: sf.Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass through the layers; parts are of 16 tokens at most."""
    monkeypatch.setattr(backbone, "PART_BYTES", 16 * 4 * 32)
    found: list[int] = []
    encode = model.bert._encode

    def counted(part: PackedBatch, *rest):
        found.append(part.num_tokens)
        return encode(part, *rest)

    monkeypatch.setattr(model.bert, "_encode", counted)
    return found


def padded(batch: PackedBatch) -> dict[str, Tensor]:
    parts = batch.input_ids.split(list(LENGTHS))
    ids = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def test_parts_are_of_neighbouring_lengths_and_hold_each_row_once(batch: PackedBatch) -> None:
    parts = list(split_by_length(batch, 16))
    lengths = [part.cu_seqlens.diff().tolist() for _, part in parts]
    assert lengths == [[1, 2, 5, 5], [5, 7], [12], [30]]
    assert torch.cat([rows for rows, _ in parts]).sort().values.tolist() == list(range(67))
    for rows, part in parts:
        assert torch.equal(part.input_ids, batch.input_ids[rows])
        assert torch.equal(part.position_ids, batch.position_ids[rows])
        assert part.max_seqlen == int(part.cu_seqlens.diff().max())
    assert [part.sequence_ids.tolist() for _, part in parts] == [[1, 7, 0, 3], [6, 5], [2], [4]]


@pytest.mark.parametrize("training", [False, True])
def test_states_are_those_of_one_pass(
    model: sf.Model, batch: PackedBatch, calls: list[int], training: bool
) -> None:
    """Under dropout, too: its bits belong to a sequence, not to a place in a batch."""
    model.train(training)
    seed = torch.tensor(3)
    expected = model.bert.encode_packed(batch, dropout_seed=seed, output_hidden_states=True)
    assert calls == [67]  # gradients: one pass
    with torch.no_grad():
        found = model.bert.encode_packed(batch, dropout_seed=seed, output_hidden_states=True)
        alone = model.bert.encode_packed(batch, dropout_seed=seed)
    assert calls[1:] == [13, 12, 12, 30] * 2
    assert found.hidden_states is not None
    assert expected.hidden_states is not None
    assert len(found.hidden_states) == 3
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-13)
    assert torch.equal(found.last_hidden_state, found.hidden_states[-1])
    assert torch.equal(found.last_hidden_state, alone.last_hidden_state)
    assert alone.hidden_states is None


def test_padded_shapes(model: sf.Model, batch: PackedBatch, calls: list[int]) -> None:
    inputs = padded(batch)
    expected = model(**inputs, output_hidden_states=True)
    with torch.inference_mode():
        found = model(**inputs, output_hidden_states=True)
        hidden = model.bert(**inputs).last_hidden_state
    assert len(calls) == 1 + 4 + 4
    torch.testing.assert_close(found.logits, expected.logits.detach(), rtol=1e-11, atol=1e-12)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(hidden, found.hidden_states[-1], rtol=0, atol=0)


def test_whoever_watches_sees_the_batch_once(
    model: sf.Model, batch: PackedBatch, calls: list[int]
) -> None:
    with torch.no_grad():
        seen: list[int] = []
        hook = model.bert.encoder.layer[0].register_forward_hook(
            lambda *call: seen.append(call[2][0].shape[0])
        )
        model.bert.encode_packed(batch)
        hook.remove()
        assert seen == [67]
        attentions = model.bert.encode_packed(batch, output_attentions=True).attentions
        embeds = model.get_input_embeddings()(padded(batch)["input_ids"])
        mask = padded(batch)["attention_mask"]
        given = model.bert(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        assert calls == [67] * 3
        found = model.bert(**padded(batch)).last_hidden_state
    assert attentions is not None
    assert len(attentions) == 2
    torch.testing.assert_close(given, found, rtol=1e-12, atol=1e-13)


def test_a_long_sequence_is_a_part_of_its_own_and_a_small_batch_is_none(
    model: sf.Model, calls: list[int]
) -> None:
    with torch.no_grad():
        model.bert.encode_packed(pack([[5] * 30]))
        model.bert.encode_packed(pack([[5] * 8, [6] * 8]))
        model.bert.encode_packed(pack([[5] * 9, [6] * 8]))
    assert calls == [30, 16, 8, 9]
