"""Token shards as training and evaluation see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch
from spanbert_fast.data.loader import evaluation_batches
from spanbert_fast.data.loss_weighting import LossWeighting
from spanbert_fast.data.masking import SpanMasker
from spanbert_fast.data.segments import WordBatch, word_batches
from spanbert_fast.data.shards import TokenShards
from spanbert_fast.data.target_weights import TargetWeights, measure_weights
from spanbert_fast.data.tokenizer import load_tokenizer, word_starts
from spanbert_fast.train.scheme import SEGMENTS

Split = Literal["train", "validation"]

# Scoring holds one row of logits per target, a third of the tokens at most.
_EVALUATION_TOKENS = 8_192
# Every model meets the same masks, whatever it was trained with.
_EVALUATION_SEED = 0
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")


@dataclass(frozen=True)
class Source:
    """Shards, and the tokenizer that made them."""

    path: Path
    shards: TokenShards
    tokenizer: Any

    def masker(
        self, *, seed: int, max_span_targets: int, settings: Mapping[str, Any]
    ) -> SpanMasker:
        """A masker for this vocabulary.

        The token for unknown pieces stands for a word and may be masked; random replacements
        follow the unigram law of the training split.

        Args:
            seed: Of the masks.
            max_span_targets: Slots of the span boundary head.
            settings: Arguments of `SpanMasker` that differ from their defaults; with the scheme
                `segments`, whose spans are given to each call, it is `tagged` and takes no others.
        """
        if settings.get("scheme") == SEGMENTS:
            kept = {k: v for k, v in settings.items() if k in ("mask_ratio", "replacement")}
            settings = kept | {"scheme": "tagged", "tag_probability": 1.0}
        arguments: dict[str, Any] = {
            "mask_token_id": self.shards.manifest.special_token_ids["mask"],
            "special_token_ids": self._unmaskable_ids(),
            "replacement_ids": self.shards.replacement_sample(),
            "max_span_targets": max_span_targets,
            "seed": seed,
        }
        return SpanMasker(word_starts(self.tokenizer), **arguments, **settings)

    def word_batches(self, rows: Any, *, max_tokens: int) -> Iterator[WordBatch]:
        """Blocks of the training split and where their words lie, as the masker sees them.

        Args:
            rows: int64 array [any], the blocks.
            max_tokens: Of a batch.
        """
        return word_batches(
            self.shards,
            "train",
            rows,
            word_starts=word_starts(self.tokenizer),
            special_token_ids=self._unmaskable_ids(),
            max_tokens=max_tokens,
        )

    def _unmaskable_ids(self) -> list[int]:
        ids = self.shards.manifest.special_token_ids
        return [ids[name] for name in ("pad", "cls", "sep", "mask")]

    def evaluation_batches(
        self, split: Split, *, max_span_targets: int, max_blocks: int = 0
    ) -> Iterator[PackedBatch]:
        """The first blocks of a split under SpanBERT's masks, always the same.

        Args:
            split: "validation" or "train".
            max_span_targets: Slots of the span boundary head.
            max_blocks: Stop after the batch in which this many are reached; 0: give all.
        """
        masker = self.masker(seed=_EVALUATION_SEED, max_span_targets=max_span_targets, settings={})
        longest = max(_EVALUATION_TOKENS, self.shards.manifest.seq_length)
        blocks = 0
        for batch in evaluation_batches(self.shards, masker, max_tokens=longest, split=split):
            yield batch
            blocks += batch.num_sequences
            if max_blocks and blocks >= max_blocks:
                return

    def row_weights(
        self, weighting: LossWeighting, masking: Mapping[str, Any]
    ) -> TargetWeights | None:
        """The weights of training targets; None where all are 1.

        Args:
            weighting: What the user chose.
            masking: Arguments of `SpanMasker` that differ from their defaults.

        Raises:
            ValueError: Weights by span length with the scheme `segments`, whose spans are not yet
                known when the mean is measured.
        """
        if weighting.is_uniform:
            return None
        if masking.get("scheme") == SEGMENTS:
            if weighting.span_length:
                raise ValueError(
                    f"weighting span_length is {weighting.span_length}, must be 0 with the scheme "
                    "'segments': the spans come from the model as it learns, so that the corpus "
                    "mean of such weights is not known"
                )
            # The other weights ask how many pieces of a block are masked, not which.
            masking = {k: v for k, v in masking.items() if k in ("mask_ratio", "replacement")}
        # No weight depends on the slots of the head, nor may the mean depend on the run's seed.
        masker = self.masker(seed=_EVALUATION_SEED, max_span_targets=1, settings=masking)
        return measure_weights(weighting, self.shards, masker)

    def token_counts(self) -> Tensor:
        """int64 [V], how often each piece stands in the training split."""
        return torch.tensor(self.shards.unigram_counts())

    def check_positions(self, max_position_embeddings: int) -> None:
        """Refuse a model that is too short.

        Raises:
            ValueError: The shards have longer sequences than the model has positions.
        """
        length = self.shards.manifest.seq_length
        if max_position_embeddings < length:
            raise ValueError(
                f"{self.path} has sequences of {length} tokens, the model has "
                f"{max_position_embeddings} positions (max_position_embeddings)"
            )

    def check_length(self, seq_length: int | None) -> None:
        """Refuse shards of another length than the user expects; None: any will do.

        Raises:
            ValueError: They have another.
        """
        length = self.shards.manifest.seq_length
        if seq_length not in (None, length):
            raise ValueError(
                f"seq_length is {seq_length}, {self.path} was prepared with {length}: prepare the "
                f"text again with --seq-length {seq_length}"
            )

    def check_vocabulary(self, name: str, vocab_size: int) -> None:
        """Refuse a model whose ids mean other pieces than those of the shards.

        Args:
            name: Folder or hub name of the model. A folder of weights alone has only its size.
            vocab_size: Rows of its embedding.

        Raises:
            ValueError: The vocabularies differ.
        """
        needed = len(self.tokenizer)
        if vocab_size < needed:
            raise ValueError(
                f"{name} has {vocab_size} vocabulary entries, the shards in {self.path} need "
                f"{needed}: prepare them with its tokenizer"
            )
        folder = Path(name)
        if folder.is_dir() and not any((folder / file).exists() for file in _TOKENIZER_FILES):
            return
        if load_tokenizer(name).get_vocab() != self.tokenizer.get_vocab():
            raise ValueError(
                f"{name} was trained with another vocabulary than {self.path} was prepared with; "
                f"prepare the text again with --tokenizer {name}"
            )


def open_source(path: Path) -> Source:
    """The verified shards in a folder.

    Raises:
        ValueError: They are damaged or incomplete.
    """
    shards = TokenShards.open(path)
    return Source(path, shards, load_tokenizer(shards.tokenizer_directory))
