"""A patched model of Hugging Face gives the numbers that it gave before."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from model.patched_models import (
    CLOSE,
    HEADS,
    SHAPE,
    assert_close,
    assert_equal_gradients,
    batch,
    fit,
    labels_of,
    make,
    pair,
)
from torch import nn
from transformers import BertModel

import spanbert_fast as sf

ATTENTIONS = ("sdpa", "eager")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("head", HEADS)
def test_outputs_of_every_head(head: str, attention: str) -> None:
    theirs, ours = pair(head, attn_implementation=attention)
    inputs = batch()
    extra = labels_of(head, inputs)
    wanted = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    with torch.no_grad():
        a, b = (model(**fit(head, inputs), **extra, **wanted) for model in (theirs, ours))
    assert len(b.hidden_states) == 3
    assert len(b.get("attentions") or ()) == (2 if attention == "eager" else 0)
    assert_close(b, a, inputs["attention_mask"])
    if "last_hidden_state" in b:
        assert b.hidden_states[-1] is b.last_hidden_state


@pytest.mark.parametrize("head", [head for head in HEADS if head != "BertModel"])
def test_gradients_of_every_head(head: str) -> None:
    theirs, ours = pair(head)
    inputs = batch()
    for model in (theirs, ours):
        output = model.train()(**fit(head, inputs), **labels_of(head, inputs))
        # An answer's scores in the padding are the head's bias; see docs/patching.md.
        kept = inputs["attention_mask"]
        loss = output.loss if "loss" in output else (output.start_logits**2 * kept).sum()
        loss.backward()
    assert_equal_gradients(ours, theirs)


def test_scores_of_answers_in_the_padding_are_the_bias_of_the_head() -> None:
    theirs, ours = pair("BertForQuestionAnswering")
    inputs = batch()
    places = {"start_positions": torch.tensor([1, 2, 3, 0]), "end_positions": torch.tensor([2] * 4)}
    a, b = (model(**inputs, **places) for model in (theirs, ours))
    padding = inputs["attention_mask"] == 0
    bias = ours.qa_outputs.bias.detach()
    logits = []
    for index, name in enumerate(("start_logits", "end_logits")):
        assert torch.equal(b[name][padding], bias[index].expand(int(padding.sum())))
        logits.append(torch.where(padding, bias[index], a[name]))
    losses = [
        nn.functional.cross_entropy(scores, place)
        for scores, place in zip(logits, places.values(), strict=True)
    ]
    torch.testing.assert_close(b.loss, sum(losses) / 2, **CLOSE)


@pytest.mark.parametrize(
    "form", ["no mask", "token types", "positions", "given vectors", "holes", "bool mask", "all"]
)
@torch.no_grad()
def test_forms_of_input(form: str) -> None:
    theirs, ours = pair("BertForPreTraining", attn_implementation="eager")
    inputs: dict[str, Any] = batch()
    if form == "no mask":
        del inputs["attention_mask"], inputs["token_type_ids"]
    if form == "token types":
        del inputs["attention_mask"]
    if form in ("positions", "all"):
        inputs["position_ids"] = torch.arange(12)[None] + 3
    if form in ("given vectors", "all"):
        inputs["inputs_embeds"] = torch.randn(*inputs.pop("input_ids").shape, 32)
    if form in ("holes", "all"):
        inputs["attention_mask"] = inputs["attention_mask"] * (torch.arange(12) % 4 != 1)
    if form == "bool mask":
        inputs["attention_mask"] = inputs["attention_mask"].bool()
    mask = inputs.get("attention_mask", torch.ones(4, 12))
    flags = {"output_hidden_states": True, "output_attentions": True}
    assert_close(ours(**inputs, **flags), theirs(**inputs, **flags), mask)


@torch.no_grad()
def test_as_tuple_and_by_configuration() -> None:
    theirs, ours = pair("BertModel", attn_implementation="eager")
    inputs = batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for flags in ({"return_dict": False}, {"return_dict": False, "output_hidden_states": True}):
        a, b = theirs(ids, mask, **flags), ours(ids, mask, **flags)
        assert [type(part) for part in a] == [type(part) for part in b]
        torch.testing.assert_close(b[1], a[1], **CLOSE)
    for model in (theirs, ours):
        model.config.output_hidden_states = model.config.output_attentions = True
    assert_close(ours(ids, mask), theirs(ids, mask), mask)
    for model in (theirs, ours):
        model.config.return_dict = False
    assert len(ours(ids, mask)) == len(theirs(ids, mask)) == 5


@pytest.mark.parametrize("name", ["hidden_states", "attentions"])
def test_gradients_of_what_is_returned(name: str) -> None:
    """The layers read the very tensors that are returned."""
    theirs, ours = pair("BertModel", attn_implementation="eager")
    kept = batch()["attention_mask"].bool()
    gradients = []
    for model in (theirs, ours):
        output = model(**batch(), output_hidden_states=True, output_attentions=True)
        for value in output[name]:
            value.retain_grad()
        output.last_hidden_state[kept].pow(2).sum().backward()
        gradients.append([value.grad for value in output[name]])
    for a, b in zip(*gradients, strict=True):
        mask = kept[:, None, :, None] & kept[:, None, None, :] if name == "attentions" else kept
        mask = mask.expand_as(a) if name == "attentions" else mask
        slack = 1e-5 * max(1.0, float(a.abs().max()))
        torch.testing.assert_close(b[mask], a[mask], rtol=0, atol=slack)
        assert a[mask].abs().max() > 0


@torch.no_grad()
def test_some_hidden_states() -> None:
    """Hugging Face's own recorder decides which states are kept, by its version."""
    theirs, ours = pair("BertModel")
    inputs = batch()
    a, b = (model(**inputs, output_hidden_states=[1]).hidden_states for model in (theirs, ours))
    assert [value is None for value in b] == [value is None for value in a]
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(b[1][kept], a[1][kept], **CLOSE)


