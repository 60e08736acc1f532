"""Speed of the data room: tokenization against plain `tokenizers`, sentence splitting, the loader.

Real text: `SPANBERT_FAST_BENCH_TEXT` names a text file; without it the demo's text is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from spanbert_fast.data.blocks import engine_json, make_encoder, nanotoken_problem
from spanbert_fast.data.corpus import Part, cut_parts, read_documents
from spanbert_fast.data.loader import StepLoader
from spanbert_fast.data.masking import SpanMasker
from spanbert_fast.data.prepare import PrepareOptions, prepare
from spanbert_fast.data.shards import TokenShards
from spanbert_fast.data.tokenizer import load_tokenizer, word_starts
from spanbert_fast.data.wordpiece import train_tokenizer

DEMO = Path(__file__).resolve().parents[1] / "examples" / "state_of_the_union.jsonl.zst"
TEXT = Path(os.environ.get("SPANBERT_FAST_BENCH_TEXT", DEMO))
MAX_SENTENCES = 20_000


def parts() -> list[Part]:
    return cut_parts(0, TEXT, text_format="auto", language="en", part_bytes=1 << 24)


def read_all() -> Iterator[list[str]]:
    for part in parts():
        for document in read_documents(part, text_column="text", language="en"):
            yield document.sentences


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return [sentence for text in read_all() for sentence in text][:MAX_SENTENCES]


@pytest.fixture(scope="module")
def tokenizer(sentences: list[str]):
    return train_tokenizer(sentences, 8000)


def tell_megabytes(benchmark: BenchmarkFixture, num_bytes: int) -> None:
    if not benchmark.disabled:
        benchmark.extra_info["MB/s"] = round(num_bytes / 1e6 / benchmark.stats.stats.min, 2)


def test_read_and_split_sentences(benchmark: BenchmarkFixture) -> None:
    found = benchmark.pedantic(lambda: list(read_all()), rounds=3)
    tell_megabytes(benchmark, sum(len(sentence.encode()) for text in found for sentence in text))


@pytest.mark.benchmark(group="tokenize")
def test_plain_tokenizers(benchmark: BenchmarkFixture, sentences: list[str], tokenizer) -> None:
    backend = tokenizer.backend_tokenizer
    benchmark.pedantic(
        lambda: [e.ids for e in backend.encode_batch(sentences, add_special_tokens=False)], rounds=3
    )
    tell_megabytes(benchmark, sum(len(sentence.encode()) for sentence in sentences))


@pytest.mark.benchmark(group="tokenize")
@pytest.mark.parametrize("engine", ["tokenizers", "nanotoken"])
def test_engine(benchmark: BenchmarkFixture, sentences: list[str], tokenizer, engine) -> None:
    described = engine_json(tokenizer.backend_tokenizer.to_str())
    problem = nanotoken_problem(described)
    if engine == "nanotoken" and problem:
        pytest.skip(problem)
    encode = make_encoder(engine, described)
    benchmark.pedantic(lambda: encode(sentences), rounds=3)
    tell_megabytes(benchmark, sum(len(sentence.encode()) for sentence in sentences))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    output = tmp_path_factory.mktemp("shards") / "out"
    prepare(
        PrepareOptions(
            input=(str(TEXT),), output=output, train_tokenizer=True, vocab_size=8000, workers=1
        )
    )
    return TokenShards.open(output)


@pytest.mark.benchmark(group="loader")
def test_loader(benchmark: BenchmarkFixture, shards: TokenShards) -> None:
    specials = shards.manifest.special_token_ids
    masker = SpanMasker(
        word_starts(load_tokenizer(shards.tokenizer_directory)),
        mask_token_id=specials["mask"],
        special_token_ids=[specials[role] for role in ("pad", "cls", "sep", "mask")],
        replacement_ids=shards.replacement_sample(),
    )
    with StepLoader(
        shards, "train", masker, seed=0, global_batch_tokens=65_536, num_micro_batches=4
    ) as loader:
        steps = benchmark.pedantic(lambda: [next(loader) for _ in range(50)], rounds=3)
    tokens = sum(batch.num_tokens for step in steps for batch in step.micro_batches)
    if not benchmark.disabled:
        speed = tokens / 1e6 / benchmark.stats.stats.min
        benchmark.extra_info["million tokens/s"] = round(speed, 2)
