"""Token shards, as `docs/data_format.md` describes them: verified, and read by memory map."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spanbert_fast.data.manifest import (
    SPECIAL_TOKENS_PER_BLOCK,
    SPLITS,
    TOKENIZER_FOLDER,
    Manifest,
    ShardFile,
    Split,
    describe_file,
    read_manifest,
)

Ids = npt.NDArray[np.uint16] | npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """Blocks laid end to end: row r is `values[offsets[r]:offsets[r + 1]]`."""

    values: Ids
    offsets: Int64s


@dataclass(frozen=True)
class TokenShards:
    """A folder of token shards, mapped into memory.

    Row r of a split is block r, whatever file it lies in.
    """

    directory: Path
    manifest: Manifest
    manifest_hash: str
    """`Manifest.content_hash`: equal for equal shards, wherever their text was found."""
    _segments: dict[str, list[Rows]]
    """Per split, the mapped record batches in order."""
    _starts: dict[str, Int64s]
    """Per split, the first row of each segment, and the number of rows."""

    @classmethod
    def open(cls, directory: str | Path, *, verify: bool = True) -> Self:
        """The shards in a folder.

        Args:
            directory: a folder that `prepare`, or another engine, wrote.
            verify: compare every file with its checksum, and ids and lengths with what the manifest
                allows. Without it only names, sizes, types and row counts are checked.

        Raises:
            ValueError: something is missing or wrong; the message names the file.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        for file in manifest.all_files():
            _check_file(directory, file, verify=verify)
        segments: dict[str, list[Rows]] = {}
        starts: dict[str, Int64s] = {}
        for split in SPLITS:
            segments[split] = [
                segment
                for file in manifest.files(split)
                for segment in _map_file(directory, file, manifest, verify=verify)
            ]
            sizes = [len(segment.offsets) - 1 for segment in segments[split]]
            starts[split] = np.cumsum([0, *sizes], dtype=np.int64)
            found, counted = int(starts[split][-1]), getattr(manifest.counts, split).blocks
            if found != counted:
                raise ValueError(
                    f"{directory} holds {found} blocks of split {split}, manifest counts {counted}"
                )
        return cls(directory, manifest, manifest.content_hash(), segments, starts)

    @property
    def tokenizer_directory(self) -> Path:
        """The folder of the tokenizer that made the shards."""
        return self.directory / TOKENIZER_FOLDER

    def num_blocks(self, split: Split) -> int:
        """Number of rows of a split."""
        return int(self._starts[_checked(split)][-1])

    def lengths(self, split: Split) -> npt.NDArray[np.int32]:
        """int32 [rows], pieces of each block, without [CLS] and [SEP]."""
        parts = [np.diff(segment.offsets) for segment in self._segments[_checked(split)]]
        return np.concatenate(parts or [np.empty(0, np.int64)]).astype(np.int32)

    def gather(self, split: Split, rows: Int64s) -> Rows:
        """Copies of the blocks `rows` (int64 [B]), in that order.

        Raises:
            ValueError: a row is out of range.
        """
        size = self.num_blocks(split)
        if len(rows) and (rows.min() < 0 or rows.max() >= size):
            raise ValueError(
                f"rows lie in [{rows.min()}, {rows.max()}], split {split} has rows 0 to {size - 1}"
            )
        starts, segments = self._starts[split], self._segments[split]
        homes = np.searchsorted(starts, rows, side="right") - 1
        pieces: list[Ids] = []
        offsets = np.zeros(len(rows) + 1, np.int64)
        for index, (home, place) in enumerate(
            zip(homes.tolist(), (rows - starts[homes]).tolist(), strict=True)
        ):
            segment = segments[home]
            pieces.append(segment.values[segment.offsets[place] : segment.offsets[place + 1]])
            offsets[index + 1] = offsets[index] + len(pieces[-1])
        if not pieces:
            pieces.append(np.empty(0, np.dtype(self.manifest.dtype)))
        values: Any = np.concatenate(pieces)
        return Rows(values, offsets)

    def unigram_counts(self) -> Int64s:
        """int64 [V], how often each id stands in the training split."""
        file = self.manifest.unigram_counts
        table = read_stream(self.directory / file.name, pa.schema([("count", pa.int64())]))
        counts: Int64s = table.column("count").to_numpy()
        if len(counts) != self.manifest.vocab_size:
            raise ValueError(
                f"{file.name} has {len(counts)} counts, the vocabulary {self.manifest.vocab_size}"
            )
        return counts

    def replacement_sample(self, size: int = 65_536, *, seed: int = 0) -> npt.NDArray[np.int32]:
        """int32 [size], ordinary ids in the proportions of the training split, ascending.

        The sample is systematic: ids at the quantiles (i + u) / size of the unigram law, with u
        from the seed. So an id of probability p stands in it size * p times, rounded up or down.

        Raises:
            ValueError: `size` is below 1, or the training split holds nothing but specials.
        """
        if size < 1:
            raise ValueError(f"size is {size}, must be at least 1")
        counts = self.unigram_counts().copy()
        counts[list(self.manifest.special_token_ids.values())] = 0
        total = int(counts.sum())
        if total == 0:
            raise ValueError(f"{self.directory}: the training split holds no ordinary token")
        digest = hashlib.blake2b(f"replacement sample {seed}".encode(), digest_size=8).digest()
        shift = int.from_bytes(digest, "little")
        # Exact integers: floating quantiles may round differently from one machine to the next.
        ranks = [((i << 64) + shift) * total // (size << 64) for i in range(size)]
        ids = np.searchsorted(np.cumsum(counts), np.array(ranks, np.int64), side="right")
        return ids.astype(np.int32)


def _checked(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, must be one of {', '.join(SPLITS)}")
    return split


def _check_file(directory: Path, file: ShardFile, *, verify: bool) -> None:
    path = directory / file.name
    if not path.is_file():
        raise ValueError(f"{path} is missing, the manifest lists it")
    if path.stat().st_size != file.bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, manifest says {file.bytes}")
    if verify:
        found = describe_file(directory, file.name).sha256
        if found != file.sha256:
            raise ValueError(f"{path} has sha256 {found}, manifest says {file.sha256}")


def read_stream(path: Path, schema: Any) -> Any:
    """The table in an Arrow IPC stream, mapped into memory.

    Raises:
        ValueError: it is none, or has other columns than `schema`.
    """
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not an Arrow IPC stream: {error}") from error
    if not table.schema.equals(schema):
        raise ValueError(f"{path} has {_columns(table.schema)}, must have {_columns(schema)}")
    return table


def _columns(schema: Any) -> str:
    return "columns " + ", ".join(f"{field.name}: {field.type}" for field in schema)


def shard_schema(dtype: str) -> Any:
    """The Arrow schema of a shard whose ids are `dtype` (uint16 or int32)."""
    items = pa.uint16() if dtype == "uint16" else pa.int32()
    return pa.schema([("input_ids", pa.large_list(items))])


def _map_file(directory: Path, file: ShardFile, manifest: Manifest, *, verify: bool) -> list[Rows]:
    """The record batches of a shard as views of the mapped file."""
    path = directory / file.name
    column = read_stream(path, shard_schema(manifest.dtype)).column("input_ids")
    if len(column) != file.rows:
        raise ValueError(f"{path} has {len(column)} rows, manifest says {file.rows}")
    if column.null_count:
        raise ValueError(f"{path} has {column.null_count} null rows, must have none")
    segments = [
        Rows(chunk.values.to_numpy(zero_copy_only=True), chunk.offsets.to_numpy())
        for chunk in column.chunks
    ]
    if verify:
        for segment in segments:
            _check_segment(path, segment, manifest)
    return segments


def _check_segment(path: Path, segment: Rows, manifest: Manifest) -> None:
    lengths = np.diff(segment.offsets)
    longest = manifest.seq_length - SPECIAL_TOKENS_PER_BLOCK
    if len(lengths) and (lengths.min() < 1 or lengths.max() > longest):
        raise ValueError(
            f"{path} has blocks of {lengths.min()} to {lengths.max()} pieces, "
            f"must have 1 to {longest}"
        )
    ids = segment.values[segment.offsets[0] : segment.offsets[-1]]
    if len(ids) and (ids.min() < 0 or ids.max() >= manifest.vocab_size):
        raise ValueError(
            f"{path} has ids from {ids.min()} to {ids.max()}, "
            f"must be in [0, {manifest.vocab_size - 1}]"
        )
