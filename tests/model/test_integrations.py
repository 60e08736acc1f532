"""Adapters, hooks, activation checkpointing, torch.compile: what other code does to the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.model.encoder import Layer
from spanbert_fast.model.inputs import pack_inputs
from spanbert_fast.model.pretrained import Model

Gradients = Callable[[Model], dict[str, Tensor]]
EVERY_PRODUCT = [
    "bert.encoder.layer.0.attention.self.query",
    "bert.encoder.layer.0.attention.self.value",
    "bert.encoder.layer.1.attention.output.dense",
    "bert.encoder.layer.1.intermediate.dense",
    "bert.encoder.layer.1.output.dense",
    "cls.predictions.transform.dense",
    "cls.span_boundary.transform1.dense",
    "cls.span_boundary.transform2.dense",
]


class LowRank(nn.Module):
    """A LoRA layer as PEFT writes it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.zeros(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.base_layer(rows) + rows @ self.down.t() @ self.up.t()
        return result


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", EVERY_PRODUCT)
def test_adapters_are_called(model: Model, padded: dict[str, Tensor], name: str) -> None:
    before = model(**padded)
    parent = model.get_submodule(name.rpartition(".")[0])
    base = model.get_submodule(name)
    assert isinstance(base, nn.Linear)
    adapter = LowRank(base)
    setattr(parent, name.rpartition(".")[2], adapter)
    output = model(**padded)
    torch.testing.assert_close(output.loss, before.loss, rtol=0, atol=1e-10)
    output.loss.backward()
    assert adapter.up.grad is not None
    assert adapter.up.grad.abs().max() > 0
    with torch.no_grad():
        adapter.up.normal_()
    assert (model(**padded).loss - before.loss).abs() > 1e-6


@pytest.mark.parametrize(
    "name",
    [*EVERY_PRODUCT, "bert.embeddings.word_embeddings", "cls.span_boundary.position_embeddings"],
)
def test_hooks_fire(model: Model, padded: dict[str, Tensor], name: str) -> None:
    before = model(**padded).loss
    module = model.get_submodule(name)
    module.register_forward_hook(lambda _module, _inputs, output: output * 1)
    torch.testing.assert_close(model(**padded).loss, before, rtol=0, atol=1e-10)
    module.register_forward_hook(lambda _module, _inputs, output: output * 2)
    assert (model(**padded).loss - before).abs() > 1e-6


def test_parametrizations_act(model: Model, padded: dict[str, Tensor]) -> None:
    before = model(**padded).loss
    query = model.bert.encoder.layer[0].attention.self.query
    parametrize.register_parametrization(query, "weight", Doubled())
    assert (model(**padded).loss - before).abs() > 1e-6


class Rounded(Tensor):
    """A weight in another form, which knows products and nothing else: a quantizer's."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> Rounded:
        return Tensor._make_subclass(cls, weight)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return [], None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.cat:
            raise NotImplementedError("cat")
        args = [arg.as_subclass(Tensor) if isinstance(arg, Rounded) else arg for arg in args]
        return func(*args, **kwargs or {})


def test_quantized_weights_are_left_to_their_module(
    model: Model, padded: dict[str, Tensor]
) -> None:
    before = model(**padded)
    for module in model.bert.encoder.modules():
        if isinstance(module, nn.Linear):
            module._parameters["weight"] = Rounded(module.weight.detach())  # type: ignore[assignment]
    output = model(**padded)
    torch.testing.assert_close(output.loss, before.loss, rtol=0, atol=1e-10)


def test_a_decoder_that_must_be_called_is_refused(model: Model, padded: dict[str, Tensor]) -> None:
    model.cls.predictions.decoder.register_forward_hook(lambda _m, _i, output: output)
    with pytest.raises(TypeError, match=r"cls\.predictions\.decoder must be a plain nn\.Linear"):
        model(**padded)


@pytest.fixture
def dropping(config: Config) -> Model:
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.2
    return Model(config).double().train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(
    dropping: Model, padded: dict[str, Tensor], gradients: Gradients, reentrant: bool
) -> None:
    seed = torch.tensor(9)
    dropping(**padded, dropout_seed=seed).loss.backward()
    expected = gradients(dropping)
    calls = []
    layer = dropping.bert.encoder.layer[0]
    assert isinstance(layer, Layer)
    compute = layer._compute
    layer._compute = lambda *a: (calls.append(1), compute(*a))[1]  # type: ignore[method-assign]
    dropping.activation_checkpointing_enable({"use_reentrant": reentrant})
    dropping.zero_grad()
    dropping(**padded, dropout_seed=seed).loss.backward()
    assert len(calls) == 2
    for name, grad in gradients(dropping).items():
        assert torch.equal(grad, expected[name])
    dropping.activation_checkpointing_disable()
    dropping(**padded, dropout_seed=seed).loss.backward()
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_old_name_and_every_second_layer(dropping: Model) -> None:
    def flags() -> list[bool]:
        return [layer.gradient_checkpointing for layer in dropping.bert.encoder.layer]

    dropping.gradient_checkpointing_enable()
    assert flags() == [True, True]
    dropping.activation_checkpointing_disable()
    assert flags() == [False, False]
    dropping.activation_checkpointing_enable(every_n_layers=2)
    assert flags() == [True, False]


@pytest.fixture
def packed(config: Config, padded: dict[str, Tensor]) -> PackedBatch:
    return pack_inputs(config, **padded).batch


@pytest.mark.parametrize("untrained", [[], ["mlm", "sbo"]])
def test_compiled_step_without_graph_break(
    dropping: Model, packed: PackedBatch, gradients: Gradients, untrained: list[str]
) -> None:
    """A graph break would also be the sign of a host synchronisation: none of them traces."""
    seed = torch.tensor(9)
    dropping.forward_packed(packed, dropout_seed=seed).loss.backward()
    expected = gradients(dropping)
    dropping.zero_grad()
    dropping.config.untrained_heads = untrained
    step = torch.compile(dropping.forward_packed, fullgraph=True, backend="aot_eager")
    output = step(packed, dropout_seed=seed)
    output.loss.backward()
    assert dropping.config.untrained_heads == []
    for name, grad in gradients(dropping).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-12)
    torch._dynamo.reset()


def test_attention_can_be_chosen(config: Config) -> None:
    for name in ("sdpa", "eager"):
        model = Model._from_config(config, attn_implementation=name)
        assert model.config._attn_implementation == name
    for name in ("flash_attention_2", "flex_attention", "kernels-community/flash-attn", "x"):
        with pytest.raises(ValueError, match=rf'="{name}".*one of \(\'sdpa\', \'eager\'\)'):
            model.set_attn_implementation(name)
        with pytest.raises(ValueError, match="is not supported: it must be one of"):
            Model._from_config(config, attn_implementation=name)


def test_autocast_trains(dropping: Model, padded: dict[str, Tensor]) -> None:
    model = dropping.float()
    exact = model(**padded, dropout_seed=torch.tensor(1)).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**padded, dropout_seed=torch.tensor(1), output_hidden_states=True)
    assert {state.dtype for state in output.hidden_states} == {torch.bfloat16}
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, exact, rtol=0.02, atol=0)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_same_step_twice_is_bitwise_equal(
    dropping: Model, packed: PackedBatch, gradients: Gradients
) -> None:
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            dropping.zero_grad()
            dropping.forward_packed(packed, dropout_seed=torch.tensor(2)).loss.backward()
            results.append(gradients(dropping))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(grad, results[1][name]) for name, grad in results[0].items())
