"""Scores of spans from attention alone: words that attend to each other belong together.

Shapes: T pieces, N words, B sequences, W longest span in words. All is computed within a band, in
O(T r) time and memory, r the pieces that W words take at most. For words i and j of a sequence:

    A_ij  = attention from i to j: mean over the pieces of i, sum over those of j (Clark et al.,
            2019), mean over the chosen heads and layers
    a_ij  = (A_ij + A_ji) / 2, the affinity
    z_ij  = (a_ij - mean) / standard deviation over the pairs of the same sequence that are as far
            apart; 0 where there are less than two such pairs
    cohesion(i, n) = (n - 1) * mean of z over the pairs inside of the span of n words from i
    border(i, n)   = (mean of z from the word before to the span's words
                      + mean of z from the word after to the span's words) / 2; the ends of a text
                     count 0
    prior(n)       = log(p (1 - p)^(n - 1)), the geometric law of lengths
    score(i, n)    = sharpness * (cohesion - border_weight * border) + prior
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch
from spanbert_fast.model.backbone import Backbone
from spanbert_fast.model.encoder import Layer
from spanbert_fast.ops.attention import varlen_attention_with_lse
from spanbert_fast.ops.banded_attention import banded_attention

MOST_WORDS = 512
"""Longest span that may be asked for: time and memory grow with it, whatever a text has."""


@dataclass(frozen=True, kw_only=True)
class SpanScoring:
    """How attention becomes scores."""

    max_words: int = 10
    """W, the longest span."""
    layers: tuple[int, ...] | None = None
    """Layers whose attention counts, from 0; None: all."""
    heads: tuple[int, ...] | None = None
    """Heads of each of these layers, from 0; None: all."""
    border_weight: float = 1.0
    """How much attention across its borders speaks against a span."""
    sharpness: float = 1.0
    """Factor of the evidence beside the prior; a large one makes marginals 0 or 1."""
    stop_probability: float = 0.5
    """p of the geometric law of lengths; at 1/2 all segmentations are equally likely a priori."""

    def __post_init__(self) -> None:
        if type(self.max_words) is not int:
            raise TypeError(f"max_words must be an int, got {self.max_words!r}")
        for name in ("border_weight", "sharpness", "stop_probability"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 1 <= self.max_words <= MOST_WORDS:
            raise ValueError(f"max_words is {self.max_words}, must be in [1, {MOST_WORDS}]")
        if not 0.0 < self.stop_probability < 1.0:
            raise ValueError(f"stop_probability is {self.stop_probability}, must be in (0, 1)")
        for name in ("border_weight", "sharpness"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, must be a finite number of at least 0")
        for name in ("layers", "heads"):
            chosen = getattr(self, name)
            if chosen is None:
                continue
            if not isinstance(chosen, tuple | list) or not all(type(i) is int for i in chosen):
                raise TypeError(f"{name} must be a tuple of int, or None for all, got {chosen!r}")
            if not chosen:
                raise ValueError(f"{name} is empty, must name at least one, or be None for all")
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"{name} must name each only once, got {chosen}")


@dataclass(frozen=True, kw_only=True)
class Words:
    """Which pieces of a packed batch form which words."""

    word_of: Tensor
    """int64 [T], the word of each piece, -1 for special tokens; words are numbered in order."""
    cu_words: Tensor
    """int32 [B + 1], boundaries of the sequences in words."""

    @property
    def num_words(self) -> int:
        """N."""
        return int(self.cu_words[-1])

    def bounds(self) -> tuple[Tensor, Tensor]:
        """First piece and number of pieces of each word, int64 [N]."""
        pieces = (self.word_of >= 0).nonzero()[:, 0]
        owners = self.word_of.index_select(0, pieces)
        counts = torch.bincount(owners, minlength=self.num_words)
        firsts = torch.cat([owners.new_zeros(1), counts.cumsum(0)])[:-1]
        return pieces.index_select(0, firsts), counts


def attention_of_words(
    backbone: Backbone,
    batch: PackedBatch,
    states: tuple[Tensor, ...],
    words: Words,
    scoring: SpanScoring,
) -> Tensor:
    """A within the band: wide [N, 2 W + 1], column c for the word at distance c - W.

    Args:
        backbone: The encoder that computed `states`.
        batch: Its rows.
        states: Hidden states as `encode_packed` returns them, [T, D] each.
        words: The words of the batch.
        scoring: Layers and heads.

    Raises:
        ValueError: A layer or head does not exist.
    """
    layers = _chosen("layers", scoring.layers, backbone.config.num_hidden_layers)
    heads = _chosen("heads", scoring.heads, backbone.config.num_attention_heads)
    band, window = _band_in_pieces(words, scoring.max_words), backbone.config.attention_window
    # Beyond the window there is no attention, so nothing that the log-sum-exp says anything about.
    band = band if window is None else min(band, window)
    total: Tensor | None = None
    which = torch.tensor(heads, device=states[0].device)
    for layer in layers:
        owner = cast(Layer, backbone.encoder.layer[layer]).attention.self
        shape = (-1, owner.num_heads, owner.head_size)
        query, key = (
            project(states[layer]).view(shape).index_select(1, which)
            for project in (owner.query, owner.key)
        )
        scale = owner.head_size**-0.5
        lse = varlen_attention_with_lse(
            query, key, key, batch.cu_seqlens, batch.max_seqlen, scale=scale, window=window
        ).log_sum_exp
        near = banded_attention(query, key, lse, batch.cu_seqlens, scale=scale, band=band)
        total = near if total is None else total + near
    assert total is not None
    return _to_words(total / len(layers), words, scoring.max_words, band)


def _chosen(name: str, chosen: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    if chosen is None:
        return tuple(range(count))
    for index in chosen:
        if not 0 <= index < count:
            raise ValueError(f"{name} names {index}, allowed are 0 to {count - 1}")
    return chosen


def _band_in_pieces(words: Words, max_words: int) -> int:
    """Distance in pieces that reaches from any word to every piece of the W-th word after it."""
    if words.num_words == 0:
        return 0
    first, count = words.bounds()
    cu = words.cu_words.to(torch.int64)
    last_of_own = torch.repeat_interleave(cu[1:], cu.diff()) - 1
    index = torch.arange(words.num_words, device=first.device)
    far = torch.minimum(index + max_words, last_of_own)
    return int((first[far] + count[far] - 1 - first).max())


def _to_words(near: Tensor, words: Words, max_words: int, band: int) -> Tensor:
    """Piece to piece [T, 2 band + 1] -> word to word [N, 2 W + 1]."""
    num_tokens, columns = near.shape[0], 2 * max_words + 1
    index = torch.arange(num_tokens, device=near.device)
    other = index[:, None] + torch.arange(-band, band + 1, device=near.device)
    inside = (other >= 0) & (other < num_tokens)
    own = words.word_of[:, None].expand_as(other)
    owner = words.word_of[other.clamp(0, max(num_tokens - 1, 0))]
    apart = owner - own
    kept = inside & (own >= 0) & (owner >= 0) & (apart.abs() <= max_words)
    place = own * columns + apart + max_words
    result = near.new_zeros(words.num_words * columns)
    result.index_add_(0, place[kept], near[kept])
    counts = words.bounds()[1] if words.num_words else near.new_zeros(0)
    return result.view(-1, columns) / counts[:, None]


def _shifted(rows: Tensor, distance: int) -> Tensor:
    """Row i of the result is row i + distance of `rows`, zero where there is none."""
    result = torch.zeros_like(rows)
    count = rows.shape[0] - abs(distance)
    if count > 0:
        low, high = max(0, distance), max(0, -distance)
        result[high : high + count] = rows[low : low + count]
    return result


def standardised_affinity(attention: Tensor, words: Words) -> Tensor:
    """Score z of the word at distance d after each word, else 0: [N, W], column d - 1."""
    max_words = attention.shape[1] // 2
    cu = words.cu_words.to(torch.int64)
    sequence = torch.repeat_interleave(torch.arange(len(cu) - 1, device=cu.device), cu.diff())
    index = torch.arange(words.num_words, device=cu.device)
    columns = []
    for distance in range(1, max_words + 1):
        after = attention[:, max_words + distance]
        before = _shifted(attention[:, max_words - distance], distance)
        valid = index + distance < cu[1:].index_select(0, sequence)
        affinity = torch.where(valid, (after + before) / 2, 0.0)
        zeros = affinity.new_zeros(len(cu) - 1)
        count = zeros.index_add(0, sequence, valid.to(affinity.dtype)).clamp(min=1)
        mean = (zeros.index_add(0, sequence, affinity) / count).index_select(0, sequence)
        gap = torch.where(valid, affinity - mean, 0.0)
        deviation = (zeros.index_add(0, sequence, gap * gap) / count).sqrt()
        # Equal affinities leave rounding errors, which are no evidence.
        floor = torch.finfo(gap.dtype).eps * 16
        own = deviation.index_select(0, sequence)
        columns.append(torch.where(own > floor, gap / own.clamp(min=floor), 0.0))
    return torch.stack(columns, dim=1)


def attention_span_scores(attention: Tensor, words: Words, scoring: SpanScoring) -> Tensor:
    """Score of every span, [N, W]; the formula stands at the top of this file.

    Args:
        attention: [N, 2 W + 1], as `attention_of_words` gives it.
        words: The words of the batch.
        scoring: Weights and prior.
    """
    after = standardised_affinity(attention, words)
    max_words = after.shape[1]
    before = torch.stack([_shifted(after[:, d - 1], -d) for d in range(1, max_words + 1)], 1)
    to_right, to_left = after.cumsum(1), before.cumsum(1)
    # A span of n words grows by one: the new pairs are those of its new last word.
    growth = [torch.zeros_like(after[:, 0])]
    growth += [_shifted(to_left[:, m - 1], m) for m in range(1, max_words)]
    pairs = torch.stack(growth, 1).cumsum(1)
    size = torch.arange(1, max_words + 1, device=after.device, dtype=after.dtype)
    cohesion = pairs * 2 / size  # (n - 1) * sum / (n (n - 1) / 2)
    # Words of another sequence have affinity 0 with all of these.
    left = _shifted(to_right, -1)
    right = torch.stack([_shifted(to_left[:, n - 1], n) for n in range(1, max_words + 1)], 1)
    border = (left + right) / (2 * size)
    p = scoring.stop_probability
    prior = math.log(p) + (size - 1) * math.log1p(-p)
    return scoring.sharpness * (cohesion - scoring.border_weight * border) + prior
