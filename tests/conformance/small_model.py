"""The small model and its batch, for which their tests ask by these names."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import BertConfig

from conformance.suite import load


class SmallModel:
    """Sizes as in Hugging Face's own tests of BERT."""

    batch_size, seq_length, hidden_size = 13, 7, 32
    num_hidden_layers, num_attention_heads, num_choices = 2, 4, 4
    vocab_size, type_vocab_size = 99, 16
    is_training = True
    config_class: type[BertConfig]
    more_sizes: ClassVar[dict[str, int]] = {}

    def get_config(self) -> BertConfig:
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            max_position_embeddings=512,
            type_vocab_size=self.type_vocab_size,
            **self.more_sizes,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[BertConfig, dict[str, Tensor]]:
        modeling = load("test_modeling_common")
        shape = [self.batch_size, self.seq_length]
        return self.get_config(), {
            "input_ids": modeling.ids_tensor(shape, self.vocab_size),
            "token_type_ids": modeling.ids_tensor(shape, self.type_vocab_size),
            "attention_mask": modeling.random_attention_mask(shape),
        }

    def prepare_config_and_inputs(self) -> tuple[Any, ...]:
        config, inputs = self.prepare_config_and_inputs_for_common()
        return config, *inputs.values()
