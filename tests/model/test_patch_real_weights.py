"""Real BERT weights, patched: sentence embeddings and predictions are those of Hugging Face.

Where the weights come from: see `test_real_weights.py`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from model.test_real_weights import (
    MINILM,
    RXNFP,
    assert_equal,
    batch_of,
    folder_of,
)
from sentence_transformers import SentenceTransformer
from transformers import BertForMaskedLM, BertModel

import spanbert_fast as sf

SENTENCES = [
    "The committee approved the budget for the coming year.",
    "Next year's budget was passed by the committee.",
    "Penguins!",
    "A very long afternoon passed before anyone in the small harbour town noticed that the ferry, "
    "which had left at noon with forty passengers and a piano, had never arrived.",
]


@pytest.mark.parametrize("name", [RXNFP])
@torch.no_grad()
def test_masked_lm(name: str) -> None:
    theirs = BertForMaskedLM.from_pretrained(folder_of(name), dtype=torch.float32).eval()
    ours = copy.deepcopy(theirs)
    sf.patch(ours)
    inputs = batch_of(ours.config.vocab_size)
    a, b = (model(**inputs, output_hidden_states=True) for model in (theirs, ours))
    for mine, judge in zip((b.logits, *b.hidden_states), (a.logits, *a.hidden_states), strict=True):
        assert_equal(mine, judge, inputs)


@torch.no_grad()
def test_sentence_transformer() -> None:
    """Its mean over tokens goes by the mask, so zeros in the padding do no harm."""
    model = SentenceTransformer(str(folder_of(MINILM)), device="cpu")
    expected = model.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)
    plain = [type(module) for module in model.modules()]
    report = sf.patch(model)
    assert any("layer.5.attention.self" in module.name for module in report.modules)
    found = model.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert float(model.similarity(found[:1], found[1:2])) > 0.8
    sf.unpatch(model)
    assert [type(module) for module in model.modules()] == plain
    again = model.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)
    assert torch.equal(again, expected)


@torch.no_grad()
def test_pooler() -> None:
    theirs = BertModel.from_pretrained(folder_of(MINILM)).eval()
    ours = copy.deepcopy(theirs)
    sf.patch(ours)
    inputs = batch_of(ours.config.vocab_size)
    a, b = (model(**inputs) for model in (theirs, ours))
    assert_equal(b.last_hidden_state, a.last_hidden_state, inputs)
    torch.testing.assert_close(b.pooler_output, a.pooler_output, rtol=0, atol=1e-5)
