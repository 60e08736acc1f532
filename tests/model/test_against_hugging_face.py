"""Hugging Face's BERT with the same random weights is the judge of shapes, numbers and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel

from spanbert_fast.config import Config
from spanbert_fast.model.pretrained import Model

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def twin_of(model: Model, attention: str = "eager") -> BertForMaskedLM:
    """Hugging Face's model with the weights of ours."""
    values = model.config.to_dict()
    twin = BertForMaskedLM(BertConfig(**values, attn_implementation=attention)).to(model.dtype)
    weights = {name: w for name, w in model.state_dict().items() if "span_boundary" not in name}
    twin.load_state_dict(weights)
    return twin.eval()


def inputs_of(padded: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: padded[name] for name in ("input_ids", *names)}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "names",
    [(), ("attention_mask",), ("token_type_ids",), ("attention_mask", "token_type_ids", "labels")],
    ids=["whole rows", "ragged", "token types", "labels"],
)
def test_masked_lm(
    model: Model,
    padded: dict[str, Tensor],
    names: tuple[str, ...],
    attention: str,
    dtype: torch.dtype,
) -> None:
    model.to(dtype).set_attn_implementation(attention)
    inputs = inputs_of(padded, *names)
    ours = model(**inputs, output_hidden_states=True)
    theirs = twin_of(model)(**inputs, output_hidden_states=True)
    kept = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    close = {"rtol": 0, "atol": TOLERANCE[dtype]}
    pairs = zip(
        (ours.logits, *ours.hidden_states), (theirs.logits, *theirs.hidden_states), strict=True
    )
    for mine, judge in pairs:
        torch.testing.assert_close(mine[kept], judge[kept], **close)
        assert not mine[~kept].any()
    if "labels" in names:
        torch.testing.assert_close(ours.loss, theirs.loss, **close)
        torch.testing.assert_close(ours.mlm_loss, theirs.loss.detach(), **close)


def test_gradients(model: Model, padded: dict[str, Tensor]) -> None:
    inputs = inputs_of(padded, "attention_mask", "token_type_ids", "labels")
    twin = twin_of(model)
    model.train()(**inputs).loss.backward()
    twin.train()(**inputs).loss.backward()
    theirs = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        if "span_boundary" in name:
            assert parameter.grad is not None
            assert not parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad, theirs[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_probabilities_and_states_are_on_the_way(
    model: Model, padded: dict[str, Tensor], attention: str
) -> None:
    """Whatever the attention, and with a gradient, as people who explain models ask for them."""
    inputs = inputs_of(padded, "attention_mask", "token_type_ids", "labels")
    wanted = {"output_attentions": True, "output_hidden_states": True}
    twin = twin_of(model)
    twin.set_attn_implementation("eager")
    model.set_attn_implementation(attention)
    kept = inputs["attention_mask"].bool()
    grads = []
    for each in (model, twin):
        output = each(**inputs, **wanted)
        seen = [*output.attentions, *output.hidden_states]
        for value in seen:
            value.retain_grad()
        output.loss.backward()
        grads.append([value.grad for value in seen])
    num_layers = model.config.num_hidden_layers
    for index, (mine, judge) in enumerate(zip(*grads, strict=True)):
        mask = (
            kept[:, None, :, None] * kept[:, None, None] if index < num_layers else kept[..., None]
        )
        torch.testing.assert_close(mine * mask, judge * mask, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "holes"])
def test_any_mask(model: Model, padded: dict[str, Tensor], side: str) -> None:
    mask = padded["attention_mask"].flip(1)
    if side == "holes":
        mask = padded["attention_mask"] * (torch.arange(14) % 3 != 1)
    inputs = inputs_of(padded) | {"attention_mask": mask, "output_attentions": True}
    model.set_attn_implementation("eager")
    ours, theirs = model(**inputs), twin_of(model)(**inputs)
    kept = mask.bool()
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(ours.logits[kept], theirs.logits[kept], **close)
    for mine, judge in zip(ours.attentions, theirs.attentions, strict=True):
        # Hugging Face gives padding a distribution as well; ours is zero there.
        wanted = judge * kept[:, None, :, None]
        torch.testing.assert_close(mine, wanted, **close)


def test_backbone_is_bert_model(model: Model, padded: dict[str, Tensor]) -> None:
    twin = BertModel(BertConfig(**model.config.to_dict()), add_pooling_layer=False).double()
    twin.load_state_dict(model.bert.state_dict())
    inputs = inputs_of(padded, "attention_mask", "token_type_ids")
    ours, theirs = model.bert(**inputs), twin.eval()(**inputs)
    kept = inputs["attention_mask"].bool()
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(ours.last_hidden_state[kept], theirs[0][kept], **close)
    assert ours.pooler_output is None
    assert ours.attentions is None
    as_tuple = model.bert(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], ours.last_hidden_state)


def test_given_vectors_and_positions(model: Model, padded: dict[str, Tensor]) -> None:
    twin = twin_of(model)
    inputs: dict[str, Any] = {
        "inputs_embeds": torch.randn(4, 14, 32, dtype=torch.float64),
        "attention_mask": padded["attention_mask"],
        "position_ids": torch.arange(14)[None] + 3,
    }
    kept = padded["attention_mask"].bool()
    ours, theirs = model(**inputs).logits, twin(**inputs).logits
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_good_as_theirs(
    model: Model, padded: dict[str, Tensor], dtype: torch.dtype
) -> None:
    inputs = inputs_of(padded, "attention_mask")
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        exact = model(**inputs).logits[kept]
        model.to(dtype)
        twin = twin_of(model)
        assert model(**inputs).logits.dtype == dtype
        ours, theirs = (m(**inputs).logits[kept].double() for m in (model, twin))
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_outputs_as_tuple(model: Model, padded: dict[str, Tensor]) -> None:
    output = model(**padded)
    assert list(output) == ["loss", "logits", "mlm_loss", "sbo_loss", "sbo_logits"]
    as_tuple = model(**padded, return_dict=False)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, output.values(), strict=True))


def test_initial_weights_follow_the_same_law() -> None:
    config = Config(vocab_size=500, hidden_size=96, num_hidden_layers=1, intermediate_size=200)
    torch.manual_seed(0)
    ours = Model(config).state_dict()
    theirs = BertForMaskedLM(BertConfig(**config.to_dict())).state_dict()
    assert theirs.keys() <= ours.keys()
    for name, weight in theirs.items():
        assert ours[name].shape == weight.shape
        # Both are samples of one law, or constant: five standard errors of mean and deviation.
        slack = 5 * 0.02 * (2 / weight.numel()) ** 0.5 + 1e-7
        assert float(ours[name].mean()) == pytest.approx(float(weight.mean()), abs=slack)
        assert float(ours[name].std()) == pytest.approx(float(weight.std()), abs=slack)
    assert not ours["bert.embeddings.word_embeddings.weight"][0].any()
    assert not ours["cls.span_boundary.bias"].any()
    assert float(ours["cls.span_boundary.position_embeddings.weight"].std()) == pytest.approx(
        0.02, rel=0.1
    )
