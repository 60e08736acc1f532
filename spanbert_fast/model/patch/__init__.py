"""Hugging Face's BERT on our packed operations, in place and reversible."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.bert.modeling_bert import BertModel

# `bert` and `layers` are imported for the classes they define: each enters its name in `packed`.
from spanbert_fast.model.patch import bert as bert
from spanbert_fast.model.patch import layers as layers
from spanbert_fast.model.patch.checks import check_encoder, parts_of
from spanbert_fast.model.patch.packed import Packed, packed_type
from spanbert_fast.model.patch.report import PatchReport, report_on

__all__ = ["PatchReport", "patch", "unpatch"]


def patch(model: nn.Module) -> PatchReport:
    """What runs on packed rows from now on: the encoder of every BERT in `model`.

    The modules stay and get another class; parameters, their names and the configuration are not
    touched. Patching a second time changes nothing.

    Args:
        model: A `BertModel`, or any module that contains one: a head on top of it, a PEFT model, a
            `SentenceTransformer`.

    Raises:
        ValueError: There is no BERT in it, or one that cannot be served; named with the reason.
            Nothing is changed then.
    """
    encoders = [(name, each) for name, each in model.named_modules() if isinstance(each, BertModel)]
    if not encoders:
        raise ValueError(
            f"model must contain a transformers BertModel, got {type(model).__name__} without one"
        )
    for name, encoder in encoders:
        check_encoder(name, encoder)
    for _, encoder in encoders:
        for _, part, _ in parts_of("", encoder):
            if not isinstance(part, Packed):
                part.__class__ = packed_type(type(part))
    return report_on(model)


def unpatch(model: nn.Module) -> None:
    """Gives every module that `patch` changed its own class back.

    Raises:
        ValueError: Nothing in `model` is patched, or something else has changed a patched module's
            class since and has to be undone first.
    """
    patched = [(name, each) for name, each in model.named_modules() if isinstance(each, Packed)]
    if not patched:
        raise ValueError(f"model must be patched, got {type(model).__name__} with nothing to undo")
    for name, module in patched:
        if type(module) is not packed_type(module.unpatched_class):
            raise ValueError(
                f"{name or 'model'} must have the class that patch gave it, got "
                f"{type(module).__name__}: undo what changed it first"
            )
    for _, module in patched:
        own: Any = module.unpatched_class
        module.__class__ = own
