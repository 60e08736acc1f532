"""What can be patched, and by name what cannot."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers.activations import GELUActivation
from transformers.models.bert import modeling_bert as bert

from spanbert_fast.model.patch.packed import ATTENTIONS, Packed, is_exact_gelu, window_of

Part = tuple[str, nn.Module, type[nn.Module]]
_OUTER: tuple[tuple[str, type[nn.Module]], ...] = (
    ("embeddings", bert.BertEmbeddings),
    ("encoder", bert.BertEncoder),
)
_OF_A_LAYER: tuple[tuple[str, type[nn.Module]], ...] = (
    ("attention", bert.BertAttention),
    ("attention.self", bert.BertSelfAttention),
    ("attention.output", bert.BertSelfOutput),
    ("intermediate", bert.BertIntermediate),
    ("output", bert.BertOutput),
)


def parts_of(name: str, encoder: nn.Module) -> Iterator[Part]:
    """Path, module and expected class of every module that `patch` changes, outermost first."""
    yield name, encoder, bert.BertModel
    for path, kind in _OUTER:
        yield _join(name, path), encoder.get_submodule(path), kind
    layers = encoder.get_submodule("encoder.layer")
    assert isinstance(layers, nn.ModuleList)
    for index, layer in enumerate(layers):
        path = _join(name, f"encoder.layer.{index}")
        yield path, layer, bert.BertLayer
        for inner, kind in _OF_A_LAYER:
            yield f"{path}.{inner}", layer.get_submodule(inner), kind


def check_encoder(name: str, encoder: bert.BertModel) -> None:
    """Raises ValueError if this BERT needs something that our operations do not have.

    Args:
        name: Its path, for the message.
        encoder: It.
    """
    where = name or type(encoder).__name__
    config = encoder.config
    relative = getattr(config, "position_embedding_type", "absolute")
    for label, value, allowed in (
        ("is_decoder", config.is_decoder, (False,)),
        ("add_cross_attention", config.add_cross_attention, (False,)),
        ("is_causal", getattr(config, "is_causal", None), (None, False)),
        ("position_embedding_type", relative, ("absolute", None)),
        ("hidden_act", config.hidden_act, ("gelu", "gelu_python")),
        ("attn_implementation", config._attn_implementation, ATTENTIONS),
    ):
        if value not in allowed:
            listed = " or ".join(map(repr, allowed))
            raise ValueError(f"patch cannot serve {where}: {label} must be {listed}, got {value!r}")
    window_of(config)
    for path, part, kind in parts_of(name, encoder):
        _check_part(path or where, part, kind)
        act = getattr(part, "intermediate_act_fn", None)
        if isinstance(act, GELUActivation | nn.GELU) and is_exact_gelu(act):
            continue
        if act is not None:
            raise ValueError(
                f"patch cannot serve {path}: intermediate_act_fn must be GELU, got {act}"
            )


def _check_part(path: str, part: nn.Module, kind: type[nn.Module]) -> None:
    own = part.unpatched_class if isinstance(part, Packed) else type(part)
    # Subclasses of the whole are common, to add a method; if their forward is BERT's, nothing of
    # theirs is lost.
    is_same = own is kind or (
        kind is bert.BertModel
        and issubclass(own, bert.BertModel)
        and own.forward is bert.BertModel.forward
        and own._create_attention_masks is bert.BertModel._create_attention_masks
    )
    if not is_same:
        raise ValueError(
            f"patch cannot serve {path}: it must be a {kind.__name__} of transformers, got "
            f"{own.__module__}.{own.__name__}, whose own forward would be bypassed"
        )
    if "forward" in vars(part):
        raise ValueError(
            f"patch cannot serve {path}: something else replaced its forward already "
            "(accelerate's offloading does); patch before that"
        )


def _join(name: str, path: str) -> str:
    return f"{name}.{path}" if name else path
