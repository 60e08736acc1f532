"""A Hugging Face data collator around `SpanMasker`; it serves any masked language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import BatchEncoding

from spanbert_fast.data import tokenizer as tokenizers
from spanbert_fast.data.features import Feature, column_id, content_id, read_feature
from spanbert_fast.data.masker_settings import check_integer
from spanbert_fast.data.masking import Int32s, Int64s, MaskedBatch, SpanMasker

_IGNORED: Final = -100
_NO_SPAN: Final = -1
_UNSET: Final = -1
_NUM_EPOCHS: Final = 2**32


class SpanMaskingCollator:
    """Masks and pads examples: a drop-in for `DataCollatorForLanguageModeling`.

    A call takes examples with `input_ids` and returns `input_ids`, `attention_mask`,
    `token_type_ids` (if the examples have them and the tokenizer names them as an input), `labels`
    [B, S] (-100 = no label) and, with `spans`, the inputs of the span boundary objective:
    `sbo_spans` [B, R, 2], columns left and right of each span (-1 = padding), and `sbo_targets`
    [B, R, K] (-100 = padding). Other columns are left out. What is masked, and how, says
    `SpanMasker`; special tokens never are, [UNK] may be.

    The masks of an example depend on the seed, the epoch and the example's id alone: not on the
    batch, the worker or the rank. The id is the column `id_column`, if the collator sees it (the
    Trainer takes it away unless `remove_unused_columns=False`), otherwise a 64-bit hash of the
    unmasked ids; then equal texts have equal masks within an epoch.

    The epoch is a number in shared memory, which workers see, persistent ones too. `set_epoch` sets
    it; `SpanMaskingCallback` and `sf.Trainer` call that at each epoch's begin. As long as nobody
    has, every call draws a random epoch from torch's default generator, which a DataLoader seeds
    from its base seed in each worker: masks change from epoch to epoch, but cannot be replayed.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        spans: bool = True,
        id_column: str | None = "id",
        pad_to_multiple_of: int | None = None,
        replacement_ids: Int32s | None = None,
        word_starts: npt.NDArray[np.bool_] | None = None,
        max_span_targets: int = 15,
        scheme: str = "spanbert",
        **settings: Any,
    ) -> None:
        """Builds the masker of a tokenizer's vocabulary.

        Args:
            tokenizer: a tokenizer of transformers with a padding and a mask token.
            spans: whether to return the inputs of the span boundary objective. `sf.Model` takes
                them; for other models say False.
            id_column: name of the column that holds the example's id, an integer or a string; None:
                always the hash.
            pad_to_multiple_of: columns of a batch become a multiple of it.
            replacement_ids: int32 [any], what random replacements are drawn from. By default every
                entry of the vocabulary that is not special, each as likely as another; SpanBERT
                draws from the corpus: for that, give a sample of its tokens.
            word_starts: bool [V], whether an entry begins a word; by default read from a
                tokenizer of WordPiece, byte-level BPE or SentencePiece.
            max_span_targets: K, as the model's `max_span_targets`.
            scheme: `spanbert`, `whole_word` or `token`.
            settings: other settings of `SpanMasker`: `mask_ratio`, `geometric_p`,
                `min_span_words`, `max_span_words`, `replacement`, `seed`.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of range, the tokenizer has no mask or padding token, or
                it does not tell where words start.
        """
        for role in ("mask", "pad"):
            if getattr(tokenizer, f"{role}_token_id", None) is None:
                raise ValueError(f"the tokenizer has no {role} token, a collator needs one")
        if scheme == "tagged":
            raise ValueError("scheme is 'tagged', must be spanbert, whole_word or token: "
                             "examples have no tags")  # fmt: skip
        if pad_to_multiple_of is not None:
            check_integer("pad_to_multiple_of", pad_to_multiple_of, 1, 2**31 - 1)
        specials = tokenizers.unmaskable_ids(tokenizer)
        self.tokenizer = tokenizer
        self.spans = spans
        self.id_column = id_column
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_span_targets = max_span_targets
        starts = tokenizers.word_starts(tokenizer) if word_starts is None else word_starts
        if replacement_ids is None:
            replacement_ids = tokenizers.ordinary_ids(tokenizer)
        self.masker = SpanMasker(
            starts,
            mask_token_id=tokenizer.mask_token_id,
            special_token_ids=specials,
            replacement_ids=replacement_ids,
            max_span_targets=max_span_targets,
            scheme=scheme,
            **settings,
        )
        self._vocabulary_size = len(starts)
        epoch = torch.tensor(_UNSET, dtype=torch.int64)
        self._epoch = epoch.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int | None:
        """The epoch that the next call masks for; None if nobody has set one."""
        epoch = int(self._epoch)
        return None if epoch == _UNSET else epoch

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, in [0, 2**32), here and in all workers."""
        check_integer("epoch", epoch, 0, _NUM_EPOCHS - 1)
        self._epoch.fill_(int(epoch))

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        """Returns a masked, padded batch.

        Args:
            features: one mapping per example, with `input_ids` and, if there are any,
                `attention_mask`, `token_type_ids`, `special_tokens_mask` (1: never masked) and
                the column of ids; lists, numpy arrays or tensors.

        Raises:
            TypeError: a column does not hold integers.
            ValueError: there are no examples, or one of them is not as described.
        """
        if len(features) == 0:
            raise ValueError("features is empty, must hold at least one example")
        read = [read_feature(i, item, self._vocabulary_size) for i, item in enumerate(features)]
        packed, cu_seqlens = self._pack(read)
        ids = np.array(self._example_ids(features, read), np.int64)
        epoch = self.epoch
        if epoch is None:
            epoch = int(torch.randint(_NUM_EPOCHS, ()))
        masked = self.masker(packed, cu_seqlens, ids, epoch=epoch)
        batch = self._pad(read, masked.input_ids, cu_seqlens)
        place = _Places.of(batch["input_ids"].shape, read, cu_seqlens, self.tokenizer.padding_side)
        batch["labels"] = place.labels(masked)
        if self.spans:
            batch["sbo_spans"], batch["sbo_targets"] = place.spans(masked, self.max_span_targets)
        return batch

    def _pack(self, read: list[Feature]) -> tuple[Int32s, Int32s]:
        """Real tokens end to end; a protected one stands in as a special one, which stays."""
        parts = [feature.real_ids for feature in read]
        cu_seqlens = np.cumsum([0, *map(len, parts)], dtype=np.int32)
        packed = np.concatenate(parts)
        for feature, begin in zip(read, cu_seqlens[:-1], strict=True):
            if feature.is_protected is not None:
                columns = np.flatnonzero(feature.is_protected[feature.begin : feature.end])
                packed[begin + columns] = self.tokenizer.pad_token_id
        return packed, cu_seqlens

    def _example_ids(self, features: Sequence[Mapping[str, Any]], read: list[Feature]) -> list[int]:
        name = self.id_column
        holders = [] if name is None else [i for i, item in enumerate(features) if name in item]
        if name is None or not holders:
            return [content_id(feature.real_ids) for feature in read]
        if len(holders) < len(features):
            raise ValueError(
                f"{name} is in {len(holders)} of {len(features)} features, must be in all or none"
            )
        return [column_id(i, name, item[name]) for i, item in enumerate(features)]

    def _pad(self, read: list[Feature], masked: Int32s, cu_seqlens: Int32s) -> BatchEncoding:
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
        with_types = [feature.token_type_ids is not None for feature in read]
        if any(with_types) and not all(with_types):
            raise ValueError(
                f"token_type_ids is in {sum(with_types)} of {len(read)} features, must be in all "
                "or none"
            )
        if all(with_types) and "token_type_ids" in self.tokenizer.model_input_names:
            rows["token_type_ids"] = [
                feature.token_type_ids.tolist()
                for feature in read
                if feature.token_type_ids is not None
            ]
        for feature, begin, end in zip(read, cu_seqlens[:-1], cu_seqlens[1:], strict=True):
            ids = feature.input_ids.copy()
            ids[feature.begin : feature.end] = masked[begin:end]
            if feature.is_protected is not None:
                ids[feature.is_protected] = feature.input_ids[feature.is_protected]
            rows["input_ids"].append(ids.tolist())
            rows["attention_mask"].append(feature.attention_mask.tolist())
        padded: BatchEncoding = self.tokenizer.pad(
            rows,
            padding=True,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return padded

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy in another process shares the epoch if that is how it came; a file's does not."""
        vars(self).update(state)
        self._epoch.share_memory_()

    def __repr__(self) -> str:
        return f"SpanMaskingCollator({self.masker!r}, spans={self.spans}, epoch={self.epoch})"


