"""Text on disk: which files, cut into which parts of work, read as which documents."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from spanbert_fast.data.files import COMPRESSIONS, read_chunks, read_sample, split_lines
from spanbert_fast.data.options import TextFormat
from spanbert_fast.data.sentences import SAMPLE_BYTES, recognise_format, split_sentences

Kind = Literal["text", "json", "parquet"]

KINDS: Final[dict[str, Kind]] = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
DIGEST_BYTES: Final = 16
_BLANK_LINE: Final = re.compile(rb"\n[ \t\r]*\n")
_LINE_END: Final = re.compile(rb"\n")
_PARAGRAPH_END: Final = re.compile(r"\n[^\S\n]*\n")
_HALF_PAIR: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input of the user: a file, or a folder with all files below it."""

    name: str
    weight: float
    files: tuple[Path, ...]
    skipped: tuple[Path, ...]
    """Files of a folder whose names do not say that they hold text."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of work: whole documents of one file."""

    source: int
    path: Path
    kind: Kind
    is_lines: bool
    """Whether every line is a sentence."""
    start: int
    end: int
    """Bytes of an uncompressed file, row groups of a Parquet file; all of a compressed one."""
    num_bytes: int
    """Size on disk, for progress."""


class Document(NamedTuple):
    """One document: its sentences, and a name for its text."""

    sentences: list[str]
    digest: bytes
    """First 16 bytes of a blake2b hash of the text, white space collapsed."""
    has_invalid_bytes: bool


def find_source(argument: str) -> Source:
    """The files behind `PATH` or `PATH:WEIGHT`.

    Raises:
        ValueError: the path does not exist, a folder holds no text, or the weight is not positive.
    """
    path, weight = Path(argument), 1.0
    head, _, tail = argument.rpartition(":")
    if not path.exists() and head and Path(head).exists():
        path = Path(head)
        try:
            weight = float(tail)
        except ValueError:
            raise ValueError(f"input {argument!r} has weight {tail!r}, must be a number") from None
    if not 0 < weight <= 1000:
        raise ValueError(f"input {argument!r} has weight {weight}, must be in (0, 1000]")
    if path.is_file():
        return Source(name=argument, weight=weight, files=(path,), skipped=())
    if not path.is_dir():
        raise ValueError(f"input {argument!r} does not exist, must be a file or a folder")
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name[0] != ".")
    files = tuple(file for file in found if kind_of(file) is not None)
    if not files:
        allowed = ", ".join(KINDS)
        raise ValueError(f"input {argument!r} has no file that ends in {allowed} (or .gz, .zst)")
    skipped = tuple(file for file in found if kind_of(file) is None)
    return Source(name=argument, weight=weight, files=files, skipped=skipped)


def kind_of(path: Path) -> Kind | None:
    """What a file's name says it holds, whether or not it is compressed."""
    plain = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return KINDS.get(plain.suffix.lower())


def cut_parts(
    source: int, path: Path, *, text_format: TextFormat, language: str, part_bytes: int
) -> list[Part]:
    """The parts of a file, in order; none if it is empty.

    JSON lines are cut at line ends, text with one sentence per line at blank lines, Parquet files
    between row groups. Running text is one document, so it stays whole, as do compressed files.

    Raises:
        ValueError: the file cannot be read as what its name says.
    """
    kind = kind_of(path) or "text"
    size = path.stat().st_size
    if size == 0:
        return []
    is_lines = text_format == "lines"
    if kind == "text":
        sample = read_sample(path, SAMPLE_BYTES)
        if sample[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path} is UTF-16, must be UTF-8")
        if text_format == "auto":
            text = sample.decode("utf-8", errors="replace").removeprefix("\ufeff")
            is_lines = recognise_format(text, language) == "lines"
    if kind == "parquet":
        cuts, sizes = _cut_row_groups(path, part_bytes)
    else:
        cuts = [0, size]
        if path.suffix not in COMPRESSIONS and (kind == "json" or is_lines):
            cuts = _cut_bytes(path, _LINE_END if kind == "json" else _BLANK_LINE, part_bytes)
        sizes = [end - start for start, end in pairwise(cuts)]
    return [
        Part(
            source=source,
            path=path,
            kind=kind,
            is_lines=is_lines,
            start=start,
            end=end,
            num_bytes=num_bytes,
        )
        for (start, end), num_bytes in zip(pairwise(cuts), sizes, strict=True)
    ]


