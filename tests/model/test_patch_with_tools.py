"""A patched model under what else is done to models: adapters, hooks, saving, copies, compilers."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from model.patched_models import (
    CLOSE,
    assert_close,
    assert_equal_gradients,
    batch,
    labels_of,
    make,
    pair,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)
from transformers.models.bert.modeling_bert import BertLayer

import spanbert_fast as sf

HEAD = "BertForMaskedLM"
LEAVES = [
    "bert.embeddings",
    "bert.embeddings.word_embeddings",
    "bert.embeddings.position_embeddings",
    "bert.embeddings.token_type_embeddings",
    "bert.embeddings.LayerNorm",
    "bert.embeddings.dropout",
    "bert.encoder",
    "bert.encoder.layer.1",
    "bert.encoder.layer.0.attention.self",
    "bert.encoder.layer.0.attention.self.query",
    "bert.encoder.layer.0.attention.output.dense",
    "bert.encoder.layer.0.attention.output.LayerNorm",
    "bert.encoder.layer.0.attention.output.dropout",
    "bert.encoder.layer.1.intermediate.dense",
    "bert.encoder.layer.1.intermediate.intermediate_act_fn",
    "bert.encoder.layer.1.output.dense",
    "bert.encoder.layer.1.output.LayerNorm",
]


def learning() -> dict[str, Tensor]:
    return batch() | labels_of(HEAD, batch())


@pytest.mark.parametrize("name", LEAVES)
def test_every_module_is_called_if_it_has_a_hook(name: str) -> None:
    models = pair(HEAD)
    calls: list[str] = []
    for model in models:
        module = model.get_submodule(name)

        def halve(_module: nn.Module, _inputs: object, output: Any) -> Any:
            calls.append(name)
            if isinstance(output, tuple):
                return (output[0] / 2, *output[1:])
            return output if name == "bert.encoder" else output / 2

        module.register_forward_hook(halve)
        model.train()(**learning()).loss.backward()
    assert len(calls) == 2
    assert_equal_gradients(models[1], models[0])
    if name.endswith("query"):
        assert "query (torch.Linear with hooks)" in str(sf.patch(models[1]))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", [name for name in LEAVES if name.endswith(("dense", "query"))])
def test_parametrizations_act(name: str) -> None:
    theirs, ours = pair(HEAD)
    for model in (theirs, ours):
        parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())
    a, b = (model(**batch()).logits for model in (theirs, ours))
    kept = batch()["attention_mask"].bool()
    torch.testing.assert_close(b[kept], a[kept], **CLOSE)


class ByteLinear(nn.Module):
    """A product as quantizers put it in: no `nn.Linear`, no float weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = base.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Buffer((base.weight / self.scale).round().to(torch.int8))
        self.bias = nn.Buffer(base.bias)

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.weight * self.scale, self.bias)