@torch.no_grad()
def test_pooler_takes_the_first_token_of_each_row() -> None:
    theirs, ours = pair("BertModel")
    inputs = batch()
    left = {name: value.clone() for name, value in inputs.items()}
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        for name, value in left.items():
            value[row] = inputs[name][row].roll(12 - length)
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    pooled = ours(**left, position_ids=positions).pooler_output
    torch.testing.assert_close(pooled, theirs(**inputs).pooler_output, **CLOSE)


def test_the_vector_of_the_padding_token_does_not_learn() -> None:
    """Also where nobody masks it."""
    theirs, ours = pair("BertForMaskedLM", tie_word_embeddings=False)
    ids = batch()["input_ids"]
    ids[0, 3:] = 0
    for model in (theirs, ours):
        model.train()(input_ids=ids, labels=ids).loss.backward()
    assert_equal_gradients(ours, theirs)
    assert not ours.bert.embeddings.word_embeddings.weight.grad[0].any()


def test_dropout_is_drawn_from_the_default_generator() -> None:
    _, ours = pair(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    inputs = batch() | labels_of("BertForMaskedLM", batch())
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(ours.train()(**inputs).loss.item())
    assert losses[0] == losses[2] != losses[1]
    state = torch.get_rng_state()
    assert ours.eval()(**inputs).loss.item() == ours(**inputs).loss.item()
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_without_padding_is_that_of_padding() -> None:
    """The mask of an element depends on its sequence and place in it."""
    _, ours = pair(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    inputs = batch()
    kept = inputs["attention_mask"].bool()
    flat = {name: value[kept][None] for name, value in inputs.items() if name != "attention_mask"}
    flat["position_ids"] = torch.arange(12).expand(4, 12)[kept][None]
    logits = []
    for form in (inputs, flat):
        torch.manual_seed(5)
        logits.append(ours.train()(**form).logits)
    torch.testing.assert_close(logits[1][0], logits[0][kept], **CLOSE)


def test_dropout_is_that_of_our_model() -> None:
    """All masks of all layers: the same seed gives the same loss and gradients."""
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    _, ours = pair("BertForMaskedLM", **dropout)
    config = sf.Config(**(SHAPE | dropout))
    model = sf.Model(config)
    report = model.load_state_dict(ours.state_dict(), strict=False)
    assert all("span_boundary" in name for name in report.missing_keys)
    assert not report.unexpected_keys
    inputs = batch() | labels_of("BertForMaskedLM", batch())
    losses = []
    for each in (model, ours):
        torch.manual_seed(5)
        losses.append(each.train()(**inputs).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    expected = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_mean_over_dropout_is_that_of_hugging_face(name: str) -> None:
    """Each kind of dropout alone: as strong as theirs, in the same places."""
    theirs, ours = pair("BertModel", **{name: 0.3}, num_hidden_layers=1)
    inputs = {name: value[:1].repeat(4000, 1) for name, value in batch((6,)).items()}
    with torch.no_grad():
        a, b = (model.train()(**inputs).last_hidden_state for model in (theirs, ours))
    slack = 5 * a.std(0) * (2 / 4000) ** 0.5
    assert float(b.std(0).mean()) == pytest.approx(float(a.std(0).mean()), rel=0.05)
    assert ((a.mean(0) - b.mean(0)).abs() <= slack).all()


def test_parts_in_evaluation_mode_drop_nothing() -> None:
    _, ours = pair("BertModel", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    inputs = batch()
    expected = ours(**inputs).last_hidden_state
    ours.train()
    ours.embeddings.eval()
    ours.encoder.eval()
    assert torch.equal(ours(**inputs).last_hidden_state, expected)


def test_autocast() -> None:
    theirs, ours = pair("BertForMaskedLM")
    inputs = batch() | labels_of("BertForMaskedLM", batch())
    exact = theirs(**inputs).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours.train()(**inputs).loss
    torch.testing.assert_close(loss.float(), exact, rtol=0.03, atol=0)
    loss.backward()
    gradients = [parameter.grad for parameter in ours.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_another_dtype(dtype: torch.dtype) -> None:
    theirs, ours = pair("BertModel")
    inputs = batch()
    kept = inputs["attention_mask"].bool()
    exact = theirs.double()(**inputs).last_hidden_state[kept]
    a, b = (model.to(dtype)(**inputs).last_hidden_state[kept] for model in (theirs.float(), ours))
    assert b.dtype == dtype
    allowed = 2 * (a.double() - exact).abs().max() + 1e-12
    assert (b.double() - exact).abs().max() <= allowed


def test_state_and_classes_are_untouched() -> None:
    model = make("BertForPreTraining")
    parameters = dict(model.named_parameters())
    before = {name: type(module) for name, module in model.named_modules()}
    keys, forward = list(model.state_dict()), model.bert.forward.__func__
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    report = sf.patch(model)
    assert isinstance(model.bert, BertModel)
    assert type(model.bert).__name__ == "BertModel"
    assert list(model.state_dict()) == keys
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert sf.patch(model) == report
    changed = {name for name, module in model.named_modules() if type(module) is not before[name]}
    assert {module.name for module in report.modules} < changed
    assert "bert.encoder.layer.1.attention.self.query" not in changed
    sf.unpatch(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert model.bert.forward.__func__ is forward


def test_optimizer_made_before() -> None:
    theirs, ours = make(), make()
    ours.load_state_dict(theirs.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (theirs, ours)]
    sf.patch(ours)
    inputs = batch() | labels_of("BertForMaskedLM", batch())
    for model, optimizer in zip((theirs, ours), optimizers, strict=True):
        model.train()(**inputs).loss.backward()
        optimizer.step()
    sf.unpatch(ours)
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss, **CLOSE)


def test_report() -> None:
    report = sf.patch(make("BertForMaskedLM", num_hidden_layers=3))
    text = str(report)
    assert text.startswith("BertForMaskedLM, patched:\n")
    assert re.search(r"bert\.encoder\.layer\.\{0-2\}\.attention\.self +\S+ +varlen_attention", text)
    runs = {module.name: module.runs for module in report.modules}
    assert runs["bert.embeddings"] == "bert_embedding"
    assert runs["bert.encoder.layer.2.intermediate"] == "bias_gelu"
    assert str(sf.patch(make("BertModel"))).splitlines()[1].startswith("  (the model) ")
