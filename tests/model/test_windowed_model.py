"""A model with an attention window: every path sees the same keys, and no path sees others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel

import spanbert_fast as sf
from spanbert_fast.config import Config
from spanbert_fast.model.graph import trace
from spanbert_fast.model.inputs import pack_inputs
from spanbert_fast.model.pretrained import Model

WINDOW = 3


@pytest.fixture
def windowed(model: Model) -> Model:
    """The model of the other tests, whose tokens see three neighbours on each side."""
    model.config.attention_window = WINDOW
    return model


def judge(model: Model, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden state of transformers' own BERT under a mask that says who sees whom."""
    config = BertConfig(**{**model.config.to_dict(), "attn_implementation": "eager"})
    bert = BertModel(config, add_pooling_layer=False).double().eval()
    bert.load_state_dict(model.bert.state_dict(), strict=False)
    places = torch.arange(inputs["input_ids"].shape[1])
    near = (places[:, None] - places).abs() <= WINDOW
    seen = near & inputs["attention_mask"].bool()[:, None, :]
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill_(~seen, float("-inf"))
    # A row of padding sees nothing; what it gets does not matter, but must not be NaN.
    bias[seen.sum(-1) == 0] = 0.0
    given = {name: inputs[name] for name in ("input_ids", "token_type_ids")}
    hidden = bert(**given, attention_mask=bias[:, None]).last_hidden_state
    return hidden * inputs["attention_mask"][..., None]


def encoder_inputs(padded: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: padded[k] for k in ("input_ids", "attention_mask", "token_type_ids")}


@torch.no_grad()
def test_hugging_face_with_a_banded_mask_agrees(windowed: Model, padded: dict[str, Tensor]) -> None:
    inputs = encoder_inputs(padded)
    expected = judge(windowed, inputs)
    found = windowed.bert(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    windowed.config.attention_window = None
    assert not torch.allclose(windowed.bert(**inputs).last_hidden_state, expected)


def test_eager_has_zeros_beyond_the_window(windowed: Model, padded: dict[str, Tensor]) -> None:
    """And the same loss and gradients, dropout included."""
    for part in windowed.bert.encoder.layer:
        part.attention.self.dropout_p = 0.2
    windowed.config.attention_probs_dropout_prob = 0.2
    seen = []
    for wants in (False, True):
        windowed.train().zero_grad()
        output = windowed(**padded, dropout_seed=torch.tensor(3), output_attentions=wants)
        output.loss.backward()
        seen.append([output.loss, *(p.grad for p in windowed.parameters() if p.grad is not None)])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    places = torch.arange(14)
    far = (places[:, None] - places).abs() > WINDOW
    for probabilities in output.attentions:
        assert not probabilities[..., far].any()
        assert probabilities[0][..., ~far].count_nonzero() > 0.6 * 4 * int((~far).sum())


@torch.no_grad()
def test_the_folder_keeps_it_and_plain_transformers_ignores_it(
    windowed: Model, padded: dict[str, Tensor], tmp_path: Path
) -> None:
    windowed.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention_window"] == WINDOW
    inputs = encoder_inputs(padded)
    logits = windowed(**inputs).logits
    ours = Model.from_pretrained(tmp_path)
    assert ours.config.attention_window == WINDOW
    assert torch.equal(ours(**inputs).logits, logits)
    whole = Model.from_pretrained(tmp_path, attention_window=None)
    plain = BertForMaskedLM.from_pretrained(tmp_path)
    kept = inputs["attention_mask"].bool()
    # Documented: the field is kept there, and nobody reads it.
    assert plain.config.attention_window == WINDOW
    expected = plain(**inputs).logits[kept]
    torch.testing.assert_close(whole(**inputs).logits[kept], expected, rtol=1e-8, atol=1e-8)
    report = str(sf.patch(plain))
    assert "varlen_attention, window 3" in report
    torch.testing.assert_close(plain(**inputs).logits[kept], logits[kept], rtol=1e-8, atol=1e-8)


def test_patch_refuses_a_window_that_is_not_ours() -> None:
    shape = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=9, num_hidden_layers=1, attention_window=[512], **shape)
    with pytest.raises(ValueError, match=r"attention_window of a patched BERT .* got \[512\]"):
        sf.patch(BertModel(config))


@torch.no_grad()
def test_the_exported_graph_has_the_window(windowed: Model, padded: dict[str, Tensor]) -> None:
    inputs = encoder_inputs(padded)
    program = trace(windowed.float(), ["last_hidden_state"])
    (found,) = program.module()(**inputs)
    torch.testing.assert_close(found, windowed.bert(**inputs).last_hidden_state)


def test_a_compiled_step_has_the_window(windowed: Model, padded: dict[str, Tensor]) -> None:
    batch = dataclasses.replace(pack_inputs(windowed.config, **padded).batch, num_items=7)
    windowed.float().train()
    compiled: Any = torch.compile(windowed.forward_packed, backend="aot_eager", fullgraph=True)
    losses = [step(batch).loss for step in (windowed.forward_packed, compiled)]
    grads = [torch.autograd.grad(loss, windowed.bert.parameters()) for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_nothing_beyond_the_reach_matters(windowed: Model) -> None:
    """Two layers see twice the window: a change farther away changes nothing, to the bit."""
    ids = torch.arange(5, 35)[None]
    other = ids.clone()
    other[0, 20] = 40
    with torch.no_grad():
        one, two = (windowed.bert(row).last_hidden_state[0] for row in (ids, other))
    changed = (one != two).any(-1).nonzero()[:, 0].tolist()
    assert changed == list(range(20 - 2 * WINDOW, 20 + 2 * WINDOW + 1))


def test_wrong_windows_are_named() -> None:
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=r"attention_window must be None or at least 1"):
            Config(attention_window=wrong)
    with pytest.raises(ValueError, match="attention_window"):
        Config.from_dict({"attention_window": [512, 512]})
