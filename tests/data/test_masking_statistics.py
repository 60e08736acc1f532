"""The law of the masks: 20,000 blocks against the figures measured on the reference's rule.

The reference figures come from 4,000 to 8,000 blocks and are printed to a few digits; the tolerance
is the sampling error of both sides plus half a unit of the last digit.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy import stats

from spanbert_fast import _core
from spanbert_fast.data.masking import MaskedBatch, SpanMasker

NUM_BLOCKS = 20_000
REFERENCE_BLOCKS = 4_000
NUM_STARTS, VOCABULARY_SIZE = 20_000, 29_000
SEED = 11
# fmt: off
LENGTH_LAW = [
    .22406, .17925, .14340, .11472, .09177, .07342, .05874, .04699, .03759, .03007
]
RUN_LAW = [
    .2247, .176, .1393, .1129, .0898, .0708, .0562, .0468, .0365, .0311, .0052, .0034, .0022
]
# fmt: on


@dataclass
class Case:
    """Blocks of one length and kind of words, their masks, and their spans one by one."""

    length: int
    tokens: np.ndarray
    out: MaskedBatch
    run_block: np.ndarray = field(init=False)
    run_begin: np.ndarray = field(init=False)
    run_length: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.masked = np.zeros((NUM_BLOCKS, self.length + 1), np.int8)
        blocks, columns = np.divmod(self.out.mlm_positions, self.length)
        self.masked[blocks, columns] = 1
        edges = np.diff(self.masked, axis=1, prepend=0)
        self.run_block, self.run_begin = np.nonzero(edges == 1)
        self.run_length = np.nonzero(edges == -1)[1] - self.run_begin


def make_case(length: int, word_lengths: list[float]) -> Case:
    rng = np.random.default_rng(length)
    total = NUM_BLOCKS * length
    pieces = rng.choice(len(word_lengths), size=total, p=word_lengths) + 1
    begins = np.cumsum(pieces)
    is_start = np.zeros(total, np.bool_)
    is_start[begins[begins < total]] = True
    ids = np.where(
        is_start,
        rng.integers(4, NUM_STARTS, total),
        rng.integers(NUM_STARTS, VOCABULARY_SIZE - 1000, total),
    ).astype(np.int32)
    masker = SpanMasker(
        np.arange(VOCABULARY_SIZE) < NUM_STARTS,
        mask_token_id=3,
        special_token_ids=[0, 1, 2],
        replacement_ids=np.arange(VOCABULARY_SIZE - 1000, VOCABULARY_SIZE, dtype=np.int32),
        seed=SEED,
    )
    boundaries = np.arange(0, total + 1, length, dtype=np.int32)
    return Case(length, ids, masker(ids, boundaries, np.arange(NUM_BLOCKS)))


WORDS = {"single": [1.0], "multi": [0.84, 0.10, 0.04, 0.02]}


@pytest.fixture(scope="module")
def cases() -> dict[tuple[int, str], Case]:
    return {
        (length, words): make_case(length, WORDS[words])
        for length, words in [(510, "single"), (510, "multi"), (128, "single"), (64, "single")]
    }


def assert_mean(values: np.ndarray, printed: float, digit: float) -> None:
    """The mean of one value per block agrees with a printed one."""
    error = values.std() * math.sqrt(1 / NUM_BLOCKS + 1 / REFERENCE_BLOCKS)
    assert abs(values.mean() - printed) < 4 * error + digit / 2, (values.mean(), printed)


# Masked tokens, runs per block, run length, share above 10, above 15, SBO rows, runs at an edge.
TABLE = {
    (510, "single"): (77, 19.58, 3.93, 0.0159, 0.0020, 19.38, 0.193),
    (510, "multi"): (77, 15.11, 5.10, 0.096, 0.0127, 14.91, 0.202),
    (128, "single"): (20, 5.59, 3.58, 0.009, 0.0006, 5.38, 0.203),
    (64, "single"): (10, 3.14, 3.19, 0.0, 0.0, 2.93, 0.209),
}


@pytest.mark.parametrize("key", TABLE, ids=str)
def test_runs_follow_the_table(cases: dict[tuple[int, str], Case], key: tuple[int, str]) -> None:
    budget, runs, mean_length, above_10, above_15, rows, edges = TABLE[key]
    case = cases[key]

    def per_block(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(case.run_block[chosen], minlength=NUM_BLOCKS)

    everything = np.ones(len(case.run_length), np.bool_)
    assert (case.masked.sum(axis=1) == budget).all()
    runs_per_block = per_block(everything)
    assert_mean(runs_per_block, runs, 0.01)
    # A ratio of sums: linearised, so that the error is again one of a mean over blocks.
    assert (
        abs(budget / runs_per_block.mean() - mean_length)
        < 4
        * (
            budget
            / runs**2
            * runs_per_block.std()
            * math.sqrt(1 / NUM_BLOCKS + 1 / REFERENCE_BLOCKS)
        )
        + 0.005
    )
    for limit, share, digit in ((10, above_10, 0.001), (15, above_15, 0.0001)):
        above = per_block(case.run_length > limit) - share * runs_per_block
        assert_mean(above / runs_per_block.mean(), 0.0, digit)
    touches = (case.run_begin == 0) | (case.run_begin + case.run_length == case.length)
    assert_mean(per_block(touches), edges, 0.001)
    assert_mean(per_block(~touches), rows, 0.01)
    assert len(case.out.sbo_left) == (~touches).sum()


@pytest.mark.parametrize(
    ("key", "share"),
    [((510, "single"), 0.990), ((510, "multi"), 0.980), ((128, "single"), 0.964)],
    ids=str,
)
def test_share_of_span_boundary_targets(
    cases: dict[tuple[int, str], Case], key: tuple[int, str], share: float
) -> None:
    case = cases[key]
    targets = np.diff(case.out.sbo_cu)
    assert targets.max() == min(15, case.run_length.max())
    per_block = np.bincount(case.out.sbo_left // case.length, weights=targets, minlength=NUM_BLOCKS)
    assert_mean(per_block / case.masked.sum(axis=1), share, 0.001)


def test_run_lengths_follow_the_printed_law(cases: dict[tuple[int, str], Case]) -> None:
    case = cases[(510, "single")]
    counts = np.bincount(case.run_length, minlength=15)
    ours = np.append(counts[1:14], counts[14:].sum())
    law = np.array([*RUN_LAW, 1 - sum(RUN_LAW)])
    # Two samples: theirs has about 19.58 runs in each of its blocks.
    theirs = law * 19.58 * REFERENCE_BLOCKS
    pooled = (ours + theirs) / (ours.sum() + theirs.sum())
    statistic = sum(
        (((sample - pooled * sample.sum()) ** 2) / (pooled * sample.sum())).sum()
        for sample in (ours, theirs)
    )
    assert stats.chi2.sf(statistic, len(law) - 1) > 1e-3


@pytest.mark.parametrize(
    ("key", "first", "second", "later"),
    [((510, "single"), 0.045, 0.078, 0.148), ((128, "single"), 0.047, 0.084, 0.16)],
    ids=str,
)
def test_the_beginning_of_a_block_is_masked_less(
    cases: dict[tuple[int, str], Case],
    key: tuple[int, str],
    first: float,
    second: float,
    later: float,
) -> None:
    masked = cases[key].masked
    assert_mean(masked[:, 0], first, 0.001)
    assert_mean(masked[:, 1], second, 0.001)
    assert_mean(masked[:, 10:-1].mean(axis=1), later, 0.01)


def draws_of(case: Case, words_of_block: np.ndarray, block: int) -> tuple[list[int], list[int]]:
    """Lengths in words that a block drew, and those that its accepted draws realised.

    What the draws amount to has to be the sampler's mask, so they are the sampler's draws.
    """
    begin = block * case.length
    is_start = (case.tokens[begin : begin + case.length] < NUM_STARTS).tolist()
    lengths = (1 + np.searchsorted(THRESHOLDS, words_of_block[::2], side="right")).tolist()
    anchors = (words_of_block[1::2].astype(np.uint64) * case.length >> 32).tolist()
    budget = math.ceil(0.15 * case.length)
    masked: set[int] = set()
    drawn, realised = [], []
    for length, anchor in zip(lengths, anchors, strict=True):
        if len(masked) == budget:
            break
        drawn.append(length)
        if anchor in masked:
            continue
        position = anchor
        while position > 0 and not is_start[position]:
            position -= 1
        num_words = 0
        while position < case.length and len(masked) < budget:
            num_words += is_start[position] or num_words == 0
            if num_words > length:
                break
            masked.add(position)
            position += 1
        realised.append(min(num_words, length))
    assert masked == set(np.flatnonzero(case.masked[block]).tolist())
    return drawn, realised


THRESHOLDS = np.round(np.cumsum(0.8 ** np.arange(10))[:-1] / np.sum(0.8 ** np.arange(10)) * 2**32)


@pytest.mark.parametrize(
    ("key", "accepted", "realised_length"),
    [
        ((510, "single"), 21.60, 3.68),
        ((510, "multi"), 16.58, 3.65),
        ((128, "single"), 6.12, 3.36),
        ((64, "single"), 3.40, 3.00),
    ],
    ids=str,
)
def test_draws_follow_the_law(
    cases: dict[tuple[int, str], Case],
    key: tuple[int, str],
    accepted: float,
    realised_length: float,
) -> None:
    case = cases[key]
    num_words = 320
    counters = np.zeros((NUM_BLOCKS, num_words // 4, 4), np.uint32)
    counters[:, :, 0] = np.arange(num_words // 4)
    counters[:, :, 2] = np.arange(NUM_BLOCKS)[:, None]
    words = _core.philox4x32(counters.reshape(-1, 4), SEED).reshape(NUM_BLOCKS, num_words)
    draws = [draws_of(case, words[block], block) for block in range(NUM_BLOCKS)]
    counts = np.bincount([length for drawn, _ in draws for length in drawn], minlength=11)[1:]
    law = np.array(LENGTH_LAW) / sum(LENGTH_LAW)
    assert stats.chisquare(counts, law * counts.sum()).pvalue > 1e-3
    assert abs((law * np.arange(1, 11)).sum() - 3.7971) < 1e-4
    num_accepted = np.array([len(realised) for _, realised in draws])
    assert_mean(num_accepted, accepted, 0.01)
    residuals = np.array([sum(realised) for _, realised in draws]) - realised_length * num_accepted
    assert_mean(residuals / num_accepted.mean(), 0.0, 0.01)


def test_replacements_are_80_10_10_and_uniform_over_the_sample(
    cases: dict[tuple[int, str], Case],
) -> None:
    case = cases[(510, "single")]
    shown = case.out.input_ids.reshape(NUM_BLOCKS, case.length)
    original = case.tokens.reshape(NUM_BLOCKS, case.length)
    masked = case.masked[:, :-1] == 1
    kinds = {
        0.8: shown == 3,
        0.1: shown >= VOCABULARY_SIZE - 1000,
        0.1 + 1e-12: shown == original,
    }
    budget = masked[0].sum()
    for share, chosen in kinds.items():
        per_block = (chosen & masked).sum(axis=1) / budget
        assert abs(per_block.mean() - share) < 4 * per_block.std() / math.sqrt(NUM_BLOCKS)
    assert (shown == original)[~masked].all()
    drawn = shown[masked & kinds[0.1]] - (VOCABULARY_SIZE - 1000)
    assert stats.chisquare(np.bincount(drawn, minlength=1000)).pvalue > 1e-3
