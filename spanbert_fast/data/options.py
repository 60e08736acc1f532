"""What a user may choose of `prepare`, what it tells while it works, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from spanbert_fast.data.manifest import SPECIAL_TOKENS_PER_BLOCK, Counts

TextFormat = Literal["auto", "lines", "running"]
EngineChoice = Literal["auto", "tokenizers", "nanotoken"]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Turn text into token shards. A run that was killed continues when it is started again."""

    input: tuple[str, ...]
    """Files or folders, each with an optional weight: `books wiki.jsonl.zst:2.5`."""
    output: Path
    """Folder for the shards, the manifest and the tokenizer."""
    tokenizer: str | None = None
    """Folder with tokenizer.json or vocab.txt, or a hub name."""
    train_tokenizer: bool = False
    """Train a cased WordPiece tokenizer on the input instead."""
    vocab_size: int = 30_000
    """Entries of the tokenizer that is trained."""
    tokenizer_megabytes: int = 200
    """Text to train the tokenizer on, spread over all inputs; the rest is not read for it."""
    seq_length: int = 512
    """Longest sequence, [CLS] and [SEP] included."""
    text_format: TextFormat = "auto"
    """One sentence per line, running text, or found out for each text file."""
    text_column: str = "text"
    """Column of the text in JSON lines and Parquet."""
    language: str = "en"
    """Language code for the sentence splitter."""
    validation_permille: int = 5
    """Thousandths of the documents to hold out, chosen by a hash of their text."""
    rows_per_file: int = 65_536
    """Blocks in each shard file but the last of a split."""
    workers: int = 0
    """Processes; 0 means one per available core. The bytes do not depend on it."""
    engine: EngineChoice = "auto"
    """What tokenizes; auto is nanotoken where it is installed and equal on 20 MB of the input."""
    part_megabytes: float = 16.0
    """Work is done and resumed in pieces of about this size. The bytes do not depend on it."""

    def __post_init__(self) -> None:
        if not self.input:
            raise ValueError("input is empty, must name at least one file or folder")
        if self.train_tokenizer == (self.tokenizer is not None):
            raise ValueError(
                f"tokenizer is {self.tokenizer!r} and train_tokenizer is {self.train_tokenizer}, "
                "must be exactly one of them"
            )
        for name, low, high in (
            ("vocab_size", 16, 2**31 - 1),
            ("tokenizer_megabytes", 1, 100_000),
            ("seq_length", 8, 1_000_000),
            ("validation_permille", 0, 999),
            ("rows_per_file", 1, 2**31 - 1),
            ("workers", 0, 10_000),
            ("part_megabytes", 0.0001, 100_000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, must be in [{low}, {high}]")
        for name, allowed in (
            ("text_format", get_args(TextFormat)),
            ("engine", get_args(EngineChoice)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, must be one of {', '.join(allowed)}"
                )

    @property
    def block_length(self) -> int:
        """Pieces that a block may have."""
        return self.seq_length - SPECIAL_TOKENS_PER_BLOCK


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stage has come."""

    stage: Literal["train tokenizer", "tokenize", "write"]
    done: int
    """Bytes of input, but blocks for `write`."""
    total: int


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something that the user should know."""

    text: str


Event = Progress | Note
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class PrepareSummary:
    """What `prepare` did."""

    output: Path
    counts: Counts
    input_bytes: int
    """Size of the input files as they lie on disk."""
    engine: str
    """What tokenized, and why nothing faster did where that was asked for."""
    notes: tuple[str, ...]
    """Everything that was told as a `Note`."""
    resumed_parts: int
    """Parts that an earlier run had finished."""
    seconds: float

    def closing_line(self) -> str:
        """One line for the end of the log."""
        read, train, held_out = self.counts.read, self.counts.train, self.counts.validation
        return (
            f"{read.documents:,} documents read ({self.counts.duplicates.documents:,} exact "
            f"duplicates and {self.counts.empty.documents:,} empty ones left out), "
            f"{read.sentences:,} sentences, {read.tokens:,} tokens; "
            f"{train.blocks + held_out.blocks:,} blocks written with "
            f"{train.tokens + held_out.tokens:,} tokens, {held_out.blocks:,} of them held out; "
            f"{train.cut_sentences + held_out.cut_sentences:,} long sentences cut, nothing dropped"
        )
