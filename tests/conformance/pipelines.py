"""What their pipeline tests need: small models in folders, and what each pipeline has to return.

Their mixin loads a model by class, makes the pipeline, and feeds it batches; the classes that judge
a pipeline's output are not in the source archive, so ours stand in for them.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from transformers import BertTokenizerFast, Pipeline, PreTrainedModel, pipeline

from conformance import suite

WORDS = ("we", "must", "work", "together", "to", "keep", "the", "peace", ".", "this", "is")
SENTENCES = ("we must work together .", "this is the peace .", "keep to the work")
LABELS = {0: "contradiction", 1: "neutral", 2: "entailment"}


class Judge:
    """Makes the pipeline of one task and judges what it returns."""

    task: str
    examples: tuple[str, ...] = SENTENCES

    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer: Any, dtype: str, **processors: Any
    ) -> tuple[Pipeline, list[str]]:
        # `pipeline(dtype=...)` leaves a model that is loaded already as it is.
        model = model.to(getattr(torch, dtype))
        return pipeline(self.task, model=model, tokenizer=tokenizer), [*self.examples]

    def run_pipeline_test(self, made: Pipeline, examples: list[str]) -> None:
        for example in examples:
            self.judge(made, example, self.answer(made, example))
        assert len(self.answer(made, examples)) == len(examples)

    def answer(self, made: Any, given: Any) -> Any:
        return made(given)

    def judge(self, made: Any, text: str, answer: Any) -> None:
        raise NotImplementedError


class FillMask(Judge):
    task = "fill-mask"
    examples = ("we must [MASK] together .", "[MASK] is the peace")

    def judge(self, made: Any, text: str, answer: Any) -> None:
        assert len(answer) == 5
        scores = [row["score"] for row in answer]
        assert scores == sorted(scores, reverse=True)
        assert 0 < sum(scores) <= 1.001
        for row in answer:
            assert row["token_str"] == made.tokenizer.decode([row["token"]])


class FeatureExtraction(Judge):
    task = "feature-extraction"

    def judge(self, made: Any, text: str, answer: Any) -> None:
        (rows,) = answer
        assert len(rows) == len(made.tokenizer(text)["input_ids"])
        assert len(rows[0]) in (made.model.config.hidden_size, made.model.config.vocab_size)


class TextClassification(Judge):
    task = "text-classification"

    def judge(self, made: Any, text: str, answer: Any) -> None:
        assert answer[0]["label"] in LABELS.values()
        assert 0 < answer[0]["score"] <= 1


class TokenClassification(Judge):
    task = "token-classification"

    def judge(self, made: Any, text: str, answer: Any) -> None:
        assert [row["word"] for row in answer] == text.split()
        assert [text[row["start"] : row["end"]] for row in answer] == text.split()
        assert {row["entity"] for row in answer} <= {*LABELS.values()}


class ZeroShot(Judge):
    task = "zero-shot-classification"

    def answer(self, made: Any, given: Any) -> Any:
        return made(given, candidate_labels=["work", "peace"])

    def get_test_pipeline(self, *args: Any, **kwargs: Any) -> tuple[Pipeline, list[str]]:
        made, examples = super().get_test_pipeline(*args, **kwargs)
        # Their batches carry no labels, so these are fixed beforehand.
        made._preprocess_params["candidate_labels"] = ["work", "peace"]
        return made, examples

    def judge(self, made: Any, text: str, answer: Any) -> None:
        assert sorted(answer["labels"]) == ["peace", "work"]
        assert abs(sum(answer["scores"]) - 1) < 1e-2


JUDGES = {
    "fill-mask": FillMask,
    "feature-extraction": FeatureExtraction,
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "zero-shot": ZeroShot,
}


def load_mixin(names: tuple[str, ...]) -> ModuleType:
    """Their module of pipeline tests, told that there are small models of these classes."""
    summary = {
        name: {"tokenizer_classes": ["BertTokenizerFast"], "processor_classes": []}
        for name in names
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "reports").mkdir()
        (Path(folder) / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))
        with mock.patch.dict(os.environ, TRANSFORMERS_TINY_MODEL_PATH=folder):
            module = suite.load("test_pipeline_mixin")
    module.tiny_model_summary.update(summary)
    for task, judge in JUDGES.items():
        # A class until 5.22, then the name of one.
        is_name = isinstance(module.pipeline_test_mapping[task]["test"], str)
        module.pipeline_test_mapping[task]["test"] = (
            f"{__name__}.{judge.__name__}" if is_name else judge
        )
    return module


def save_small_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes a model and a tokenizer where their mixin looks for its class."""
    target = folder / model.config.model_type / type(model).__name__
    model.save_pretrained(target)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (target / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    BertTokenizerFast(vocab=str(target / "vocab.txt")).save_pretrained(target)