def read_documents(part: Part, *, text_column: str, language: str) -> Iterator[Document]:
    """Yields the documents of a part, in order.

    Raises:
        ValueError: the file is damaged, a line is no JSON object, or the column is missing.
    """
    for decoded, is_invalid in _raw_documents(part, text_column):
        text = decoded.removeprefix("\ufeff")
        pieces = text.split("\n") if part.is_lines else _PARAGRAPH_END.split(text)
        paragraphs = [p for piece in pieces if (p := " ".join(piece.split()))]
        digest = blake2b(" ".join(paragraphs).encode(), digest_size=DIGEST_BYTES).digest()
        if part.is_lines:
            sentences = paragraphs
        else:
            sentences = [s for p in paragraphs for s in split_sentences(p, language)]
        yield Document(sentences, digest, is_invalid)


def _raw_documents(part: Part, text_column: str) -> Iterator[tuple[str, bool]]:
    """Texts, and whether something in them was no valid UTF-8."""
    if part.kind == "parquet":
        yield from map(_decode, _parquet_documents(part, text_column))
    elif part.kind == "json":
        for number, line in enumerate(
            split_lines(read_chunks(part.path, part.start, part.end)), start=1
        ):
            if line.strip():
                yield _json_text(line, number, part, text_column)
    elif part.is_lines:
        document: list[bytes] = []
        for line in split_lines(read_chunks(part.path, part.start, part.end)):
            if line.strip():
                document.append(line)
            elif document:
                yield _decode(b"\n".join(document))
                document = []
        if document:
            yield _decode(b"\n".join(document))
    else:
        yield _decode(b"".join(read_chunks(part.path, part.start, part.end)))


def _decode(raw: bytes) -> tuple[str, bool]:
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError:
        return raw.decode("utf-8", errors="replace"), True


def _json_text(line: bytes, number: int, part: Part, text_column: str) -> tuple[str, bool]:
    where = f"{part.path}, line {number}" + (f" after byte {part.start}" if part.start else "")
    decoded, is_invalid = _decode(line)
    try:
        record = json.loads(decoded.removeprefix("\ufeff"))
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}, must be a JSON object")
    if text_column not in record:
        raise ValueError(f"{where} has no {text_column!r}, only {', '.join(sorted(record))}")
    text = record[text_column]
    if text is None:
        return "", is_invalid
    if not isinstance(text, str):
        raise ValueError(f"{where} has a {type(text).__name__} in {text_column!r}, must be text")
    # JSON can spell half a surrogate pair, which is no character.
    text, num_halves = _HALF_PAIR.subn("\ufffd", text)
    return text, is_invalid or num_halves > 0


def _parquet_documents(part: Part, text_column: str) -> Iterator[bytes]:
    with pq.ParquetFile(part.path) as file:
        names = file.schema_arrow.names
        if text_column not in names:
            raise ValueError(f"{part.path} has no column {text_column!r}, only {', '.join(names)}")
        kind = file.schema_arrow.field(text_column).type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not (is_text or pa.types.is_null(kind)):
            raise ValueError(f"{part.path} has {kind} in column {text_column!r}, must be string")
        groups = list(range(part.start, part.end))
        for batch in file.iter_batches(1024, row_groups=groups, columns=[text_column]):
            for text in batch.column(0).cast(pa.large_binary()).to_pylist():
                yield text or b""


def _cut_row_groups(path: Path, part_bytes: int) -> tuple[list[int], list[int]]:
    try:
        metadata = pq.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    cuts, sizes, current = [0], [], 0
    for group in range(metadata.num_row_groups):
        current += metadata.row_group(group).total_byte_size
        if current >= part_bytes or group == metadata.num_row_groups - 1:
            cuts.append(group + 1)
            sizes.append(current)
            current = 0
    return cuts, sizes


def _cut_bytes(path: Path, boundary: re.Pattern[bytes], part_bytes: int) -> list[int]:
    size = path.stat().st_size
    cuts = [0]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while size - cuts[-1] > part_bytes:
            found = boundary.search(content, cuts[-1] + part_bytes)
            if found is None or found.end() == size:
                break
            cuts.append(found.end())
    return [*cuts, size]
