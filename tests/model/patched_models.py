"""Hugging Face's BERT under every head, tiny, and batches that fit it; for the tests of `patch`."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel

import spanbert_fast as sf

LENGTHS = (9, 4, 12, 1)
VOCAB_SIZE = 64
HEADS = (
    "BertModel",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForTokenClassification",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
)
CLOSE = {"rtol": 0, "atol": 1e-5}
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}


def make(head: str = "BertForMaskedLM", **settings: Any) -> PreTrainedModel:
    """A model in evaluation mode whose biases and norms are not at their initial 0 and 1."""
    num_labels = 2 if "Answering" in head else 3
    config = BertConfig(**(SHAPE | {"num_labels": num_labels} | settings))
    model: PreTrainedModel = getattr(transformers, head)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pair(head: str = "BertForMaskedLM", **settings: Any) -> tuple[Any, Any]:
    """The same model twice: as it was, and patched."""
    theirs = make(head, **settings)
    ours = copy.deepcopy(theirs)
    sf.patch(ours)
    return theirs, ours


def batch(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """Ragged rows of random tokens, with token types."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": torch.randint(5, VOCAB_SIZE, shape, generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
    }


def fit(head: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` in the shape that the head takes."""
    if head == "BertForMultipleChoice":
        return {name: value.view(2, 2, *value.shape[1:]) for name, value in inputs.items()}
    return inputs


def labels_of(head: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Something to learn, nothing of it in the padding."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    tokens = torch.where(mask.bool(), ids, -100)
    rows = torch.arange(len(ids)) % 2
    return {
        "BertForMaskedLM": {"labels": tokens},
        "BertForPreTraining": {"labels": tokens, "next_sentence_label": rows},
        "BertForTokenClassification": {"labels": torch.where(mask.bool(), ids % 3, -100)},
        "BertForSequenceClassification": {"labels": rows},
        "BertForMultipleChoice": {"labels": rows[:2]},
        "BertForNextSentencePrediction": {"labels": rows},
    }.get(head, {})


def assert_close(ours: Any, theirs: Any, mask: Tensor) -> None:
    """All outputs are equal where there is no padding; states are zero there."""
    kept = mask.bool()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        mine = ours[name]
        if name == "attentions":
            # Hugging Face gives padding a distribution as well; ours is zero there.
            mine, value = torch.stack(mine), torch.stack(value) * kept[:, None, :, None]
        elif name == "hidden_states":
            mine, value = torch.stack(mine, dim=2), torch.stack(value, dim=2)
        elif name == "cross_attentions":
            assert mine == value == ()
            continue
        assert mine.shape == value.shape, name
        if value.shape[:2] == kept.shape:
            if name in ("hidden_states", "last_hidden_state"):
                assert not mine[~kept].any(), name
            mine, value = mine[kept], value[kept]
        torch.testing.assert_close(
            mine, value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_equal_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """The same gradient, or none, for every parameter."""
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert sum(gradient is not None for gradient in expected.values()) > 20
    for name, parameter in ours.named_parameters():
        theirs_grad = expected[name]
        assert (parameter.grad is None) == (theirs_grad is None), name
        if theirs_grad is not None:
            slack = 1e-5 * max(1.0, float(theirs_grad.abs().max()))
            torch.testing.assert_close(parameter.grad, theirs_grad, rtol=0, atol=slack)
