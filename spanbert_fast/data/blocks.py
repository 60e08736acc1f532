"""The work on one part of the corpus: documents to sentences to pieces to blocks.

Worker processes import this module, so it loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from spanbert_fast.data.corpus import DIGEST_BYTES, Document, Part, read_documents

Engine = Literal["tokenizers", "nanotoken", "both"]
"""`both` compares the two and gives what `tokenizers` gives."""

_BATCH_CHARACTERS: Final = 1 << 20


class Pieces(NamedTuple):
    """Sentences as pieces: values laid end to end, and the number of each sentence."""

    values: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]


class EnginesDifferError(Exception):
    """nanotoken and tokenizers gave different pieces for the same text."""


@dataclass(frozen=True, kw_only=True)
class PartJob:
    """Everything that a worker needs to know to do a part."""

    part: Part
    stem: Path
    """Path of the results without suffix."""
    dtype: str
    block_length: int
    text_column: str
    language: str


class PartResult(NamedTuple):
    """What a finished part left on disk, one row per document."""

    values: npt.NDArray[np.uint16] | npt.NDArray[np.int32]
    """[tokens of the part], mapped."""
    block_lengths: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]
    """uint8 [documents, 16]."""
    tallies: npt.NDArray[np.int64]
    """int64 [documents, 4]: sentences, tokens, blocks, cut sentences."""
    num_invalid: int
    """Documents with invalid UTF-8."""


def engine_json(tokenizer_json: str) -> str:
    """The tokenizer as an engine needs it: special tokens spelled out in a text are plain text."""
    content = json.loads(tokenizer_json)
    content["truncation"] = content["padding"] = content["post_processor"] = None
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token.get("special", False)
    ]
    return json.dumps(content, ensure_ascii=False)


def nanotoken_problem(tokenizer_json: str) -> str | None:
    """Why nanotoken cannot be used for a tokenizer, None if it can."""
    try:
        module = importlib.import_module("nanotoken")
    except ImportError:
        return "nanotoken is not installed"
    try:
        module.WordPieceTokenizer.from_json(tokenizer_json)
    except ValueError as error:
        return f"nanotoken refuses the tokenizer: {error}"
    return None


def engine_version(name: str) -> str:
    """Name and version of an engine."""
    return f"{name} {importlib.metadata.version(name)}"


def make_encoder(engine: Engine, tokenizer_json: str) -> Callable[[list[str]], Pieces]:
    """A function from sentences to pieces without special tokens."""
    if engine == "tokenizers":
        return _make_tokenizers(tokenizer_json)
    fast = _make_nanotoken(tokenizer_json)
    if engine == "nanotoken":
        return fast
    reference = _make_tokenizers(tokenizer_json)

    def compare(sentences: list[str]) -> Pieces:
        expected, found = reference(sentences), fast(sentences)
        if not _equal(expected, found):
            raise EnginesDifferError(_describe_difference(sentences, reference, fast))
        return expected

    return compare


def _equal(left: Pieces, right: Pieces) -> bool:
    return np.array_equal(left.lengths, right.lengths) and np.array_equal(left.values, right.values)


def _describe_difference(
    sentences: list[str],
    reference: Callable[[list[str]], Pieces],
    fast: Callable[[list[str]], Pieces],
) -> str:
    for sentence in sentences:
        if not _equal(reference([sentence]), fast([sentence])):
            return f"nanotoken differs from tokenizers on {sentence[:200]!r}"
    return "nanotoken differs from tokenizers on a batch, and on none of its sentences alone"


def _make_tokenizers(tokenizer_json: str) -> Callable[[list[str]], Pieces]:
    tokenizer = Tokenizer.from_str(tokenizer_json)

    def encode(sentences: list[str]) -> Pieces:
        encodings = tokenizer.encode_batch_fast(sentences, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = np.array([len(sentence) for sentence in ids], np.int64)
        flat = np.fromiter((i for sentence in ids for i in sentence), np.int32, int(lengths.sum()))
        return Pieces(flat, lengths)

    return encode


def _make_nanotoken(tokenizer_json: str) -> Callable[[list[str]], Pieces]:
    # Not a dependency: looked up by name where a user has installed it.
    module = importlib.import_module("nanotoken")
    tokenizer: Any = module.WordPieceTokenizer.from_json(tokenizer_json)

    def encode(sentences: list[str]) -> Pieces:
        values, offsets = tokenizer.encode_batch(
            sentences, add_special_tokens=False, parallel=False
        )
        return Pieces(values.astype(np.int32), np.diff(offsets).astype(np.int64))

    return encode


def pack_sentences(lengths: list[int], block_length: int) -> tuple[list[int], int, int]:
    """Lengths of the blocks of one document, its number of sentences, and how many were cut.

    Whole sentences are packed while they fit. A sentence longer than a block begins a block of its
    own and is cut; what is left of it begins the next block. Sentences without pieces do not count.

    Args:
        lengths: pieces of each sentence.
        block_length: pieces that a block may have.
    """
    blocks: list[int] = []
    current = num_sentences = num_cut = 0
    for length in lengths:
        num_sentences += length > 0
        if current + length <= block_length:
            current += length
            continue
        if current:
            blocks.append(current)
        num_full, current = divmod(length, block_length)
        if length > block_length:
            num_cut += 1
        blocks += [block_length] * num_full
    if current:
        blocks.append(current)
    return blocks, num_sentences, num_cut


def process_part(job: PartJob, encode: Callable[[list[str]], Pieces]) -> None:
    """Does a part and leaves its results on disk; the last file to appear completes it."""
    block_lengths: list[int] = []
    digests: list[bytes] = []
    tallies: list[tuple[int, int, int, int]] = []
    num_invalid = 0
    # The process id keeps a dying worker of a killed run from writing into the file of its heir.
    partial = job.stem.with_suffix(f".{os.getpid()}.partial")
    documents = read_documents(job.part, text_column=job.text_column, language=job.language)
    with partial.open("wb") as file:
        for batch in _batches(documents):
            sentences = [sentence for document in batch for sentence in document.sentences]
            lengths = _encode_into(file, sentences, encode, job.dtype)
            place = 0
            for document in batch:
                own = lengths[place : place + len(document.sentences)]
                place += len(document.sentences)
                blocks, num_sentences, num_cut = pack_sentences(own, job.block_length)
                block_lengths += blocks
                digests.append(document.digest)
                tallies.append((num_sentences, sum(own), len(blocks), num_cut))
                num_invalid += document.has_invalid_bytes
        file.flush()
        os.fsync(file.fileno())
    partial.replace(job.stem.with_suffix(".values"))
    with partial.open("wb") as file:
        np.savez(
            file,
            block_lengths=np.array(block_lengths, np.int64),
            digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES),
            tallies=np.array(tallies, np.int64).reshape(-1, 4),
            num_invalid=num_invalid,
        )
        file.flush()
        os.fsync(file.fileno())
    partial.replace(job.stem.with_suffix(".npz"))


_worker: dict[str, Callable[[list[str]], Pieces]] = {}


def start_worker(engine: Engine, tokenizer_json: str) -> None:
    """Sets up a worker process: one thread, one engine, and an end when its parent ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker["encode"] = make_encoder(engine, tokenizer_json)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def work_on_part(job: PartJob) -> None:
    """`process_part` in a worker process."""
    process_part(job, _worker["encode"])


