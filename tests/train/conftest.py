"""A small corpus with a grammar, prepared once per process, and runs on it that take seconds."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spanbert_fast.data.options import PrepareOptions
from spanbert_fast.data.prepare import prepare
from spanbert_fast.train.options import PretrainOptions

NOUNS = ["river", "garden", "teacher", "engine", "letter", "winter", "market", "captain", "violin"]
VERBS = ["follows", "remembers", "carries", "forgets", "repairs", "describes"]
ADJECTIVES = ["quiet", "broken", "golden", "distant", "honest", "narrow"]


def write_corpus(path: Path, num_documents: int = 60) -> None:
    generator = random.Random(0)
    documents = []
    for number in range(num_documents):
        sentences = [f"Chapter {number} begins here."]
        for _ in range(8):
            first, second = generator.sample(NOUNS, 2)
            sentences.append(
                f"The {generator.choice(ADJECTIVES)} {first} {generator.choice(VERBS)} "
                f"the {generator.choice(ADJECTIVES)} {second}."
            )
        documents.append("\n".join(sentences))
    path.write_text("\n\n".join(documents) + "\n")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of the small corpus."""
    folder = tmp_path_factory.mktemp("train")
    write_corpus(folder / "text.txt")
    # By a relative name: the manifest holds it, and the order of the blocks depends on that.
    with contextlib.chdir(folder):
        prepare(
            PrepareOptions(
                input=("text.txt",),
                output=Path("shards"),
                train_tokenizer=True,
                vocab_size=160,
                seq_length=32,
                validation_permille=200,
                workers=1,
            )
        )
    return folder / "shards"


@pytest.fixture(scope="session")
def sentences(shards: Path) -> list[str]:
    """The text of the small corpus."""
    lines = (shards.parent / "text.txt").read_text().splitlines()
    return [line for line in lines if line]


TINY_RUN: dict[str, Any] = {
    "steps": 12,
    "warmup_steps": 2,
    "global_batch_tokens": 256,
    "learning_rate": 1e-2,
    "log_every": 2,
    "eval_every": 4,
    "save_every": 4,
    "threads": 1,
    "precision": "fp32",
    "device": "cpu",
    "language": "en",
    "unigram_bias": False,
    "model": {
        "initializer_range": 0.02,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "span_position_embedding_size": 16,
    },
}


@pytest.fixture(scope="session")
def options(shards: Path) -> Callable[..., PretrainOptions]:
    """Makes the options of a run that takes a second."""

    def make(output: Path, **changes: Any) -> PretrainOptions:
        return PretrainOptions(**{"data": shards, "output": output, **TINY_RUN, **changes})

    return make
