"""Hugging Face's suite against its own BERT after `sf.patch`: the encoder and every head."""

from __future__ import annotations

import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import transformers
from transformers import BertConfig, PreTrainedModel

import spanbert_fast as sf
from conformance.pipelines import LABELS, WORDS, load_mixin, save_small_model
from conformance.small_model import SmallModel
from conformance.suite import held_to, load

modeling, training = load("test_modeling_common"), load("test_training_mixin")

HEADS = (
    "BertModel",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
)
pipelines = load_mixin(HEADS)


def patched_class(name: str) -> type[PreTrainedModel]:
    """Their class of this name, every instance of it patched; its name stays, they look it up."""
    base = getattr(transformers, name)

    def __init__(self: Any, config: BertConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        sf.patch(self)

    made = type(name, (base,), {"__init__": __init__, "__module__": __name__})
    setattr(sys.modules[__name__], name, made)  # where a pickle looks for it
    return made


CLASSES = {name: patched_class(name) for name in HEADS}


class Setup(SmallModel):
    causal_lm_class = CLASSES["BertForMaskedLM"]
    config_class = BertConfig


@held_to("patched BERT")
class PatchedSuite(
    modeling.ModelTesterMixin,
    training.TrainingTesterMixin,
    pipelines.PipelineTesterMixin,
    unittest.TestCase,
):
    all_model_classes = tuple(CLASSES.values())
    pipeline_model_mapping: ClassVar = {
        "fill-mask": CLASSES["BertForMaskedLM"],
        "feature-extraction": CLASSES["BertModel"],
        "text-classification": CLASSES["BertForSequenceClassification"],
        "token-classification": CLASSES["BertForTokenClassification"],
        "zero-shot": CLASSES["BertForSequenceClassification"],
    }
    test_can_init_all_missing_weights_before_2023 = True
    _torch_compile_train_cls = CLASSES["BertForMaskedLM"]
    model_tester: Any = None

    def setUp(self) -> None:
        self.model_tester = Setup()

    def run_task_tests(self, task: str, dtype: str = "float32") -> None:
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.enterContext(mock.patch.object(pipelines, "TRANSFORMERS_TINY_MODEL_PATH", folder))
        for model_class in {*self.pipeline_model_mapping.values()}:
            config = self.model_tester.get_config()
            config.vocab_size, config.id2label = len(WORDS) + 5, LABELS
            config.label2id = {label: index for index, label in LABELS.items()}
            save_small_model(model_class(config), Path(folder))
        super().run_task_tests(task, dtype)

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: Any, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = super()._prepare_for_class(
            inputs_dict, model_class, return_labels=return_labels
        )
        if return_labels and model_class is CLASSES["BertForPreTraining"]:
            # Their table knows one label of it, their own BERT tests add these two.
            tester = self.model_tester
            inputs["labels"] = torch.zeros(tester.batch_size, tester.seq_length).long()
            inputs["next_sentence_label"] = torch.zeros(tester.batch_size).long()
        return inputs
