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
        if scheme == "segments":
            raise ValueError(
                "scheme is 'segments', must be spanbert, whole_word or token: a collator has no "
                "model that predicts spans, `spanbert-fast pretrain --scheme segments` has"
            )
        if pad_to_multiple_of is not None:
            check_integer("pad_to_multiple_of", pad_to_multiple_of, 1, 2**31 - 1)
        tokenizers.check_case(tokenizer)
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
        original = np.concatenate([feature.input_ids for feature in read])
        is_protected = _protected(read)
        # A special token is never masked, so one stands in for those that must not be.
        maskable = np.where(is_protected, np.int32(self.tokenizer.pad_token_id), original)
        cu_seqlens = np.cumsum([0, *(len(feature.input_ids) for feature in read)], dtype=np.int32)
        ids = np.array(self._example_ids(features, read), np.int64)
        epoch = self.epoch
        if epoch is None:
            epoch = int(torch.randint(_NUM_EPOCHS, ()))
        masked = self.masker(maskable, cu_seqlens, ids, epoch=epoch)
        grid = _Grid.of(read, cu_seqlens, self.pad_to_multiple_of, self.tokenizer.padding_side)
        batch = {
            "input_ids": grid.pad(
                np.where(is_protected, original, masked.input_ids), self.tokenizer.pad_token_id
            ),
            "attention_mask": grid.pad(np.ones(len(original), np.int64), 0),
        }
        types = _token_types(read)
        if types is not None and "token_type_ids" in self.tokenizer.model_input_names:
            batch["token_type_ids"] = grid.pad(types, self.tokenizer.pad_token_type_id)
        batch["labels"] = grid.labels(masked)
        if self.spans:
            batch["sbo_spans"], batch["sbo_targets"] = grid.spans(masked, self.max_span_targets)
        return BatchEncoding(batch)

    def _example_ids(self, features: Sequence[Mapping[str, Any]], read: list[Feature]) -> list[int]:
        name = self.id_column
        holders = [] if name is None else [i for i, item in enumerate(features) if name in item]
        if name is None or not holders:
            return [content_id(feature.input_ids) for feature in read]
        if len(holders) < len(features):
            raise ValueError(
                f"{name} is in {len(holders)} of {len(features)} features, must be in all or none"
            )
        return [column_id(i, name, item[name]) for i, item in enumerate(features)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy in another process shares the epoch if that is how it came; a file's does not."""
        vars(self).update(state)
        self._epoch.share_memory_()

    def __repr__(self) -> str:
        return f"SpanMaskingCollator({self.masker!r}, spans={self.spans}, epoch={self.epoch})"


def _protected(read: list[Feature]) -> npt.NDArray[np.bool_]:
    """Bool [T]."""
    none = [np.zeros(len(feature.input_ids), np.bool_) for feature in read]
    return np.concatenate(
        [
            empty if feature.is_protected is None else feature.is_protected
            for feature, empty in zip(read, none, strict=True)
        ]
    )


def _token_types(read: list[Feature]) -> Int64s | None:
    """int64 [T], or None if no example has any."""
    types = [feature.token_type_ids for feature in read if feature.token_type_ids is not None]
    if len(types) not in (0, len(read)):
        raise ValueError(
            f"token_type_ids is in {len(types)} of {len(read)} features, must be in all or none"
        )
    return np.concatenate(types) if types else None


class _Grid(NamedTuple):
    """A padded batch of B rows and S columns, and where packed tokens stand in it."""

    shape: tuple[int, int]
    flat: Int64s
    """int64 [T], row * S + column."""

    @classmethod
    def of(
        cls, read: list[Feature], cu_seqlens: Int32s, multiple: int | None, padding_side: str
    ) -> _Grid:
        """As wide as the longest example, with the padding it came with, as `tokenizer.pad`."""
        before = np.array([feature.padding_before for feature in read], np.int64)
        behind = np.array([feature.padding_behind for feature in read], np.int64)
        lengths = np.diff(cu_seqlens)
        widths = before + lengths + behind
        num_columns = -(-int(widths.max()) // (multiple or 1)) * (multiple or 1)
        columns = num_columns - widths + before if padding_side == "left" else before
        shifts = np.arange(len(read)) * num_columns + columns - cu_seqlens[:-1]
        flat = np.arange(cu_seqlens[-1]) + np.repeat(shifts, lengths)
        return cls((len(read), num_columns), flat)

    def pad(self, values: npt.NDArray[Any], padding: int) -> torch.Tensor:
        """[T] -> int64 [B, S]."""
        grid = np.full(self.shape, padding, np.int64)
        grid.reshape(-1)[self.flat] = values
        return torch.from_numpy(grid)

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
