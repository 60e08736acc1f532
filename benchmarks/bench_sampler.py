"""Row 15: the sampler through its Python API against Hugging Face's collators and the plain rule.

Each side masks blocks of 510 tokens, on one thread; the figure compares time per token. Hugging
Face's collators mutate nothing of their input here, so that no copy is in their time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from bench_span_masker import (
    BLOCK_LENGTH,
    BOUNDARIES,
    EXAMPLE_IDS,
    NUM_TOKENS,
    VOCABULARY_SIZE,
    WORD_STARTS,
    make_masker,
    make_tokens,
    replacement_sample,
)
from pytest_benchmark.fixture import BenchmarkFixture
from records import Record
from timing import Case, command_of, name_of, time_in_turn
from tokenizers import Tokenizer, models
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast
from workload import Setting

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from oracles import span_masker as oracle

PEER_BLOCKS = 64
MODEL = f"{len(EXAMPLE_IDS)} x {BLOCK_LENGTH} tokens"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary of the right size; the collator asks it for special tokens and padding only."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {name: index for index, name in enumerate(names)}
    words |= {f"w{index}": index for index in range(len(names), VOCABULARY_SIZE)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        **{f"{name[1:-1].lower()}_token": name for name in names},
    )


def examples(tokens: np.ndarray, *, with_offsets: bool) -> list[dict[str, list]]:
    """Blocks in the form that Hugging Face's collators take; offsets tell where words begin."""
    found = []
    for block in tokens[: PEER_BLOCKS * BLOCK_LENGTH].reshape(PEER_BLOCKS, BLOCK_LENGTH):
        example: dict[str, list] = {
            "input_ids": block.tolist(),
            "special_tokens_mask": [0] * BLOCK_LENGTH,
        }
        if with_offsets:
            begins = np.cumsum(1 + WORD_STARTS[block])
            example["offset_mapping"] = [(int(begin), int(begin) + 1) for begin in begins]
        found.append(example)
    return found


def compare(benchmark: BenchmarkFixture, setting: Setting, case: Case, peer) -> None:
    """Times a call on 256 blocks against `peer`, whose share of them `case.scale` corrects."""
    tokens, masker = make_tokens("multi"), make_masker()
    epochs = iter(range(1_000_000))
    out = masker(tokens, BOUNDARIES, EXAMPLE_IDS)
    assert len(out.mlm_positions) == len(EXAMPLE_IDS) * 77
    time_in_turn(
        benchmark,
        setting,
        case,
        lambda: masker(tokens, BOUNDARIES, EXAMPLE_IDS, epoch=next(epochs)),
        peer,
    )


@pytest.mark.parametrize(("row", "is_whole_word"), [("15a", False), ("15b", True)])
def test_hugging_face_collator(
    benchmark: BenchmarkFixture, setting: Setting, row: str, is_whole_word: bool
) -> None:
    collator = DataCollatorForLanguageModeling(
        make_tokenizer(), mlm_probability=0.15, whole_word_mask=is_whole_word
    )
    batch = examples(make_tokens("multi"), with_offsets=is_whole_word)
    labels = collator(batch)["labels"]
    share = float((labels != -100).float().mean())
    assert 0.13 < share < 0.17, "the peer masks as much as ours"
    case = Case(
        rows=(row,),
        peer=f"Hugging Face {'whole-word' if is_whole_word else 'MLM'} collator",
        dtype="integers",
        model=MODEL,
        scale=NUM_TOKENS / (PEER_BLOCKS * BLOCK_LENGTH),
    )
    compare(benchmark, setting, case, lambda: collator(batch))


def test_python_rule(benchmark: BenchmarkFixture, setting: Setting) -> None:
    tokens = make_tokens("multi")[:BLOCK_LENGTH]
    rule = oracle.Rule(WORD_STARTS.tolist(), 103, [0, 101, 102], replacement_sample().tolist())
    plain = tokens.tolist()

    def peer() -> oracle.Masked:
        return oracle.mask_batch(rule, plain, [0, BLOCK_LENGTH], [0])

    found, expected = make_masker()(tokens, BOUNDARIES[:2], EXAMPLE_IDS[:1]), peer()
    assert found.input_ids.tolist() == expected.input_ids
    assert found.sbo_targets.tolist() == expected.sbo_targets
    case = Case(
        rows=("15c",),
        peer="plain Python twin of the rule",
        dtype="integers",
        model=MODEL,
        scale=NUM_TOKENS / BLOCK_LENGTH,
    )
    compare(benchmark, setting, case, peer)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_threads(benchmark: BenchmarkFixture, setting: Setting, num_threads: int) -> None:
    tokens = np.tile(make_tokens("multi"), 1 if setting.is_smoke else 8)
    boundaries = np.arange(0, len(tokens) + 1, BLOCK_LENGTH, dtype=np.int32)
    ids = np.arange(len(boundaries) - 1)
    masker, one = make_masker(num_threads=num_threads), make_masker()
    expected = one(tokens, boundaries, ids)
    assert np.array_equal(masker(tokens, boundaries, ids).input_ids, expected.input_ids)
    case = Case(
        peer=f"{num_threads} threads against one",
        dtype="integers",
        tokens=len(tokens),
        model=f"{len(ids)} x {BLOCK_LENGTH} tokens",
    )
    time_in_turn(
        benchmark,
        setting,
        case,
        lambda: masker(tokens, boundaries, ids),
        lambda: one(tokens, boundaries, ids),
    )
    speed = setting.records[-1].ours_tokens_per_second
    assert speed is not None
    setting.records.append(
        Record(
            case=name_of(benchmark) + " speed",
            curve="sampler",
            series="SpanMasker",
            x=num_threads,
            y=speed / 1e6,
            model=MODEL,
            command=command_of(benchmark),
        )
    )
