"""One collator, every family of tokenizer: the masked-language-model flow of transformers.

Data set -> tokenizer -> collator -> plain Trainer; only the collator is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    Trainer,
    TrainingArguments,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaTokenizer,
)
from transformers.utils import logging

from spanbert_fast.config import Config
from spanbert_fast.data.collator import SpanMaskingCollator
from spanbert_fast.data.tokenizer import word_starts
from spanbert_fast.data.wordpiece import train_tokenizer
from spanbert_fast.model.pretrained import Model
from spanbert_fast.train.callback import SpanMaskingCallback

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
ROBERTA_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def bert(sentences: list[str]) -> tuple[Any, Any]:
    tokenizer = train_tokenizer(sentences, 120)
    return tokenizer, BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SHAPE))


def ours(sentences: list[str]) -> tuple[Any, Any]:
    tokenizer = train_tokenizer(sentences, 120)
    return tokenizer, Model(Config(vocab_size=len(tokenizer), **SHAPE))


def byte_level(sentences: list[str], specials: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sentences, trainer)
    return backend


def roberta(sentences: list[str]) -> tuple[Any, Any]:
    trained = byte_level(sentences, ROBERTA_SPECIALS)
    vocabulary = trained.get_vocab()
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = RobertaTokenizer(vocab=vocabulary, merges=merges)
    config = RobertaConfig(vocab_size=len(tokenizer), pad_token_id=1, **SHAPE)
    return tokenizer, RobertaForMaskedLM(config)


def modernbert(sentences: list[str]) -> tuple[Any, Any]:
    backend = byte_level(sentences, BERT_SPECIALS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{token[1:-1].lower()}_token": token for token in BERT_SPECIALS},
    )
    ids = {f"{role}_token_id": index for index, role in enumerate(("pad", "unk", "cls", "sep"))}
    ids |= {"bos_token_id": 2, "eos_token_id": 3}
    del ids["unk_token_id"]
    config = ModernBertConfig(vocab_size=len(tokenizer), local_attention=16, **SHAPE, **ids)
    return tokenizer, ModernBertForMaskedLM(config)


def sentence_piece(sentences: list[str]) -> tuple[Any, Any]:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=ROBERTA_SPECIALS[:4], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(sentences, trainer)
    pieces = [tuple(entry) for entry in json.loads(backend.to_str())["model"]["vocab"]]
    tokenizer = XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)])
    config = XLMRobertaConfig(vocab_size=len(tokenizer), pad_token_id=1, **SHAPE)
    return tokenizer, XLMRobertaForMaskedLM(config)


@pytest.mark.parametrize("build", [ours, bert, roberta, modernbert, sentence_piece])
def test_it_trains(
    build: Callable[[list[str]], tuple[Any, Any]], sentences: list[str], tmp_path: Path
) -> None:
    logging.disable_progress_bar()
    disable_progress_bars()
    torch.manual_seed(0)
    tokenizer, model = build(sentences)
    data = Dataset.from_dict({"text": sentences[:256]}).map(
        lambda batch: tokenizer(batch["text"], return_special_tokens_mask=True),
        batched=True,
        remove_columns=["text"],
    )
    collator = SpanMaskingCollator(tokenizer, spans=build is ours, pad_to_multiple_of=8)
    starts = word_starts(tokenizer)
    text = sentences[1]
    encoding = tokenizer(text, add_special_tokens=False)
    num_words = sum(starts[index] for index in encoding.input_ids[1:]) + 1
    assert num_words == len(text.split()) + (
        build in (ours, bert)
    )  # WordPiece sets the full stop apart.
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=50,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[SpanMaskingCallback()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5]), losses
    assert collator.epoch == 3
