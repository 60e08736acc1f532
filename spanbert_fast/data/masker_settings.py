"""The numbers and names that a masker obeys, and the checks of what a caller hands in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

SCHEMES: Final = ("spanbert", "whole_word", "token", "tagged")
REPLACEMENTS: Final = ("span", "token")
MAX_SPAN_WORDS: Final = 1024
"""Longest span that may be asked for; it bounds the table of length thresholds."""


@dataclass(frozen=True, kw_only=True)
class MaskerSettings:
    """What `SpanMasker` was told, apart from its arrays; the fields are explained there."""

    vocabulary_size: int
    mask_token_id: int
    special_token_ids: tuple[int, ...]
    mask_ratio: float
    geometric_p: float
    min_span_words: int
    max_span_words: int
    max_span_targets: int
    scheme: str
    replacement: str
    tag_probability: float
    seed: int
    num_threads: int

    def __post_init__(self) -> None:
        check_integer("mask_token_id", self.mask_token_id, 0, self.vocabulary_size - 1)
        for index, token_id in enumerate(self.special_token_ids):
            check_integer(f"special_token_ids[{index}]", token_id, 0, self.vocabulary_size - 1)
        for name in ("mask_ratio", "geometric_p"):
            value = getattr(self, name)
            check_real(name, value)
            if not 0 < value < 1:
                raise ValueError(f"{name} is {value}, must be above 0 and below 1")
        check_integer("max_span_words", self.max_span_words, 1, MAX_SPAN_WORDS)
        check_integer("min_span_words", self.min_span_words, 1, self.max_span_words)
        check_integer("max_span_targets", self.max_span_targets, 1, 2**31 - 1)
        if self.scheme == "segments":
            raise ValueError(
                "scheme is 'segments', which needs a model that predicts the spans: "
                "`spanbert-fast pretrain --scheme segments` has one; spans of your own go with "
                "the scheme 'tagged'"
            )
        check_choice("scheme", self.scheme, SCHEMES)
        check_choice("replacement", self.replacement, REPLACEMENTS)
        check_real("tag_probability", self.tag_probability)
        if not 0 <= self.tag_probability <= 1:
            raise ValueError(f"tag_probability is {self.tag_probability}, must be in [0, 1]")
        check_integer("seed", self.seed, 0, 2**64 - 1)
        check_integer("num_threads", self.num_threads, 1, 2**31 - 1)

    @property
    def shortest_span(self) -> int:
        """Number of words of the shortest span that the scheme draws."""
        return self.min_span_words if self.scheme in ("spanbert", "tagged") else 1

    def length_thresholds(self) -> npt.NDArray[np.uint64]:
        """uint64 [number of lengths - 1]: round(2**32 * P(one of the i + 1 shortest lengths)).

        Python's floats round the same everywhere; a C++ compiler may fuse products and sums.
        """
        if self.scheme not in ("spanbert", "tagged"):
            return np.empty(0, np.uint64)
        cumulative = []
        weight, total = 1.0, 0.0
        for _ in range(self.min_span_words, self.max_span_words + 1):
            total += weight
            cumulative.append(total)
            weight *= 1 - self.geometric_p
        return np.array([round(value / total * 2**32) for value in cumulative[:-1]], np.uint64)


def check_array(name: str, value: object, *dtypes: type, num_dimensions: int = 1) -> None:
    """Raises unless `value` is a C-contiguous array of one of `dtypes`."""
    allowed = " or ".join(np.dtype(dtype).name for dtype in dtypes)
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is a {type(value).__name__}, must be a numpy array of {allowed}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}, must be {allowed}")
    if value.ndim != num_dimensions:
        raise ValueError(f"{name} has shape {value.shape}, must have {num_dimensions} dimension(s)")
    if not value.flags.c_contiguous:
        raise TypeError(f"{name} has strides {value.strides}, must be C-contiguous")


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Raises unless `value` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {value!r}, must be an integer")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, must be in [{low}, {high}]")


def check_real(name: str, value: object) -> None:
    """Raises unless `value` is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} is {value!r}, must be a number")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")
