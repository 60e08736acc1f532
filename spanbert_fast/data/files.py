"""Bytes of files: decompressed, in chunks or lines, with damage found."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import zstandard

COMPRESSIONS: Final = (".gz", ".zst")
_CHUNK_BYTES: Final = 1 << 20


def read_sample(path: Path, num_bytes: int) -> bytes:
    """The first `num_bytes` bytes, decompressed."""
    sample = b""
    for chunk in read_chunks(path, 0, num_bytes):
        sample += chunk
        if len(sample) >= num_bytes:
            break
    return sample[:num_bytes]


def read_chunks(path: Path, start: int, end: int) -> Iterator[bytes]:
    """Yields the bytes from `start` to `end` of a plain file, or all of a compressed one.

    Raises:
        ValueError: compressed data are damaged or cut off.
    """
    with path.open("rb") as file:
        if path.suffix == ".gz":
            yield from _decompress(file, lambda: zlib.decompressobj(31), path)
        elif path.suffix == ".zst":
            yield from _decompress(file, zstandard.ZstdDecompressor().decompressobj, path)
        else:
            file.seek(start)
            left = end - start
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                left -= len(chunk)
                yield chunk


def _decompress(file: Any, make: Callable[[], Any], path: Path) -> Iterator[bytes]:
    """Decompressed chunks. Unlike the stream readers of the libraries, it notices a lost end."""
    decompressor = None
    try:
        while data := file.read(_CHUNK_BYTES):
            while data:
                decompressor = decompressor or make()
                if chunk := decompressor.decompress(data):
                    yield chunk
                data = b""
                if decompressor.eof:
                    data, decompressor = decompressor.unused_data, None
    except (zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if decompressor is not None:
        raise ValueError(f"{path} is damaged: it ends in the middle of its compressed data")


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends; a line may be much longer than a chunk."""
    pending: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pending.append(first)
        if others:
            yield b"".join(pending)
            yield from others[:-1]
            pending = [others[-1]]
    if any(pending):
        yield b"".join(pending)
