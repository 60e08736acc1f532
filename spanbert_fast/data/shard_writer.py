"""Finished parts become shards: duplicates out, weights in, held-out documents apart."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spanbert_fast.data.blocks import PartResult
from spanbert_fast.data.manifest import Counts, ShardFile, Split, Tally, describe_file
from spanbert_fast.data.shards import shard_schema

Int64s = npt.NDArray[np.int64]
UNIGRAM_NAME: Final = "unigram_counts.arrow"


class Fates(NamedTuple):
    """What becomes of every document, in the order of the corpus."""

    copies: Int64s
    """int64 [documents], how often it is written; 0: not at all."""
    is_held_out: npt.NDArray[np.bool_]
    is_duplicate: npt.NDArray[np.bool_]
    is_empty: npt.NDArray[np.bool_]


def decide_fates(
    digests: npt.NDArray[np.uint8],
    num_tokens: Int64s,
    weights: npt.NDArray[np.float64],
    validation_permille: int,
) -> Fates:
    """Decides from the text's hash and the source's weight alone.

    A document without pieces is empty. Of documents with equal text the first is kept. A document
    is held out if the first eight bytes of its digest, as a little-endian number, are below
    `validation_permille` modulo 1000; then it is written once, whatever its weight. Any other is
    written floor(weight) times, and once more if the last eight bytes, as a fraction of 2**64, are
    below the rest of the weight.

    Args:
        digests: uint8 [documents, 16].
        num_tokens: int64 [documents].
        weights: float64 [documents], of the source of each document.
        validation_permille: thousandths to hold out.
    """
    is_empty = num_tokens == 0
    names = np.ascontiguousarray(digests).view("V16").reshape(-1)
    is_duplicate = np.ones(len(names), np.bool_)
    is_duplicate[np.unique(names, return_index=True)[1]] = False
    is_duplicate &= ~is_empty
    halves = np.ascontiguousarray(digests).view("<u8").reshape(-1, 2)
    is_held_out = halves[:, 0] % np.uint64(1000) < validation_permille
    whole = np.floor(weights)
    # 53 bits make an exact fraction on every machine.
    fraction = (halves[:, 1] >> np.uint64(11)).astype(np.float64) / 2.0**53
    copies = whole.astype(np.int64) + (fraction < weights - whole)
    copies[is_held_out] = 1
    copies[is_duplicate | is_empty] = 0
    return Fates(copies, is_held_out, is_duplicate, is_empty)


def count(tallies: Int64s, fates: Fates) -> Counts:
    """Adds up where every document went.

    Args:
        tallies: int64 [documents, 4]: sentences, tokens, blocks, cut sentences.
        fates: of the same documents.
    """

    def tally(times: Int64s) -> Tally:
        sentences, tokens, blocks, cut_sentences = map(int, times @ tallies)
        return Tally(
            documents=int(times.sum()),
            sentences=sentences,
            tokens=tokens,
            blocks=blocks,
            cut_sentences=cut_sentences,
        )

    kept = ~fates.is_empty & ~fates.is_duplicate
    trained = kept & ~fates.is_held_out
    return Counts(
        read=tally(np.ones(len(tallies), np.int64)),
        repeated=tally(np.maximum(fates.copies - 1, 0)),
        empty=tally(fates.is_empty.astype(np.int64)),
        duplicates=tally(fates.is_duplicate.astype(np.int64)),
        sampled_out=tally((kept & (fates.copies == 0)).astype(np.int64)),
        train=tally(np.where(trained, fates.copies, 0)),
        validation=tally((kept & fates.is_held_out).astype(np.int64)),
    )


class SplitWriter:
    """Writes the shards of one split, each with a fixed number of rows but the last."""

    def __init__(self, directory: Path, split: Split, *, dtype: str, rows_per_file: int) -> None:
        self.files: list[ShardFile] = []
        self._directory, self._split = directory, split
        self._dtype, self._rows_per_file = dtype, rows_per_file
        self._values: list[npt.NDArray[Any]] = []
        self._lengths: list[Int64s] = []
        self._num_rows = 0

    def add(self, result: PartResult, documents: Int64s) -> None:
        """Appends the blocks of some documents of a part (int64 [N], repeats allowed)."""
        ends = np.cumsum(result.tallies[:, 2])
        counts = result.tallies[documents, 2]
        # The rows of a document are consecutive: begin of each document, counted up within it.
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = np.repeat(ends[documents] - counts, counts) + within
        row_ends = np.cumsum(result.block_lengths)
        while len(rows):
            now, rows = np.split(rows, [self._rows_per_file - self._num_rows])
            lengths = result.block_lengths[now]
            begins = row_ends[now] - lengths
            self._values += [
                result.values[begin : begin + length]
                for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True)
            ]
            self._lengths.append(lengths)
            self._num_rows += len(now)
            if self._num_rows == self._rows_per_file:
                self.flush()
        # What waits for the next part must not keep this part mapped.
        if self._values:
            self._values = [np.concatenate(self._values)]

    def flush(self) -> None:
        """Writes what has gathered as one file."""
        if self._num_rows == 0:
            return
        values = np.concatenate(self._values)
        offsets = np.zeros(self._num_rows + 1, np.int64)
        np.cumsum(np.concatenate(self._lengths), out=offsets[1:])
        column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
        name = f"{self._split}-{len(self.files):05d}.arrow"
        write_stream(self._directory / name, [column], shard_schema(self._dtype))
        self.files.append(
            describe_file(self._directory, name, rows=self._num_rows, tokens=len(values))
        )
        self._values, self._lengths, self._num_rows = [], [], 0


def write_stream(path: Path, columns: Sequence[Any], schema: Any) -> None:
    """Writes an Arrow IPC stream of one record batch; the file is complete or absent."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_shards(
    directory: Path,
    results: Sequence[Callable[[], PartResult]],
    fates: Fates,
    *,
    dtype: str,
    vocab_size: int,
    rows_per_file: int,
    on_blocks: Callable[[int], None],
) -> tuple[list[ShardFile], list[ShardFile], ShardFile]:
    """Writes the files of both splits, and the unigram counts of the training split.

    Args:
        directory: where the files go.
        results: opens the parts, in order.
        fates: of the documents of all parts.
        dtype: `uint16` or `int32`.
        vocab_size: V, length of the unigram counts.
        rows_per_file: rows of each file but the last of a split.
        on_blocks: told after each part how many blocks are done, written or left out.
    """
    train = SplitWriter(directory, "train", dtype=dtype, rows_per_file=rows_per_file)
    held_out = SplitWriter(directory, "validation", dtype=dtype, rows_per_file=rows_per_file)
    unigram_counts = np.zeros(vocab_size, np.int64)
    first = done = 0
    for open_result in results:
        result = open_result()
        own = slice(first, first + len(result.tallies))
        first = own.stop
        copies, is_held_out = fates.copies[own], fates.is_held_out[own]
        trained = np.where(is_held_out, 0, copies)
        train.add(result, np.repeat(np.arange(len(copies)), trained))
        held_out.add(result, np.flatnonzero(is_held_out & (copies > 0)))
        per_token = np.repeat(trained, result.tallies[:, 1])
        # Weights are whole numbers far below 2**53, so the sums in floating point are exact.
        unigram_counts += np.bincount(result.values, per_token, vocab_size).astype(np.int64)
        done += int(result.tallies[:, 2].sum())
        on_blocks(done)
    train.flush()
    held_out.flush()
    schema = pa.schema([("count", pa.int64())])
    write_stream(directory / UNIGRAM_NAME, [pa.array(unigram_counts)], schema)
    return train.files, held_out.files, describe_file(directory, UNIGRAM_NAME)
