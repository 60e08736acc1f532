"""Pipelines of transformers on `Model`, and on plain classes that load our folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)
from transformers.utils import logging

import spanbert_fast as sf
from spanbert_fast.data.tokenizer import save_tokenizer
from spanbert_fast.data.wordpiece import train_tokenizer

TEXT = "We must work together to keep the peace. I am happy to report to the Congress."
MASKED = ["We must [MASK] together.", "I am happy to [MASK] to the Congress.", "Peace [MASK]"]
PLAIN = [text.replace("[MASK]", "work") for text in MASKED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and tokenizer, saved by us."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # The report of what plain classes have no place for.
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT], 100)
    save_tokenizer(tokenizer, path)
    torch.manual_seed(0)
    config = sf.Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.3,
    )
    sf.Model(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def close(found: Any, expected: Any) -> None:
    """Nested lists and dicts: numbers within 1e-5, everything else equal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    elif isinstance(expected, str | int):
        assert found == expected
    else:
        assert float(found) == pytest.approx(float(expected), abs=1e-5)


def test_our_folders_load_with_case(tokenizer: Any) -> None:
    assert tokenizer.tokenize("We must")[0] == "We"


def test_fill_mask(folder: Path, tokenizer: Any) -> None:
    plain = pipeline(
        "fill-mask", model=AutoModelForMaskedLM.from_pretrained(folder), tokenizer=tokenizer
    )
    ours = pipeline("fill-mask", model=sf.Model.from_pretrained(folder), tokenizer=tokenizer)
    expected = plain(MASKED)
    assert len({answer[0]["token"] for answer in expected}) > 1
    close(ours(MASKED), expected)
    close(ours(MASKED, batch_size=3), expected)


def test_fill_mask_by_an_untrained_head_is_refused(folder: Path, tokenizer: Any) -> None:
    model = sf.Model.from_pretrained(folder)
    model.config.untrained_heads = ["mlm"]
    with pytest.raises(KeyError, match=r"logits was not computed: .* config.untrained_heads"):
        pipeline("fill-mask", model=model, tokenizer=tokenizer)(MASKED[0])


def test_features(folder: Path, tokenizer: Any) -> None:
    plain = pipeline(
        "feature-extraction", model=AutoModel.from_pretrained(folder), tokenizer=tokenizer
    )
    ours = sf.Model.from_pretrained(folder)
    expected = plain(PLAIN)
    close(pipeline("feature-extraction", model=ours.bert, tokenizer=tokenizer)(PLAIN), expected)
    # As for every model with a head, the first output is the head's.
    scores = pipeline("feature-extraction", model=ours, tokenizer=tokenizer)(PLAIN[:1])
    assert len(scores[0][0][0]) == len(tokenizer)


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("token-classification", AutoModelForTokenClassification),
        ("text-classification", AutoModelForSequenceClassification),
    ],
)
def test_classification(folder: Path, tokenizer: Any, task: str, kind: Any) -> None:
    torch.manual_seed(0)
    model = kind.from_pretrained(folder).eval()
    ours = sf.Model.from_pretrained(folder).bert.state_dict()
    for name, weight in model.base_model.state_dict().items():
        assert name.startswith("pooler.") or torch.equal(weight, ours[name])
    classify = pipeline(task, model=model, tokenizer=tokenizer)
    expected = classify(PLAIN)
    close(classify(PLAIN, batch_size=3), expected)
    sf.patch(model)
    close(classify(PLAIN, batch_size=3), expected)