class DoubledTensor(Tensor):
    """A weight that is no ordinary tensor, as torchao and distributed tensors are."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            plain = [each.as_subclass(Tensor) if type(each) is cls else each for each in args]
            if function is nn.functional.linear:
                plain[1] = plain[1] * 2
            return function(*plain, **(kwargs or {}))


@pytest.mark.parametrize("form", ["module", "tensor"])
@torch.no_grad()
def test_quantized_products_are_called(form: str) -> None:
    theirs, ours = pair(HEAD)
    for model in (theirs, ours):
        for name, module in list(model.bert.encoder.named_modules()):
            if not isinstance(module, nn.Linear):
                continue
            if form == "tensor":
                weight = module.weight.detach().as_subclass(DoubledTensor)
                module._parameters["weight"] = weight
                continue
            parent, _, own = name.rpartition(".")
            setattr(model.bert.encoder.get_submodule(parent), own, ByteLinear(module))
    reason = "torch.Linear of other tensors)" if form == "tensor" else "ByteLinear)"
    runs = {module.name: module.runs for module in sf.patch(ours).modules}
    assert runs["bert.encoder.layer.0.intermediate"].endswith(reason)
    assert_close(ours(**batch()), theirs(**batch()), batch()["attention_mask"])
    assert (ours(**batch()).logits - make(HEAD)(**batch()).logits).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("order", ["patch, then PEFT", "PEFT, then patch"])
@pytest.mark.parametrize("targets", [None, "all-linear", ["word_embeddings", "query"]])
def test_lora(order: str, targets: Any) -> None:
    theirs, ours = make(HEAD), make(HEAD)
    ours.load_state_dict(theirs.state_dict())
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    if order == "patch, then PEFT":
        sf.patch(ours)
    theirs, ours = get_peft_model(theirs, settings), get_peft_model(ours, settings)
    ours.load_state_dict(theirs.state_dict())
    report = sf.patch(ours)
    assert "called: query (peft.Linear)" in str(report) or targets == "all-linear"
    learned = []
    for model in (theirs, ours):
        model.train()(**learning()).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in name and grad.abs().max() > 0 for name, grad in grads.items())
        learned.append(grads)
    assert len(learned[1]) >= 4
    assert learned[0].keys() == learned[1].keys()
    for name, gradient in learned[1].items():
        torch.testing.assert_close(gradient, learned[0][name], rtol=1e-4, atol=1e-5)
    a, b = (model.merge_and_unload().eval()(**batch()).logits for model in (theirs, ours))
    kept = batch()["attention_mask"].bool()
    torch.testing.assert_close(b[kept], a[kept], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_activation_checkpointing(reentrant: bool) -> None:
    _, ours = pair(HEAD, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    expected = copy.deepcopy(ours)
    calls: list[int] = []
    for model in (expected, ours):
        if model is ours:
            enable = getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": reentrant})
            dense = ours.bert.encoder.layer[0].output.dense
            dense.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(3)
        model.train()(**learning()).loss.backward()
    assert len(calls) == 2
    assert_equal_gradients(ours, expected)


@torch.no_grad()
def test_saved_as_if_it_had_never_been_patched(tmp_path: Path) -> None:
    for head in (HEAD, "BertModel"):
        theirs, ours = pair(head)
        for name, model in (("theirs", theirs), ("ours", ours)):
            model.save_pretrained(tmp_path / head / name)
        files = sorted(path.name for path in (tmp_path / head / "ours").iterdir())
        assert files == ["config.json", "model.safetensors"]
        for file in files:
            contents = [(tmp_path / head / name / file).read_bytes() for name in ("theirs", "ours")]
            assert contents[0] == contents[1]
        loaded = type(ours).from_pretrained(tmp_path / head / "ours").eval()
        assert type(loaded) is type(theirs)
        a, b = loaded(**batch())[0], theirs(**batch())[0]
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    automatic = AutoModelForMaskedLM.from_pretrained(tmp_path / HEAD / "ours")
    sf.patch(automatic)
    assert type(type(ours)(ours.config)) is BertModel


@torch.no_grad()
def test_copies_and_pickles_are_patched_as_well() -> None:
    theirs, ours = pair("BertModel")
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(ours),
        copy.copy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    )
    expected = theirs(**batch())
    for each in copies:
        assert type(each) is type(ours)
        assert sf.patch(each) == sf.patch(ours)
        assert_close(each(**batch()), expected, batch()["attention_mask"])
    sf.unpatch(copies[0])
    assert type(copies[0]) is BertModel
    assert type(ours) is not BertModel
    assert torch.equal(copies[0](**batch())[0], expected[0])


class PatchedClassifier(BertForSequenceClassification):
    """How someone patches once and for all."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        sf.patch(self)


class PatchedEncoder(BertModel):
    """The same for the encoder itself."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        sf.patch(self)


@pytest.mark.parametrize("kind", [PatchedClassifier, PatchedEncoder])
@torch.no_grad()
def test_patched_in_init(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    theirs = make(kind.__base__.__name__, attn_implementation="eager")
    theirs.save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path, attn_implementation="eager").eval()
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    wanted = batch() | {"output_hidden_states": True, "output_attentions": True}
    for each in (model, again, copy.deepcopy(model), pickle.loads(pickle.dumps(again))):
        assert isinstance(each, kind)
        assert_close(each(**wanted), theirs(**wanted), batch()["attention_mask"])


@torch.no_grad()
def test_parts_called_directly_do_what_they_did() -> None:
    theirs, ours = pair("BertModel")
    ids = batch()["input_ids"]
    states = []
    for model in (theirs, ours):
        embedded = model.embeddings(input_ids=ids)
        encoded = model.encoder(embedded).last_hidden_state
        first = model.encoder.layer[0]
        mixed = first.attention(embedded)[0]
        states.append([embedded, encoded, mixed, first(embedded), first.intermediate(mixed)])
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


def test_a_layer_put_in_later_is_noticed() -> None:
    theirs, ours = pair(HEAD)
    for model in (theirs, ours):
        layer = BertLayer(model.config, layer_idx=1)
        layer.load_state_dict(model.bert.encoder.layer[0].state_dict())
        model.bert.encoder.layer[1] = layer
    with pytest.raises(TypeError, match=r"BertLayer that was put in after sf\.patch; call sf\.pat"):
        ours(**batch())
    sf.patch(ours)
    assert_close(ours(**batch()), theirs.eval()(**batch()), batch()["attention_mask"])


@torch.no_grad()
def test_fewer_layers_and_a_larger_vocabulary() -> None:
    theirs, ours = pair(HEAD)
    for model in (theirs, ours):
        torch.manual_seed(0)
        model.bert.encoder.layer = model.bert.encoder.layer[1:]
        model.resize_token_embeddings(70, mean_resizing=False)
    inputs = batch() | {"input_ids": batch()["input_ids"] + 6}
    assert_close(ours(**inputs), theirs(**inputs), inputs["attention_mask"])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled() -> None:
    theirs, ours = pair(HEAD, num_hidden_layers=1)
    compiled = torch.compile(ours, backend="aot_eager")
    output = compiled(**learning())
    output.loss.backward()
    theirs(**learning()).loss.backward()
    assert_equal_gradients(ours, theirs)
    torch._dynamo.reset()
