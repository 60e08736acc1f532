"""Span masking of packed batches: which tokens to predict, and what stands in their place.

The rule is that of SpanBERT (Joshi et al. 2020, section 3.1); the work is done in C++.
`csrc/span_masker.h` describes the random stream word by word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from spanbert_fast import _core
from spanbert_fast.data.masker_settings import MaskerSettings, check_array, check_integer

_NO_SPANS: Final = np.empty((0, 2), np.int32)

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


class MaskedBatch(NamedTuple):
    """A masked packed batch. The names and shapes are those of `PackedBatch`."""

    input_ids: Int32s
    """int32 [T], after masking."""
    mlm_positions: Int64s
    """int64 [M], packed positions of the masked tokens, ascending."""
    mlm_labels: Int64s
    """int64 [M], original ids."""
    sbo_left: Int64s
    """int64 [R], packed position of the token before each span."""
    sbo_right: Int64s
    """int64 [R], packed position of the token after each span."""
    sbo_cu: Int32s
    """int32 [R + 1]: the targets of span r are rows `sbo_cu[r]:sbo_cu[r + 1]`."""
    sbo_targets: Int64s
    """int64 [N], original ids of the first `max_span_targets` tokens of each span."""


class AssembledBatch(NamedTuple):
    """Masked rows of a token store. The names, shapes and types are those of `PackedBatch`."""

    input_ids: Int64s
    position_ids: Int64s
    cu_seqlens: Int32s
    mlm_positions: Int64s
    mlm_labels: Int64s
    sbo_left: Int64s
    sbo_right: Int64s
    sbo_cu: Int32s
    sbo_targets: Int64s


class SpanMasker:
    """Masks packed batches; the masks depend on seed, epoch and example id alone.

    A sequence is cut at its special tokens into blocks. Of the L tokens of a block,
    ceil(`mask_ratio` * L) are masked; special tokens never are. Schemes:

    - `spanbert`: spans of whole words. Their number of words follows a geometric law on
      `min_span_words..max_span_words`, renormalised; they begin at the word of an anchor drawn
      uniformly over tokens. Only the span that meets the budget may end inside a word. Spans that
      touch count as one.
    - `whole_word`: the same with one word per span, whatever the lengths say.
    - `token`: single tokens, each replaced on its own, without span boundary targets (BERT).
    - `tagged`: each draw takes, with `tag_probability`, one of the spans given to the call
      (entities, noun phrases), otherwise a span as `spanbert` does. The paper's ablation has
      `max_span_words=1`. With probability 1 only the given spans are masked, and the budget may
      remain unmet.

    Of the spans (`replacement="span"`) or tokens (`"token"`, the original BERT's way), 80% become
    [MASK], 10% random draws from `replacement_ids`, and 10% stay.

    An instance is immutable and can be pickled; threads may share it.
    """

    def __init__(
        self,
        word_starts: npt.NDArray[np.bool_],
        *,
        mask_token_id: int,
        special_token_ids: Sequence[int],
        replacement_ids: Int32s,
        mask_ratio: float = 0.15,
        geometric_p: float = 0.2,
        min_span_words: int = 1,
        max_span_words: int = 10,
        max_span_targets: int = 15,
        scheme: str = "spanbert",
        replacement: str = "span",
        tag_probability: float = 0.5,
        seed: int = 0,
        num_threads: int = 1,
    ) -> None:
        """Builds the tables of a masker.

        Args:
            word_starts: bool [V], whether a vocabulary entry begins a word. A block's first token
                always does.
            mask_token_id: id of [MASK].
            special_token_ids: ids that are never masked and that separate blocks.
            replacement_ids: int32 [any], a sample of corpus tokens; random replacements are drawn
                from it, so they follow the corpus' unigram law. Holds neither special ids nor
                [MASK].
            mask_ratio: share of a block's tokens to mask, in (0, 1).
            geometric_p: parameter of the law of span lengths, in (0, 1).
            min_span_words: shortest span drawn, in words.
            max_span_words: longest span drawn, in words.
            max_span_targets: number of leading tokens of a span that become span boundary targets.
            scheme: one of `spanbert`, `whole_word`, `token`, `tagged`.
            replacement: `span` or `token`, what one 80/10/10 decision is about.
            tag_probability: in [0, 1], only for `tagged`.
            seed: key of the random stream, in [0, 2**64).
            num_threads: threads of a call.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of range.
        """
        check_array("word_starts", word_starts, np.bool_)
        check_array("replacement_ids", replacement_ids, np.int32)
        if len(replacement_ids) == 0:
            raise ValueError("replacement_ids is empty, must hold at least one id")
        self._settings = MaskerSettings(
            vocabulary_size=len(word_starts),
            mask_token_id=mask_token_id,
            special_token_ids=tuple(special_token_ids),
            mask_ratio=mask_ratio,
            geometric_p=geometric_p,
            min_span_words=min_span_words,
            max_span_words=max_span_words,
            max_span_targets=max_span_targets,
            scheme=scheme,
            replacement=replacement,
            tag_probability=tag_probability,
            seed=seed,
            num_threads=num_threads,
        )
        self._word_starts = word_starts.copy()
        self._replacement_ids = replacement_ids.copy()
        self._core = self._build()

    def _build(self) -> _core.SpanMasker:
        settings = self._settings
        return _core.SpanMasker(
            self._word_starts,
            np.array(settings.special_token_ids, np.int32),
            self._replacement_ids,
            mask_token_id=settings.mask_token_id,
            mask_ratio=settings.mask_ratio,
            min_span_words=settings.shortest_span,
            length_thresholds=settings.length_thresholds(),
            max_span_targets=settings.max_span_targets,
            scheme={"token": "tokens", "tagged": "tagged"}.get(settings.scheme, "words"),
            replace_by_token=settings.replacement == "token",
            tag_threshold=round(settings.tag_probability * 2**32),
            seed=settings.seed,
        )

    def __call__(
        self,
        input_ids: Int32s,
        cu_seqlens: Int32s,
        example_ids: Int64s,
        *,
        epoch: int = 0,
        spans: Int32s | None = None,
    ) -> MaskedBatch:
        """Returns a masked copy of a packed batch, and its targets.

        Args:
            input_ids: int32 [T].
            cu_seqlens: int32 [B + 1]: sequence b is `input_ids[cu_seqlens[b]:cu_seqlens[b + 1]]`.
            example_ids: int64 [B], names of the sequences in the random stream.
            epoch: in [0, 2**32); another epoch brings other masks.
            spans: int32 [P, 2], only and always for the scheme `tagged`: half-open packed
                positions, sorted by their beginning, each in one sequence and without special
                tokens.

        Raises:
            TypeError: an argument has a wrong type, or an array is not C-contiguous.
            ValueError: an argument is out of range.
        """
        check_array("input_ids", input_ids, np.int32)
        check_array("cu_seqlens", cu_seqlens, np.int32)
        check_array("example_ids", example_ids, np.int64)
        check_integer("epoch", epoch, 0, 2**32 - 1)
        is_tagged = self._settings.scheme == "tagged"
        if (spans is not None) != is_tagged:
            raise ValueError(
                "spans is None, the scheme 'tagged' needs them"
                if is_tagged
                else f"spans are given, the scheme {self._settings.scheme!r} takes none"
            )
        if spans is not None:
            check_array("spans", spans, np.int32, num_dimensions=2)
        return MaskedBatch(
            *self._core.mask(
                input_ids,
                cu_seqlens,
                example_ids,
                _NO_SPANS if spans is None else spans,
                epoch,
                self._settings.num_threads,
            )
        )

    def assemble(
        self,
        values: npt.NDArray[np.uint16] | Int32s,
        offsets: Int64s,
        rows: Int64s,
        example_ids: Int64s,
        *,
        epoch: int,
        cls_token_id: int,
        sep_token_id: int,
    ) -> AssembledBatch:
        """Returns rows of a token store as one masked packed batch, each between [CLS] and [SEP].

        The masks are those that `__call__` chooses for the same tokens.

        Args:
            values: uint16 or int32 [any], tokens of the store; a memory-mapped buffer is read once.
            offsets: int64 [rows of the store + 1]: row r is `values[offsets[r]:offsets[r + 1]]`.
            rows: int64 [B], rows to take.
            example_ids: int64 [B], names of the sequences in the random stream.
            epoch: in [0, 2**32).
            cls_token_id: a special id, put before each row.
            sep_token_id: a special id, put behind each row.

        Raises:
            TypeError: an argument has a wrong type, or an array is not C-contiguous.
            ValueError: an argument is out of range, or the scheme is `tagged`.
        """
        check_array("values", values, np.uint16, np.int32)
        for name, array in (("offsets", offsets), ("rows", rows), ("example_ids", example_ids)):
            check_array(name, array, np.int64)
        check_integer("epoch", epoch, 0, 2**32 - 1)
        for name, token_id in (("cls_token_id", cls_token_id), ("sep_token_id", sep_token_id)):
            check_integer(name, token_id, 0, len(self._word_starts) - 1)
        if self._settings.scheme == "tagged":
            raise ValueError("scheme is 'tagged', a token store has no spans for it")
        return AssembledBatch(
            *_core.assemble(
                self._core,
                values,
                offsets,
                rows,
                example_ids,
                epoch,
                cls_token_id,
                sep_token_id,
                self._settings.num_threads,
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_core"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._core = self._build()

    def __repr__(self) -> str:
        return f"SpanMasker({self._settings}, {len(self._replacement_ids)} replacement_ids)"
