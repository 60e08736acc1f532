"""`segment`: spans of whole words at their characters, and what the command shows of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from spanbert_fast.cli import main
from spanbert_fast.cli.segment_view import write_picture
from spanbert_fast.config import Config
from spanbert_fast.data.tokenizer import save_tokenizer
from spanbert_fast.data.wordpiece import train_tokenizer
from spanbert_fast.model.pretrained import Model
from spanbert_fast.model.span_scores import SpanScoring
from spanbert_fast.model.span_segmenter import SpanSegmenter
from spanbert_fast.tasks.segment import segment

TEXTS = [
    "We must work  together, unbelievably so. I am happy <b>to</b> report\tit & pay $5.",
    "Congress.",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS[:1] * 2 + ["peace to the Congress together"], 90)


@pytest.fixture(scope="module")
def model(tokenizer) -> Model:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    config = Config(vocab_size=len(tokenizer), num_hidden_layers=2, initializer_range=0.3, **shape)
    return Model(config).eval()


def test_spans_tile_the_text_in_whole_words(model: Model, tokenizer) -> None:
    found = segment(model, tokenizer, TEXTS, scoring=SpanScoring(max_words=4))
    assert [len(spans) > 0 for spans in found] == [True, True, False]
    for text, spans in zip(TEXTS, found, strict=True):
        place = 0
        for span in spans:
            assert span.text == text[span.start : span.end] == span.text.strip()
            assert text[place : span.start].strip() == "", "only white space lies between spans"
            assert not (text[span.start - 1 : span.start + 1].isalnum() and span.start)
            assert 1 <= span.num_words <= 4
            assert 0 < span.marginal <= 1 + 1e-6
            assert span.vector.shape == (32,)
            place = span.end
        assert place == len(text)


def test_a_text_does_not_depend_on_its_company(model: Model, tokenizer) -> None:
    together = segment(model, tokenizer, TEXTS)
    for text, spans in zip(TEXTS, together, strict=True):
        (alone,) = segment(model, tokenizer, text)
        assert [span[:4] for span in alone] == [span[:4] for span in spans]
        for mine, other in zip(alone, spans, strict=True):
            assert mine.marginal == pytest.approx(other.marginal, abs=1e-4)
            torch.testing.assert_close(mine.vector, other.vector, rtol=1e-4, atol=1e-4)


def test_no_span_crosses_a_sentence_on_request(model: Model, tokenizer) -> None:
    text, border = TEXTS[0], TEXTS[0].index(" I am")
    # A law that wants long spans, so that some would cross.
    scoring = SpanScoring(stop_probability=0.01)
    (free,) = segment(model, tokenizer, text, scoring=scoring)
    (bound,) = segment(model, tokenizer, text, scoring=scoring, respect_sentences=True)
    assert any(span.start < border < span.end for span in free)
    assert not any(span.start < border < span.end for span in bound)


def test_a_segmenter_scores_in_the_place_of_attention(model: Model, tokenizer) -> None:
    torch.manual_seed(1)
    segmenter = SpanSegmenter(32, max_words=3, num_labels=2)
    (spans,) = segment(model, tokenizer, TEXTS[0], segmenter=segmenter)
    assert {span.label for span in spans} <= {0, 1}
    assert all(span.label == 1 for span in spans if span.num_words > 1)
    with pytest.raises(ValueError, match=r"segmenter's max_words is 3, scoring\.max_words allows"):
        segment(model, tokenizer, "a", segmenter=segmenter, scoring=SpanScoring(max_words=2))


def test_wrong_input_is_named(model: Model, tokenizer) -> None:
    with pytest.raises(TypeError, match=r"model must be a spanbert_fast Model .*, not int"):
        segment(3, tokenizer, "a")
    with pytest.raises(TypeError, match="text must be a str or a sequence of str"):
        segment(model, tokenizer, [3])
    with pytest.raises(ValueError, match="text holds no text"):
        segment(model, tokenizer, [])
    with pytest.raises(ValueError, match=r"text 0 has 602 tokens .* the model allows 512"):
        segment(model, tokenizer, "to " * 600)


def test_command_writes_json_page_and_picture(
    model: Model, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    page, picture = tmp_path / "spans.html", tmp_path / "spans.png"
    words = ["segment", str(folder), *TEXTS[:2], "--html", str(page), "--png", str(picture)]
    assert main([*words, "--layers", "0", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [spans[-1]["end"] for spans in found] == [len(text) for text in TEXTS[:2]]
    assert len(found[0][0]["vector"]) == 32
    written = page.read_text()
    assert "<b>" not in written
    assert "&amp;" in written
    assert written.count("<span") == sum(map(len, found))
    pixels = imread(picture)
    assert (pixels.min(axis=(0, 1))[:3] < 0.5).all(), "nothing is drawn"
    assert main(words[:4]) == 0
    assert "marginal" in capsys.readouterr().out
    assert main(["segment", str(folder), "a", "--max-words", "0"]) == 2
    assert "max_words is 0, must be in [1, 512]" in capsys.readouterr().err


def test_weights_that_are_not_numbers_are_refused(model, tokenizer):
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.bert.encoder.layer[0].attention.self.query.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="attention and hidden states must be finite"):
        segment(damaged, tokenizer, TEXTS[0])


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (TypeError, "max_words must be an int, got 1.5", {"max_words": 1.5}),
        (TypeError, "max_words must be an int, got True", {"max_words": True}),
        (TypeError, "sharpness must be a number, got '1'", {"sharpness": "1"}),
        (TypeError, "layers must be a tuple of int", {"layers": "x"}),
        (TypeError, "heads must be a tuple of int", {"heads": (1.5,)}),
        (ValueError, "heads must name each only once", {"heads": (0, 0)}),
    ],
)
def test_wrong_scoring_is_refused_by_name(error, match, settings):
    with pytest.raises(error, match=match):
        SpanScoring(**settings)


def test_wrong_arguments_are_refused_by_name(model, tokenizer):
    wrong = [
        (TypeError, "scoring must be a SpanScoring", {"scoring": {}}),
        (TypeError, "segmenter must be a SpanSegmenter", {"segmenter": torch.nn.Linear(2, 2)}),
        (TypeError, "num_threads must be an int, got 1.5", {"num_threads": 1.5}),
        (TypeError, "batch_tokens must be an int, got '2'", {"batch_tokens": "2"}),
        (ValueError, "hidden_size is 16, the model's is 32", {"segmenter": SpanSegmenter(16)}),
    ]
    for error, match, arguments in wrong:
        with pytest.raises(error, match=match):
            segment(model, tokenizer, TEXTS[0], **arguments)


def test_a_lone_surrogate_is_named_with_its_place(model, tokenizer):
    with pytest.raises(ValueError, match=r"text 1 has the lone surrogate '\\ud800' at character 2"):
        segment(model, tokenizer, ["work", "a \ud800 b"])


@pytest.mark.parametrize("name", ["max_words", "num_labels", "num_units"])
def test_wrong_sizes_of_a_segmenter_are_refused_by_name(name):
    with pytest.raises(TypeError, match=f"{name} must be an int, got 1.5"):
        SpanSegmenter(8, **{name: 1.5})
    with pytest.raises(ValueError, match=f"{name} is 0, must be at least 1"):
        SpanSegmenter(8, **{name: 0})
    with pytest.raises(ValueError, match="hidden_size is -3"):
        SpanSegmenter(-3)


def test_command_refuses_a_folder_that_is_not_there_before_it_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "missing" / "spans.html"
    # There is no model in that folder, either: nothing was loaded.
    assert main(["segment", str(tmp_path), "A text.", "--html", str(page)]) == 2
    assert f"the folder of {page} does not exist" in capsys.readouterr().err.replace("\n", "")


def test_a_picture_has_an_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 1,000 lines, the texts have 1,001"):
        write_picture(tmp_path / "spans.png", ["word"] * 1_001, [[]] * 1_001)
