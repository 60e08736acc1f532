"""Documents of invented sentences; the same for the same seed."""

from __future__ import annotations

import random

WORDS = [
    "the",
    "a",
    "river",
    "Anna",
    "walked",
    "slowly",
    "under",
    "old",
    "bridges",
    "while",
    "nobody",
    "watched",
    "clouds",
    "drift",
    "over",
    "Berlin",
    "and",
    "every",
    "lamp",
    "unfolded",
    "yellow",
    "petals",
    "of",
    "light",
    "into",
    "unbelievably",
    "quiet",
    "streets",
]


def sentence(generator: random.Random) -> str:
    words = generator.choices(WORDS, k=generator.randint(1, 13))
    text = " ".join(words)
    return text[0].upper() + text[1:] + " streets."  # A last "a." would be an abbreviation.


def documents(seed: int, count: int) -> list[list[str]]:
    generator = random.Random(seed)
    return [[sentence(generator) for _ in range(generator.randint(1, 9))] for _ in range(count)]


def as_lines(texts: list[list[str]]) -> str:
    return "\n\n".join("\n".join(text) for text in texts) + "\n"
