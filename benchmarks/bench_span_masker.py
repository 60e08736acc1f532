"""Tokens per second of span masking through the Python API, on 510-token blocks of realistic words.

Every figure is one call on a batch of 256 blocks; `tokens_per_second` comes from the fastest
round, because other work on the machine can only slow a round down.
Run with `pytest benchmarks/bench_span_masker.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from spanbert_fast import _core
from spanbert_fast.data.masking import SpanMasker

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from oracles import span_masker as oracle

VOCABULARY_SIZE, NUM_STARTS = 28_996, 22_000
NUM_BLOCKS, BLOCK_LENGTH = 256, 510
NUM_TOKENS = NUM_BLOCKS * BLOCK_LENGTH
TARGET_TOKENS_PER_SECOND = 100e6
PIECES_PER_WORD = {"single": [1.0], "multi": [0.84, 0.10, 0.04, 0.02]}
BOUNDARIES = np.arange(0, NUM_TOKENS + 1, BLOCK_LENGTH, dtype=np.int32)
EXAMPLE_IDS = np.arange(NUM_BLOCKS)
WORD_STARTS = np.arange(VOCABULARY_SIZE) < NUM_STARTS


def make_tokens(words: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    shares = PIECES_PER_WORD[words]
    begins = np.cumsum(rng.choice(len(shares), NUM_TOKENS, p=shares) + 1)
    is_start = np.zeros(NUM_TOKENS, np.bool_)
    is_start[begins[begins < NUM_TOKENS]] = True
    return np.where(
        is_start,
        rng.integers(104, NUM_STARTS, NUM_TOKENS),
        rng.integers(NUM_STARTS, VOCABULARY_SIZE, NUM_TOKENS),
    ).astype(np.int32)


def replacement_sample() -> np.ndarray:
    return np.random.default_rng(1).integers(104, VOCABULARY_SIZE, 1_000_000).astype(np.int32)


def make_masker(scheme: str = "spanbert", num_threads: int = 1) -> SpanMasker:
    return SpanMasker(
        WORD_STARTS,
        mask_token_id=103,
        special_token_ids=[0, 101, 102],
        replacement_ids=replacement_sample(),
        scheme=scheme,
        num_threads=num_threads,
    )


def report(benchmark: BenchmarkFixture, call: Callable[[int], object], num_tokens: int) -> float:
    """Runs `call(epoch)` many times and returns the tokens per second of the fastest round.

    With `--benchmark-disable` it runs once and nothing is known about speed: infinity.
    """
    epochs = iter(range(1_000_000))
    benchmark.pedantic(lambda: call(next(epochs)), rounds=300, warmup_rounds=5)
    if benchmark.disabled:
        return float("inf")
    tokens_per_second = num_tokens / benchmark.stats.stats.min
    benchmark.extra_info["tokens_per_second"] = f"{tokens_per_second / 1e6:.1f} million"
    return tokens_per_second


@pytest.mark.parametrize("words", PIECES_PER_WORD)
def test_mask_on_one_core(benchmark: BenchmarkFixture, words: str) -> None:
    tokens = make_tokens(words)
    masker = make_masker()
    out = masker(tokens, BOUNDARIES, EXAMPLE_IDS)
    assert len(out.mlm_positions) == NUM_BLOCKS * 77
    speed = report(
        benchmark, lambda epoch: masker(tokens, BOUNDARIES, EXAMPLE_IDS, epoch=epoch), NUM_TOKENS
    )
    assert speed >= TARGET_TOKENS_PER_SECOND


@pytest.mark.parametrize("scheme", ["whole_word", "token"])
def test_other_schemes_on_one_core(benchmark: BenchmarkFixture, scheme: str) -> None:
    tokens = make_tokens("multi")
    masker = make_masker(scheme)
    report(
        benchmark, lambda epoch: masker(tokens, BOUNDARIES, EXAMPLE_IDS, epoch=epoch), NUM_TOKENS
    )


@pytest.mark.parametrize("num_threads", sorted({1, 2, os.cpu_count() or 1}))
def test_mask_on_threads(benchmark: BenchmarkFixture, num_threads: int) -> None:
    tokens = np.tile(make_tokens("multi"), 8)
    boundaries = np.arange(0, len(tokens) + 1, BLOCK_LENGTH, dtype=np.int32)
    example_ids = np.arange(len(boundaries) - 1)
    masker = make_masker(num_threads=num_threads)
    report(
        benchmark,
        lambda epoch: masker(tokens, boundaries, example_ids, epoch=epoch),
        len(tokens),
    )


def test_assemble_on_one_core(benchmark: BenchmarkFixture) -> None:
    values = make_tokens("multi").astype(np.uint16)
    offsets = BOUNDARIES.astype(np.int64)
    masker = make_masker()
    rows = np.random.default_rng(2).permutation(NUM_BLOCKS)

    def call(epoch: int) -> object:
        return masker.assemble(
            values, offsets, rows, rows, epoch=epoch, cls_token_id=101, sep_token_id=102
        )

    assert report(benchmark, call, NUM_TOKENS) >= TARGET_TOKENS_PER_SECOND


def test_python_twin(benchmark: BenchmarkFixture) -> None:
    """The same rule in plain Python; its result on one block has to be the sampler's."""
    tokens = make_tokens("multi")[:BLOCK_LENGTH]
    rule = oracle.Rule(WORD_STARTS.tolist(), 103, [0, 101, 102], replacement_sample().tolist())
    expected = benchmark.pedantic(
        lambda: oracle.mask_batch(rule, tokens.tolist(), [0, BLOCK_LENGTH], [0]), rounds=20
    )
    if not benchmark.disabled:
        speed = BLOCK_LENGTH / benchmark.stats.stats.min
        benchmark.extra_info["tokens_per_second"] = f"{speed / 1e6:.2f} million"
    actual = make_masker()(tokens, BOUNDARIES[:2], EXAMPLE_IDS[:1])
    assert actual.input_ids.tolist() == expected.input_ids
    assert actual.sbo_targets.tolist() == expected.sbo_targets


@pytest.mark.parametrize("shape", [(4096, 768), (12, 512, 512)], ids=["hidden", "attention"])
def test_dropout_bits_on_one_core(benchmark: BenchmarkFixture, shape: tuple[int, ...]) -> None:
    out = np.empty(shape, np.bool_)
    positions = np.arange(shape[0])

    def call(epoch: int) -> None:
        if len(shape) == 2:
            _core.fill_hidden_mask(out, positions, positions, 1, epoch, 6554)
        else:
            _core.fill_attention_mask(out, 0, 1, epoch, 6554)

    report(benchmark, call, 1)
    if not benchmark.disabled:
        speed = out.size / benchmark.stats.stats.min
        benchmark.extra_info["bits_per_second"] = f"{speed / 1e9:.2f} thousand million"
        del benchmark.extra_info["tokens_per_second"]
    assert abs(out.mean() - (1 - 6554 / 65536)) < 1e-3
