"""Slow, obvious twins of the C++ core: Philox4x32-10 and the masking rule, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

WORD = 2**32


def philox(counter: Sequence[int], key: int) -> list[int]:
    """The four words of Philox4x32-10 (Salmon et al. 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key % WORD, key // WORD % WORD
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, WORD)
        high1, low1 = divmod(0xCD9E8D57 * c2, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return [c0, c1, c2, c3]


def lane16(counter: Sequence[int], key: int, lane: int) -> int:
    """The 16-bit lane of a counter's words, low half of each word first."""
    return philox(counter, key)[lane // 2] >> (16 * (lane % 2)) & 0xFFFF


def stream(seed: int, epoch: int, example_id: int) -> Iterator[int]:
    """u_0, u_1, ... of one example."""
    index = 0
    while True:
        yield from philox([index, epoch, example_id % WORD, (example_id % 2**64) // WORD], seed)
        index += 1


@dataclass
class Rule:
    """The settings of `SpanMasker`, as plain Python values."""

    word_starts: Sequence[bool]
    mask_token_id: int
    special_token_ids: Sequence[int]
    replacement_ids: Sequence[int]
    mask_ratio: float = 0.15
    geometric_p: float = 0.2
    min_span_words: int = 1
    max_span_words: int = 10
    max_span_targets: int = 15
    scheme: str = "spanbert"
    replacement: str = "span"
    tag_probability: float = 0.5
    seed: int = 0
    rejections_per_token: int = 64


@dataclass
class Masked:
    """The fields of `MaskedBatch` as lists."""

    input_ids: list[int] = field(default_factory=list)
    mlm_positions: list[int] = field(default_factory=list)
    mlm_labels: list[int] = field(default_factory=list)
    sbo_left: list[int] = field(default_factory=list)
    sbo_right: list[int] = field(default_factory=list)
    sbo_cu: list[int] = field(default_factory=lambda: [0])
    sbo_targets: list[int] = field(default_factory=list)


def mask_batch(
    rule: Rule,
    input_ids: Sequence[int],
    cu_seqlens: Sequence[int],
    example_ids: Sequence[int],
    epoch: int = 0,
    spans: Sequence[tuple[int, int]] = (),
) -> Masked:
    """What `SpanMasker` has to return."""
    out = Masked(input_ids=list(input_ids))
    for sequence, example_id in enumerate(example_ids):
        words = stream(rule.seed, epoch, example_id)
        begin, stop = cu_seqlens[sequence], cu_seqlens[sequence + 1]
        while begin < stop:
            end = begin
            while end < stop and input_ids[end] not in rule.special_token_ids:
                end += 1
            if end > begin:
                tagged = [span for span in spans if begin <= span[0] < end]
                masked = choose(rule, input_ids, begin, end, words, tagged)
                replace(rule, input_ids, begin, end, words, masked, out)
            begin = end + 1
    return out


def span_length(rule: Rule, u: int) -> int:
    """The number of words that a random word stands for."""
    if rule.scheme in ("whole_word", "token"):
        return 1
    weights = [1.0]
    for _ in range(rule.max_span_words - rule.min_span_words):
        weights.append(weights[-1] * (1 - rule.geometric_p))
    length, cumulative = rule.min_span_words, 0.0
    for weight in weights[:-1]:
        cumulative += weight
        length += u >= round(cumulative / sum_left(weights) * WORD)
    return length


def sum_left(values: Sequence[float]) -> float:
    """The sum from left to right; since Python 3.12 the built-in one rounds otherwise."""
    total = 0.0
    for value in values:
        total += value
    return total


def choose(
    rule: Rule,
    input_ids: Sequence[int],
    begin: int,
    end: int,
    words: Iterator[int],
    tagged: Sequence[tuple[int, int]],
) -> set[int]:
    """The masked positions of the block [begin, end)."""

    def is_start(position: int) -> bool:
        return position == begin or rule.scheme == "token" or rule.word_starts[input_ids[position]]

    budget = math.ceil(rule.mask_ratio * (end - begin))
    masked: set[int] = set()
    rejections = 0
    tag_threshold = round(rule.tag_probability * WORD)
    in_tags = {position for first, last in tagged for position in range(first, last)}
    while len(masked) < budget:
        is_exhausted = rejections >= rule.rejections_per_token * (end - begin)
        if (
            rule.scheme == "tagged"
            and tag_threshold == WORD
            and (is_exhausted or in_tags <= masked)
        ):
            break
        length = span_length(rule, next(words))
        span: Sequence[int] = []
        if rule.scheme == "tagged" and next(words) < tag_threshold and not is_exhausted:
            index = next(words) * len(tagged) // WORD
            if tagged:
                span = range(*tagged[index])
        else:
            u = next(words)
            if is_exhausted:
                unmasked = [p for p in range(begin, end) if p not in masked]
                anchor = unmasked[u * len(unmasked) // WORD]
            else:
                anchor = begin + u * (end - begin) // WORD
            if anchor not in masked:
                first = anchor
                while not is_start(first):
                    first -= 1
                last = anchor + 1
                while last < end and (length > 1 or not is_start(last)):
                    length -= is_start(last)
                    last += 1
                span = range(first, last)
        fresh = [position for position in span if position not in masked]
        rejections += not fresh
        masked.update(fresh[: budget - len(masked)])
    return masked


def replace(
    rule: Rule,
    input_ids: Sequence[int],
    begin: int,
    end: int,
    words: Iterator[int],
    masked: set[int],
    out: Masked,
) -> None:
    """Draws the replacements of a block's masked positions and appends its targets."""
    runs: list[list[int]] = []
    for position in sorted(masked):
        if runs and runs[-1][-1] == position - 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    for run in runs:
        labels = [input_ids[position] for position in run]
        out.mlm_positions += run
        out.mlm_labels += labels
        if rule.scheme != "token" and run[0] > begin and run[-1] < end - 1:
            out.sbo_left.append(run[0] - 1)
            out.sbo_right.append(run[-1] + 1)
            out.sbo_targets += labels[: rule.max_span_targets]
            out.sbo_cu.append(len(out.sbo_targets))
        by_token = rule.scheme == "token" or rule.replacement == "token"
        for part in [[position] for position in run] if by_token else [run]:
            u = next(words)
            for position in part:
                if u < round(0.8 * WORD):
                    out.input_ids[position] = rule.mask_token_id
                elif u < round(0.9 * WORD):
                    index = next(words) * len(rule.replacement_ids) // WORD
                    out.input_ids[position] = rule.replacement_ids[index]
