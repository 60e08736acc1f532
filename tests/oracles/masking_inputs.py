"""Inputs for the tests of the sampler."""

import random
from itertools import pairwise

import numpy as np

from spanbert_fast.data.masking import SpanMasker

SPECIAL_IDS = [0, 1]
MASK_ID = 2
WORD_SHAPES = ("text", "one_token_words", "one_word", "all_special", "no_word_start")
Spans = list[tuple[int, int]]


def word_starts_of(vocabulary_size: int) -> np.ndarray:
    """The first half of the vocabulary begins words."""
    return np.arange(vocabulary_size) < vocabulary_size // 2


def sequence_of(shape: str, length: int, vocabulary_size: int, rng: random.Random) -> list[int]:
    """A sequence of one of the shapes."""
    half = vocabulary_size // 2
    if shape == "all_special":
        return [rng.choice(SPECIAL_IDS) for _ in range(length)]
    if shape == "one_word":
        return [rng.randrange(half, vocabulary_size) if i else 3 for i in range(length)]
    if shape == "no_word_start":
        return [rng.randrange(half, vocabulary_size) for _ in range(length)]
    begin_word = 1.0 if shape == "one_token_words" else 0.8
    special = 0.0 if shape == "one_token_words" else 0.03
    return [
        rng.choice(SPECIAL_IDS)
        if rng.random() < special
        else rng.randrange(2, half)
        if rng.random() < begin_word
        else rng.randrange(half, vocabulary_size)
        for _ in range(length)
    ]


def tagged_spans(tokens: list[int], boundaries: list[int], rng: random.Random) -> Spans:
    """Random spans for the scheme `tagged`, sorted by their beginning."""
    spans = []
    for begin, end in pairwise(boundaries):
        for _ in range(rng.randrange(6) if end > begin else 0):
            first = rng.randrange(begin, end)
            last = min(end, first + rng.randint(1, 7))
            if not set(tokens[first:last]) & set(SPECIAL_IDS):
                spans.append((first, last))
    return sorted(spans, key=lambda span: span[0])


def packed(sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Packed tokens and their boundaries."""
    lengths = [len(sequence) for sequence in sequences]
    tokens = [token for sequence in sequences for token in sequence]
    return np.array(tokens, np.int32), np.cumsum([0, *lengths]).astype(np.int32)


def make_masker(word_starts: np.ndarray, **overrides: object) -> SpanMasker:
    """A masker with the constants of this module."""
    arguments: dict[str, object] = {
        "mask_token_id": MASK_ID,
        "special_token_ids": SPECIAL_IDS,
        "replacement_ids": np.arange(3, len(word_starts), dtype=np.int32),
    }
    return SpanMasker(word_starts, **(arguments | overrides))  # type: ignore[arg-type]
