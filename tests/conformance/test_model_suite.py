"""Hugging Face's suite against `sf.Model`, its encoder and `sf.Config`."""

from __future__ import annotations

import tempfile
import unittest
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from torch import Tensor

from conformance.pipelines import WORDS, load_mixin, save_small_model
from conformance.suite import held_to, known_as, load
from spanbert_fast.config import Config
from spanbert_fast.model.backbone import Backbone
from spanbert_fast.model.encoder import Layer
from spanbert_fast.model.pretrained import Model

modeling, training = load("test_modeling_common"), load("test_training_mixin")
configuration, pipelines = load("test_configuration_common"), load_mixin(("Model", "Backbone"))


class Setup:
    """The model and the batch that their tests ask for; names and sizes as in their BERT tests."""

    batch_size, seq_length, hidden_size = 13, 7, 32
    num_hidden_layers, num_attention_heads = 2, 4
    is_training = True
    causal_lm_class = Model

    def get_config(self) -> Config:
        return Config(
            vocab_size=99,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            max_position_embeddings=512,
            type_vocab_size=16,
            max_span_targets=5,
            span_position_embedding_size=8,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Config, dict[str, Tensor]]:
        shape = [self.batch_size, self.seq_length]
        return self.get_config(), {
            "input_ids": modeling.ids_tensor(shape, 99),
            "token_type_ids": modeling.ids_tensor(shape, 16),
            "attention_mask": modeling.random_attention_mask(shape),
        }

    def prepare_config_and_inputs(self) -> tuple[Any, ...]:
        config, inputs = self.prepare_config_and_inputs_for_common()
        return config, *inputs.values()


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
