"""What cannot be patched, or cannot be asked of a patched model, is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model.patched_models import batch, make, pair
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    RobertaConfig,
    RobertaModel,
)
from transformers.models.bert.modeling_bert import BertSelfAttention

import spanbert_fast as sf

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


class OwnAttention(BertSelfAttention):
    """Somebody's variant."""


class OwnForward(BertModel):
    """Somebody's variant of the whole."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_decoder": True}, "is_decoder must be False, got True"),
        ({"position_embedding_type": "relative_key"}, "position_.* got 'relative_key'"),
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu' or 'gelu_python', got 'relu'"),
        ({"hidden_act": "gelu_new"}, "hidden_act must be .* got 'gelu_new'"),
        (
            {"attn_implementation": "flex_attention"},
            "attn_implementation must be 'sdpa' or 'eager'",
        ),
    ],
)
def test_configurations(settings: dict[str, Any], message: str) -> None:
    model = make("BertForMaskedLM", **settings)
    before = classes(model)
    with pytest.raises(ValueError, match=f"patch cannot serve bert: {message}"):
        sf.patch(model)
    assert classes(model) == before


def test_cross_attention_and_a_decoder_beside_an_encoder() -> None:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**SMALL), BertConfig(**SMALL, is_decoder=True, add_cross_attention=True)
    )
    model = EncoderDecoderModel(config)
    before = classes(model)
    with pytest.raises(ValueError, match=r"cannot serve decoder\.bert: is_decoder must be False"):
        sf.patch(model)
    assert classes(model) == before
    sf.patch(model.encoder)
    assert classes(model.decoder) == classes(EncoderDecoderModel(config).decoder)
    model.decoder.config.is_decoder = False
    with pytest.raises(ValueError, match="add_cross_attention must be False"):
        sf.patch(model)


def test_no_bert() -> None:
    shape = SMALL | {"max_position_embeddings": 40}
    for model in (nn.Linear(2, 2), RobertaModel(RobertaConfig(**shape))):
        name = type(model).__name__
        with pytest.raises(ValueError, match=f"must contain a transformers BertModel, got {name}"):
            sf.patch(model)
    with pytest.raises(ValueError, match="must be patched, got BertModel with nothing to undo"):
        sf.unpatch(make("BertModel"))


def test_modules_of_somebody_else() -> None:
    model = make("BertForMaskedLM")
    place = model.bert.encoder.layer[1].attention
    place.self = OwnAttention(model.config)
    before = classes(model)
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.1\.attention\.self: .*OwnAttent"):
        sf.patch(model)
    assert classes(model) == before
    with pytest.raises(ValueError, match=r"must be a BertModel of transformers, got .*OwnForward"):
        sf.patch(OwnForward(BertConfig(**SMALL)))


def test_a_forward_that_was_replaced() -> None:
    model = make("BertForMaskedLM")
    layer = model.bert.encoder.layer[0]
    layer.forward = layer.forward
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.0: something else replaced its"):
        sf.patch(model)


def test_an_activation_that_was_replaced() -> None:
    model = make("BertForMaskedLM")
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.GELU("tanh")
    with pytest.raises(
        ValueError, match=r"layer\.1\.intermediate: .* must be GELU, got GELU\(appr"
    ):
        sf.patch(model)
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.GELU()
    sf.patch(model)


class Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


def test_unpatch_after_another_change_of_class() -> None:
    model = make("BertForMaskedLM")
    sf.patch(model)
    layer = model.bert.encoder.layer[0]
    layer.scale = nn.Parameter(torch.ones(()))
    parametrize.register_parametrization(layer, "scale", Same())
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.0 must have the class that patch"):
        sf.unpatch(model)
    parametrize.remove_parametrizations(layer, "scale")
    sf.unpatch(model)
    assert type(model.bert) is BertModel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(4, 12, 12)}, "masks with 3 or 4 dimensions"),
        ({"attention_mask": torch.ones(4, 1, 12, 12)}, "masks with 3 or 4 dimensions"),
        ({"attention_mask": torch.full((4, 12), -1e4)}, "must hold zeros and ones"),
        ({"past_key_values": DynamicCache()}, "past_key_values must be None: this encoder"),
        ({"use_cache": True}, "use_cache must be None"),
        ({"encoder_hidden_states": torch.ones(4, 12, 32)}, "encoder_hidden_states must be None"),
        ({"encoder_attention_mask": torch.ones(4, 12)}, "encoder_attention_mask must be None"),
        ({"is_causal": True}, "is_causal must be None"),
        ({"input_ids": torch.full((4, 12), 64)}, r"input_ids must be in \[0, 64\), got 64"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
    ],
)
def test_inputs(change: dict[str, Any], message: str) -> None:
    _, ours = pair("BertModel")
    with pytest.raises(ValueError, match=message):
        ours(**(batch() | change))
    assert ours(**batch(), use_cache=False).past_key_values is None


def test_changes_of_the_configuration_afterwards() -> None:
    _, ours = pair("BertForMaskedLM")
    ours.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"one of \('sdpa', 'eager'\), got 'flex_attention'"):
        ours(**batch())
    ours.set_attn_implementation("eager")
    assert len(ours(**batch(), output_attentions=True).attentions) == 2
    ours.config.is_decoder = True
    with pytest.raises(ValueError, match="a patched BERT is an encoder: is_decoder"):
        ours(**batch())