class _Places(NamedTuple):
    """Where packed tokens stand in a padded batch."""

    shape: tuple[int, int]
    flat: Int64s
    """int64 [T], row * S + column."""

    @classmethod
    def of(
        cls, shape: Sequence[int], read: list[Feature], cu_seqlens: Int32s, padding_side: str
    ) -> _Places:
        num_columns = shape[1]
        starts = [
            row * num_columns
            + feature.begin
            + (num_columns - len(feature.input_ids) if padding_side == "left" else 0)
            for row, feature in enumerate(read)
        ]
        shifts = np.array(starts, np.int64) - cu_seqlens[:-1]
        flat = np.arange(cu_seqlens[-1]) + np.repeat(shifts, np.diff(cu_seqlens))
        return cls((shape[0], num_columns), flat)

    def labels(self, masked: MaskedBatch) -> torch.Tensor:
        """int64 [B, S]."""
        labels = np.full(self.shape, _IGNORED, np.int64)
        labels.reshape(-1)[self.flat[masked.mlm_positions]] = masked.mlm_labels
        return torch.from_numpy(labels)

    def spans(self, masked: MaskedBatch, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [B, R, 2] and [B, R, K]; R is the largest number of spans of a row."""
        num_rows, num_columns = self.shape
        edges = self.flat[np.stack([masked.sbo_left, masked.sbo_right], axis=1)]
        rows = edges[:, 0] // num_columns
        counts = np.bincount(rows, minlength=num_rows)
        places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        spans = np.full((num_rows, int(counts.max()), 2), _NO_SPAN, np.int64)
        spans[rows, places] = edges % num_columns
        lengths = np.diff(masked.sbo_cu)
        slots = np.arange(masked.sbo_cu[-1]) - np.repeat(masked.sbo_cu[:-1], lengths)
        targets = np.full((*spans.shape[:2], num_slots), _IGNORED, np.int64)
        targets[np.repeat(rows, lengths), np.repeat(places, lengths), slots] = masked.sbo_targets
        return torch.from_numpy(spans), torch.from_numpy(targets)