def is_done(job: PartJob) -> bool:
    """Whether the results of a part are complete on disk."""
    return job.stem.with_suffix(".npz").exists()


def read_part(stem: Path, dtype: str) -> PartResult:
    """What `process_part` left."""
    path = stem.with_suffix(".values")
    empty = np.empty(0, np.dtype(dtype))
    with np.load(stem.with_suffix(".npz")) as arrays:
        return PartResult(
            np.memmap(path, np.dtype(dtype), "r") if path.stat().st_size else empty,
            arrays["block_lengths"],
            arrays["digests"],
            arrays["tallies"],
            int(arrays["num_invalid"]),
        )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Runs of documents with about a million characters, so that small ones are encoded
    together.
    """
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(map(len, document.sentences))
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_into(
    file: Any, sentences: list[str], encode: Callable[[list[str]], Pieces], dtype: str
) -> list[int]:
    """Appends the pieces of sentences to a file and returns their numbers.

    One call encodes about a million characters, for the engines hold much more than the pieces.
    """
    lengths: list[int] = []
    start = size = 0
    for index, sentence in enumerate(sentences, start=1):
        size += len(sentence)
        if size >= _BATCH_CHARACTERS or index == len(sentences):
            pieces = encode(sentences[start:index])
            pieces.values.astype(np.dtype(dtype)).tofile(file)
            lengths += pieces.lengths.tolist()
            start, size = index, 0
    return lengths
