"""What stands beside token shards: how they were made, what they hold, checksums of all files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

FORMAT: Final = "spanbert_fast token shards"
VERSION: Final = 1
MANIFEST_NAME: Final = "manifest.json"
TOKENIZER_FOLDER: Final = "tokenizer"
SPECIAL_TOKENS_PER_BLOCK: Final = 2
"""A stored block has no specials; the model sees it between [CLS] and [SEP]."""

Split = Literal["train", "validation"]
SPLITS: Final[tuple[Split, ...]] = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How much text: counts that add up over the places where documents end."""

    documents: int = 0
    sentences: int = 0
    """Sentences of at least one piece."""
    tokens: int = 0
    """Pieces, without specials."""
    blocks: int = 0
    cut_sentences: int = 0
    """Sentences longer than a block, which were cut."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in dataclasses.fields(self)
            }
        )


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Where every document went.

    read + repeated = empty + duplicates + sampled_out + train + validation, in every count.
    """

    read: Tally
    """Everything in the inputs, once."""
    repeated: Tally
    """Additional copies, of documents whose source weighs more than 1."""
    empty: Tally
    """Documents without any piece."""
    duplicates: Tally
    """Documents whose text, up to white space, stood earlier in the inputs."""
    sampled_out: Tally
    """Documents left out because their source weighs less than 1."""
    train: Tally
    validation: Tally

    def __post_init__(self) -> None:
        left = self.read + self.repeated
        right = self.empty + self.duplicates + self.sampled_out + self.train + self.validation
        assert left == right, f"counts do not add up: {left} against {right}"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One file of the folder."""

    name: str
    """Path relative to the folder, with forward slashes."""
    sha256: str
    bytes: int
    rows: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`."""

    seq_length: int
    """Longest sequence that the model sees, [CLS] and [SEP] included."""
    vocab_size: int
    dtype: Literal["uint16", "int32"]
    tokenizer_sha256: str
    special_token_ids: dict[str, int]
    """Ids of `pad`, `unk`, `cls`, `sep` and `mask`."""
    settings: dict[str, Any]
    """Options and versions on which the bytes depend."""
    inputs: dict[str, int]
    """Numbers of `files`, `bytes`, `empty_files`, `skipped_files`, `invalid_utf8_documents`."""
    counts: Counts
    train: tuple[ShardFile, ...]
    validation: tuple[ShardFile, ...]
    unigram_counts: ShardFile
    tokenizer: tuple[ShardFile, ...]

    def files(self, split: Split) -> tuple[ShardFile, ...]:
        """The shards of a split, in the order of their rows."""
        return self.train if split == "train" else self.validation

    def all_files(self) -> tuple[ShardFile, ...]:
        """Every file that has a checksum."""
        return (*self.train, *self.validation, self.unigram_counts, *self.tokenizer)

    def content_hash(self) -> str:
        """sha256 that names the content: the checksums, and not where the text came from.

        The same text prepared in another place, or named in another way, is the same content.
        """
        files = [(file.name, file.sha256, file.rows) for file in self.all_files()]
        content = [self.seq_length, self.vocab_size, self.dtype, self.tokenizer_sha256, files]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a folder of shards.

    Raises:
        ValueError: the folder holds no (complete) manifest of this format.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(
            f"{directory} holds no {MANIFEST_NAME}, must be a folder that `prepare` finished"
        )
    text = path.read_bytes()
    try:
        content = json.loads(text)
        found = content.pop("format"), content.pop("version")
        if found != (FORMAT, VERSION):
            raise ValueError(f"format and version are {found}, must be {(FORMAT, VERSION)}")
        counts = {name: Tally(**tally) for name, tally in content.pop("counts").items()}
        for name in ("train", "validation", "tokenizer"):
            content[name] = tuple(ShardFile(**entry) for entry in content[name])
        content["unigram_counts"] = ShardFile(**content["unigram_counts"])
        manifest = Manifest(counts=Counts(**counts), **content)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{path} is not a manifest of token shards: {error}") from error
    return manifest


def describe_file(directory: Path, name: str, *, rows: int = 0, tokens: int = 0) -> ShardFile:
    """The entry of a file that lies in `directory`."""
    path = directory / name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardFile(name=name, sha256=digest, bytes=path.stat().st_size, rows=rows, tokens=tokens)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is complete or absent, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory durable, where the system can."""
    if os.name == "nt":  # Windows opens no directories; its renames are journalled.
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
