"""Hugging Face's suite against `sf.Model`, its encoder and `sf.Config`."""

from __future__ import annotations

import tempfile
import unittest
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from conformance.pipelines import WORDS, load_mixin, save_small_model
from conformance.small_model import SmallModel
from conformance.suite import held_to, known_as, load
from spanbert_fast.config import Config
from spanbert_fast.model.backbone import Backbone
from spanbert_fast.model.encoder import Layer
from spanbert_fast.model.pretrained import Model

modeling, training = load("test_modeling_common"), load("test_training_mixin")
configuration, pipelines = load("test_configuration_common"), load_mixin(("Model", "Backbone"))


class Setup(SmallModel):
    causal_lm_class = Model
    config_class = Config
    more_sizes: ClassVar = {"max_span_targets": 5, "span_position_embedding_size": 8}


@held_to("sf.Model")
class ModelSuite(
    modeling.ModelTesterMixin,
    training.TrainingTesterMixin,
    pipelines.PipelineTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (Backbone, Model)
    pipeline_model_mapping: ClassVar = {
        "fill-mask": Model,
        "feature-extraction": (Backbone, Model),
    }
    test_can_init_all_missing_weights_before_2023 = True
    _torch_compile_train_cls = Model
    replaced: ClassVar = {"GradientCheckpointingLayer": Layer}
    model_tester: Any = None

    def setUp(self) -> None:
        self.enterContext(mock.patch.multiple(modeling, **self.replaced))
        self.enterContext(known_as(BASE=("Backbone",), MASKED_LM=("Model",)))
        self.model_tester = Setup()

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: Any, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs: dict[str, Any] = super()._prepare_for_class(
            inputs_dict, model_class, return_labels=return_labels
        )
        if "labels" in inputs and "attention_mask" in inputs:
            inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
        return inputs

    def run_task_tests(self, task: str, dtype: str = "float32") -> None:
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.enterContext(mock.patch.object(pipelines, "TRANSFORMERS_TINY_MODEL_PATH", folder))
        for model_class in self.all_model_classes:
            config = self.model_tester.get_config()
            config.vocab_size = len(WORDS) + 5
            save_small_model(model_class(config), Path(folder))
        super().run_task_tests(task, dtype)

    def test_config(self) -> None:
        tester = configuration.ConfigTester(self, config_class=Config, hidden_size=36)
        tester.run_common_tests()
