"""Spans that a model predicted for blocks: found, stored, and masked in the place of random ones.

The model's half cuts the words of a `WordBatch`; what it finds comes back as `BlockSpans`, goes
into a file, and a `SegmentMasker` draws from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch
from spanbert_fast.data.manifest import SPECIAL_TOKENS_PER_BLOCK, Split, describe_file
from spanbert_fast.data.masking import AssembledBatch, SpanMasker
from spanbert_fast.data.shard_writer import write_stream
from spanbert_fast.data.shards import Rows, TokenShards, read_stream

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_PAIRS: Final[Any] = pa.list_(pa.int32(), 2)
SCHEMA: Final[Any] = pa.schema([("row", pa.int64()), ("spans", pa.large_list(_PAIRS))])


class BlockSpans(NamedTuple):
    """Spans of some blocks."""

    rows: Int64s
    """int64 [B], the blocks, ascending."""
    offsets: Int64s
    """int64 [B + 1]: the spans of block `rows[b]` are `spans[offsets[b]:offsets[b + 1]]`."""
    spans: Int32s
    """int32 [P, 2], half-open, in pieces of the block counted from 0; ascending in a block."""

    @classmethod
    def join(cls, parts: Sequence[BlockSpans]) -> Self:
        """The spans of parts whose rows ascend from one to the next."""
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
            np.concatenate([part.spans for part in parts]),
        )

    def write(self, path: Path) -> str:
        """Writes an Arrow IPC stream, complete or not at all; its SHA-256."""
        path.parent.mkdir(parents=True, exist_ok=True)
        pairs = pa.FixedSizeListArray.from_arrays(pa.array(self.spans.reshape(-1)), type=_PAIRS)
        column = pa.LargeListArray.from_arrays(pa.array(self.offsets), pairs)
        write_stream(path, [pa.array(self.rows), column], SCHEMA)
        return describe_file(path.parent, path.name).sha256

    @classmethod
    def read(cls, path: Path, sha256: str) -> Self:
        """The spans that `write` wrote.

        Raises:
            ValueError: the file is missing, or its checksum is another one.
        """
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        found = describe_file(path.parent, path.name).sha256
        if found != sha256:
            raise ValueError(f"{path} has sha256 {found}, must have {sha256}")
        table = read_stream(path, SCHEMA).combine_chunks()
        if not len(table):
            return cls(np.empty(0, np.int64), np.zeros(1, np.int64), np.empty((0, 2), np.int32))
        column = table.column("spans").chunk(0)
        spans = column.values.flatten().to_numpy().reshape(-1, 2)
        return cls(table.column("row").to_numpy(), column.offsets.to_numpy(), spans)

    def gather(self, rows: Int64s) -> tuple[Int32s, Int64s]:
        """The spans of the blocks `rows` (int64 [B]) in that order, and how many each has.

        Raises:
            ValueError: a block has no entry.
        """
        places = np.searchsorted(self.rows, rows)
        known = places < len(self.rows)
        known[known] = self.rows[places[known]] == rows[known]
        if not known.all():
            raise ValueError(f"block {int(rows[~known][0])} was not segmented")
        counts = np.diff(self.offsets)[places]
        chosen = _counted(self.offsets[places], counts)
        return self.spans[chosen], counts


class WordBatch(NamedTuple):
    """Whole blocks between [CLS] and [SEP], unmasked, and where their words lie.

    A word begins where the vocabulary says so, at a block's first piece, and behind a special
    token, as for `SpanMasker`.
    """

    rows: Int64s
    """int64 [B], the blocks."""
    batch: PackedBatch
    """Without targets."""
    word_of: Tensor
    """int64 [T], the word of each piece, counted over the batch; -1 for special tokens."""
    cu_words: Tensor
    """int32 [B + 1], boundaries of the blocks in words."""
    limits: Tensor
    """int32 [any], words that no span may join to the word before: `cu_words`, and the first word
    behind a special token inside of a block."""

    def spans(self, first_words: Tensor, num_words: Tensor) -> BlockSpans:
        """Spans of words as spans of pieces.

        Args:
            first_words: int64 [P], ascending.
            num_words: int64 [P].
        """
        word_of = self.word_of.numpy()
        pieces = np.flatnonzero(word_of >= 0)
        sizes = np.bincount(word_of[pieces], minlength=int(self.cu_words[-1]))
        firsts = pieces[np.cumsum(sizes) - sizes]
        first = first_words.numpy()
        last = first + num_words.numpy() - 1
        owner = np.searchsorted(self.cu_words.numpy(), first, side="right") - 1
        shift = self.batch.cu_seqlens.numpy()[owner] + 1  # [CLS] is no piece of the block.
        pairs = np.stack([firsts[first] - shift, firsts[last] + sizes[last] - shift], axis=1)
        offsets = np.searchsorted(first, self.cu_words.numpy()).astype(np.int64)
        return BlockSpans(self.rows, offsets, pairs.astype(np.int32))


def word_batches(
    shards: TokenShards,
    split: Split,
    rows: Int64s,
    *,
    word_starts: Bools,
    special_token_ids: Sequence[int],
    max_tokens: int,
) -> Iterator[WordBatch]:
    """Yields blocks in the given order; the batches depend on the arguments alone.

    Args:
        shards: the open shards.
        split: `train` or `validation`.
        rows: int64 [any], the blocks.
        word_starts: bool [V], whether a vocabulary entry begins a word.
        special_token_ids: ids that are no part of a word.
        max_tokens: real tokens of a batch; a longer block stands alone.
    """
    is_special = np.zeros(len(word_starts), np.bool_)
    is_special[list(special_token_ids)] = True
    ends = np.cumsum(shards.lengths(split)[rows].astype(np.int64) + SPECIAL_TOKENS_PER_BLOCK)
    start = 0
    while start < len(rows):
        done = int(ends[start - 1]) if start else 0
        fitting = int(np.searchsorted(ends, done + max_tokens, side="right"))
        end = max(start + 1, fitting)
        part = rows[start:end]
        packed = _Packed.of(shards.gather(split, part), shards.manifest.special_token_ids)
        yield _find_words(part, packed, word_starts, is_special)
        start = end


class SegmentMasker:
    """Masks blocks in spans that were predicted for them; the rest is as `SpanMasker` does it.

    Of the block's spans one is drawn at a time, each as likely as another, until the budget is
    spent; the one that spends it may be cut. The random stream is that of the scheme `tagged` with
    `tag_probability=1`.
    """

    def __init__(self, masker: SpanMasker, spans: BlockSpans) -> None:
        """Takes a masker of the scheme `tagged`, and the spans of the blocks that will come."""
        self._masker, self._spans = masker, spans

    def assemble(
        self,
        values: Any,
        offsets: Int64s,
        rows: Int64s,
        example_ids: Int64s,
        *,
        epoch: int,
        cls_token_id: int,
        sep_token_id: int,
    ) -> AssembledBatch:
        """As `SpanMasker.assemble`; `example_ids` are the blocks' rows in their split.

        Raises:
            ValueError: a block was not segmented.
        """
        lengths = np.diff(offsets)[rows]
        store = Rows(values[_counted(offsets[rows], lengths)], _boundaries(lengths))
        packed = _Packed.of(store, {"cls": cls_token_id, "sep": sep_token_id})
        spans, counts = self._spans.gather(example_ids)
        shift = np.repeat(packed.cu_seqlens[:-1] + 1, counts)
        spans = (spans + shift[:, None]).astype(np.int32)
        masked = self._masker(
            packed.input_ids, packed.cu_seqlens, example_ids, epoch=epoch, spans=spans
        )
        fields = masked._asdict() | {"input_ids": masked.input_ids.astype(np.int64)}
        return AssembledBatch(
            **fields, position_ids=packed.position_ids, cu_seqlens=packed.cu_seqlens
        )


class _Packed(NamedTuple):
    """Blocks between [CLS] and [SEP]."""

    input_ids: Int32s
    cu_seqlens: Int32s
    position_ids: Int64s

    @classmethod
    def of(cls, blocks: Rows, special_token_ids: dict[str, int]) -> Self:
        lengths = np.diff(blocks.offsets)
        sizes = lengths + SPECIAL_TOKENS_PER_BLOCK
        cu = _boundaries(sizes)
        ids = np.empty(int(cu[-1]), np.int32)
        ids[cu[:-1]] = special_token_ids["cls"]
        ids[cu[1:] - 1] = special_token_ids["sep"]
        ids[_counted(cu[:-1] + 1, lengths)] = blocks.values
        return cls(ids, cu.astype(np.int32), _counted(np.zeros_like(sizes), sizes))


def _find_words(rows: Int64s, packed: _Packed, word_starts: Bools, is_special: Bools) -> WordBatch:
    ids, cu = packed.input_ids, packed.cu_seqlens
    special = is_special[ids]
    behind = np.concatenate([np.ones(1, np.bool_), special[:-1]])
    begins = ~special & (word_starts[ids] | behind)
    word_of = np.where(special, -1, np.cumsum(begins) - 1)
    words_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(begins)])
    cu_words = words_before[cu].astype(np.int32)
    # The words of a block begin behind [CLS], so this holds the blocks' first words, too.
    limits = np.union1d(cu_words, words_before[:-1][begins & behind]).astype(np.int32)
    none = torch.zeros(0, dtype=torch.int64)
    batch = PackedBatch(
        input_ids=torch.from_numpy(ids.astype(np.int64)),
        position_ids=torch.from_numpy(packed.position_ids),
        token_type_ids=torch.zeros(len(ids), dtype=torch.int64),
        cu_seqlens=torch.from_numpy(cu),
        max_seqlen=int(np.diff(cu).max()),
        sequence_ids=torch.from_numpy(rows),
        mlm_positions=none,
        mlm_labels=none,
        sbo_left=none,
        sbo_right=none,
        sbo_cu=torch.zeros(1, dtype=torch.int32),
        sbo_targets=none,
    )
    return WordBatch(
        rows,
        batch,
        torch.from_numpy(word_of.astype(np.int64)),
        torch.from_numpy(cu_words),
        torch.from_numpy(limits),
    )


def _boundaries(lengths: Int64s) -> Int64s:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _counted(begins: npt.NDArray[Any], counts: Int64s) -> Int64s:
    """int64 [sum of counts]: begin, begin + 1, ... of each run, one run after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    places: Int64s = np.arange(total) - np.repeat(ends - counts - begins, counts)
    return places
