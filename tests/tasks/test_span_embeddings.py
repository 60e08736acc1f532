"""Vectors of spans: equal to Hugging Face's encoder on one text at a time, pooled the slow way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertModel, BertTokenizer
from transformers.utils import logging

from spanbert_fast.config import Config
from spanbert_fast.data.wordpiece import train_tokenizer
from spanbert_fast.model.pretrained import Model
from spanbert_fast.tasks.span_embeddings import span_embeddings

TEXTS = [
    "The quiet river follows a broken engine.",
    "Nobody reads.",
    "Zoë saw 東京 and a cafe\u0301 \U0001f600 there, unbelievably.",
    "",
]
SIZE = 16


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 90)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Model:
    torch.manual_seed(0)
    config = Config(
        vocab_size=len(tokenizer),
        hidden_size=SIZE,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    return Model(config).eval()


@pytest.fixture(scope="module")
def judge(model: Model, tmp_path_factory: pytest.TempPathFactory) -> BertModel:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("judge")
    model.save_pretrained(folder)
    return BertModel.from_pretrained(folder, add_pooling_layer=False).eval()


def oracle(
    judge: BertModel, tokenizer: Any, text: str, span: tuple[int, int], pooling: str, layer: int
) -> Tensor:
    """One text, one span."""
    encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        states = judge(**encoded, output_hidden_states=True).hidden_states[layer][0]
    characters = set(range(*span))
    inside = [i for i, place in enumerate(offsets) if characters & set(range(*place))]
    rows = states[inside]
    if pooling == "endpoints":
        return torch.cat([rows[0], rows[-1]])
    if pooling == "mean":
        return rows.mean(0)
    weights = torch.softmax(rows @ rows.mean(0) / SIZE**0.5, 0)
    return (weights[:, None] * rows).sum(0)


WORDS = [(4, 9), (10, 15), (0, 39), (16, 17), (11, 12)]


@pytest.mark.parametrize("layer", [-1, 0, 2, -4])
@pytest.mark.parametrize("pooling", ["endpoints", "mean", "attention"])
def test_vectors_are_those_of_hugging_face(
    model: Model, judge: BertModel, tokenizer: Any, pooling: Any, layer: int
) -> None:
    spans = [WORDS, [(0, 6), (0, 13)], [(8, 10), (0, 3), (15, 20)], []]
    found = span_embeddings(model, tokenizer, TEXTS, spans, pooling=pooling, layer=layer)
    assert [len(own.vectors) for own in found] == [len(own) for own in spans]
    for text, own, places in zip(TEXTS, found, spans, strict=True):
        for vector, span in zip(own.vectors, places, strict=True):
            expected = oracle(judge, tokenizer, text, span, pooling, layer)
            torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-5)
    assert found[3].vectors.shape == (0, SIZE * (2 if pooling == "endpoints" else 1))
    assert not found[0].vectors.requires_grad


def test_a_text_has_the_same_vectors_in_any_company(model: Model, tokenizer: Any) -> None:
    spans = [WORDS, [(0, 6)], [(8, 10)], []]
    together = span_embeddings(model, tokenizer, TEXTS, spans)
    alone = [span_embeddings(model, tokenizer, t, s)[0] for t, s in zip(TEXTS, spans, strict=True)]
    in_parts = span_embeddings(model, tokenizer, TEXTS, spans, batch_tokens=1)
    for one, two, three in zip(together, alone, in_parts, strict=True):
        torch.testing.assert_close(one.vectors, two.vectors, rtol=1e-6, atol=1e-6)
        assert torch.equal(two.vectors, three.vectors)
        assert one.pieces == two.pieces == three.pieces


@settings(max_examples=60)
@given(data=st.data())
def test_a_span_takes_every_piece_that_it_touches(
    model: Model, tokenizer: Any, data: st.DataObject
) -> None:
    text = TEXTS[data.draw(st.sampled_from([0, 2]))]
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    touched = [i for i, (a, b) in enumerate(offsets) if {*range(a, b)} & {*range(start, end)}]
    if not touched:
        with pytest.raises(ValueError, match="holds no piece"):
            span_embeddings(model, tokenizer, text, [(start, end)])
        return
    found = span_embeddings(model, tokenizer, text, [(start, end)], pooling="mean")[0]
    assert found.pieces == [(touched[0], touched[-1] + 1)]


def test_a_scorer_weighs_the_pieces(model: Model, tokenizer: Any) -> None:
    torch.manual_seed(1)
    layer, vector = nn.Linear(SIZE, 1), torch.randn(SIZE)
    rows = model.bert(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0]
    for scorer, scores in ((layer, layer(rows)[:, 0]), (vector, rows @ vector)):
        found = span_embeddings(
            model, tokenizer, TEXTS[0], [(0, 15)], pooling="attention", scorer=scorer
        )[0]
        first, past = found.pieces[0]
        expected = scores[first:past].softmax(0) @ rows[first:past]
        torch.testing.assert_close(found.vectors[0], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one score for each of"):
        span_embeddings(
            model, tokenizer, TEXTS[0], [(0, 15)], pooling="attention", scorer=lambda rows: rows
        )


def test_gradients_flow_in_training_mode_alone(model: Model, tokenizer: Any) -> None:
    model.train()
    try:
        found = span_embeddings(model, tokenizer, TEXTS[0], [(0, 9)], pooling="attention")[0]
        found.vectors.sum().backward()
        assert model.bert.encoder.layer[0].intermediate.dense.weight.grad.abs().sum() > 0
    finally:
        model.zero_grad()
        model.eval()
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(tokenizer: Any, model: Model, dtype: torch.dtype, tmp_path: Path) -> None:
    logging.disable_progress_bar()
    model.save_pretrained(tmp_path)
    narrow = Model.from_pretrained(tmp_path, dtype=dtype).eval()
    for pooling in ("endpoints", "mean", "attention"):
        found = span_embeddings(narrow, tokenizer, TEXTS[0], WORDS, pooling=pooling)[0].vectors
        expected = span_embeddings(model, tokenizer, TEXTS[0], WORDS, pooling=pooling)[0].vectors
        assert found.dtype == dtype
        # Rows are normalised, so their entries are about 1.
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)


def test_what_is_refused(model: Model, tokenizer: Any) -> None:
    text = TEXTS[0]
    for spans, message in (
        ([(3, 3)], r"span \(3, 3\) of text 0 must have 0 <= start < end <= 40"),
        ([(-1, 3)], r"span \(-1, 3\) of text 0 must"),
        ([(0, 41)], r"span \(0, 41\) of text 0 must"),
        ([(3, 4)], r"span \(3, 4\) of text 0 holds no piece of the text: ' '"),
    ):
        with pytest.raises(ValueError, match=message):
            span_embeddings(model, tokenizer, text, spans)
    for settings_, message in (
        ({"pooling": "max"}, "pooling must be one of endpoints, mean, attention, got 'max'"),
        ({"scorer": torch.zeros(SIZE)}, "scorer is for pooling='attention'"),
        ({"pooling": "attention", "scorer": torch.zeros(3)}, r"must have shape \(16,\)"),
        ({"layer": 4}, r"layer must be in \[-4, 3\], got 4"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
    ):
        given_: Any = settings_
        with pytest.raises(ValueError, match=message):
            span_embeddings(model, tokenizer, text, [(0, 3)], **given_)
    with pytest.raises(TypeError, match="two ints"):
        span_embeddings(model, tokenizer, text, [(0.0, 3)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="one list for each of 2 texts"):
        span_embeddings(model, tokenizer, [text, text], [[(0, 3)]])
    with pytest.raises(ValueError, match=r"text 0 has \d+ tokens .* the model allows 64"):
        span_embeddings(model, tokenizer, text * 9, [(0, 3)])
    slow: Any = type("Slow", (), {"is_fast": False})()
    with pytest.raises(TypeError, match="must be a fast tokenizer"):
        span_embeddings(model, slow, text, [(0, 3)])
    with pytest.raises(TypeError, match="must be a spanbert_fast Model"):
        span_embeddings(nn.Linear(1, 1), tokenizer, text, [(0, 3)])  # type: ignore[arg-type]
    assert isinstance(tokenizer, BertTokenizer)
