"""Texts for a model: checked, encoded whole, and packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spanbert_fast.batch import PackedBatch
from spanbert_fast.model.pretrained import Model


def check_texts(model: object, tokenizer: Any, text: object) -> list[str]:
    """The texts as a list.

    Raises:
        TypeError: an argument has the wrong type, or the tokenizer knows no character offsets.
        ValueError: there is no text.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model must be a spanbert_fast Model, not {type(model).__name__}")
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"tokenizer must be a fast tokenizer, which knows character offsets, "
            f"not {type(tokenizer).__name__}"
        )
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or not all(isinstance(item, str) for item in texts):
        raise TypeError(f"text must be a str or a sequence of str, not {text!r:.80}")
    if not texts:
        raise ValueError("text holds no text")
    return list(texts)


def encode_texts(model: Model, tokenizer: Any, texts: Sequence[str]) -> Any:
    """Ids, `offset_mapping` and `special_tokens_mask` of each text, nothing cut.

    Raises:
        ValueError: a text is longer than the model allows, or the tokenizer is another model's.
    """
    encoded = tokenizer(
        list(texts), return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )
    limit, entries = model.config.max_position_embeddings, model.config.vocab_size
    for index, ids in enumerate(encoded["input_ids"]):
        if len(ids) > limit:
            raise ValueError(
                f"text {index} has {len(ids)} tokens with its special tokens, the model allows "
                f"{limit}: give it in parts, or take a model with more positions"
            )
        if ids and max(ids) >= entries:
            raise ValueError(
                f"text {index} has token id {max(ids)}, the model knows ids below {entries}: the "
                "tokenizer is not this model's"
            )
    return encoded


def pack(sequences: Sequence[Sequence[int]]) -> PackedBatch:
    """Sequences of ids as one batch without targets, on the CPU."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    input_ids = torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.cat([torch.arange(len(ids)) for ids in sequences]),
        token_type_ids=torch.zeros_like(input_ids),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        max_seqlen=int(lengths.max()),
        sequence_ids=torch.arange(len(sequences)),
        mlm_positions=none,
        mlm_labels=none,
        sbo_left=none,
        sbo_right=none,
        sbo_cu=torch.zeros(1, dtype=torch.int32),
        sbo_targets=none,
    )
