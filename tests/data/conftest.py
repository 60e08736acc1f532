"""Tiny corpora of invented sentences, and a tokenizer trained on them once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from invented_text import as_lines, documents

from spanbert_fast.data.manifest import Split
from spanbert_fast.data.masking import SpanMasker
from spanbert_fast.data.prepare import PrepareOptions, prepare
from spanbert_fast.data.shards import TokenShards
from spanbert_fast.data.tokenizer import load_tokenizer, save_tokenizer, word_starts
from spanbert_fast.data.wordpiece import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = (line for text in documents(1, 300) for line in text)
    save_tokenizer(train_tokenizer(texts, 180), folder)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> TokenShards:
    """Some 400 blocks of at most 30 pieces, in several files."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "corpus.txt").write_text(as_lines(documents(2, 250)))
    options = PrepareOptions(
        input=("corpus.txt",),
        output=folder / "out",
        tokenizer=str(tokenizer_folder),
        seq_length=32,
        rows_per_file=100,
        validation_permille=100,
        workers=1,
    )
    # By a relative name: the manifest holds it, and the order of the blocks depends on that.
    with contextlib.chdir(folder):
        prepare(options)
    return TokenShards.open(options.output)


@pytest.fixture(scope="session")
def masker(shards: TokenShards) -> SpanMasker:
    specials = shards.manifest.special_token_ids
    return SpanMasker(
        word_starts(load_tokenizer(shards.tokenizer_directory)),
        mask_token_id=specials["mask"],
        special_token_ids=[specials[role] for role in ("pad", "cls", "sep", "mask")],
        replacement_ids=shards.replacement_sample(1000),
    )


@pytest.fixture
def all_blocks() -> Callable[[TokenShards, Split], list[list[int]]]:
    """Every block of a split, read one by one."""

    def read(shards: TokenShards, split: Split) -> list[list[int]]:
        rows = range(shards.num_blocks(split))
        return [shards.gather(split, np.array([row])).values.tolist() for row in rows]

    return read
