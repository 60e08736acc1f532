"""Weights of masked targets by sequence length, span length and token frequency, of mean 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from spanbert_fast.data.loader import EVALUATION_EPOCH, assemble_rows
from spanbert_fast.data.loss_weighting import LossWeighting
from spanbert_fast.data.manifest import SPECIAL_TOKENS_PER_BLOCK
from spanbert_fast.data.masking import AssembledBatch, SpanMasker
from spanbert_fast.data.shards import TokenShards

Doubles = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

SAMPLED_BLOCKS: Final = 65_536
"""Most training blocks on which the mean weight is measured."""
_BLOCKS_AT_ONCE: Final = 1_024
_BISECTIONS: Final = 100


@dataclass(frozen=True, kw_only=True)
class TargetWeights:
    """Gives the targets of a batch their weights; a function of block and mask alone."""

    by_sequence_length: Doubles
    """[longest block + 1], factor of each length in pieces."""
    by_span_length: Doubles
    """[longest block + 1]."""
    by_token: Doubles
    """[V]."""
    mean: float
    """Corpus mean of the product of the three factors; weights are divided by it."""

    def __call__(self, batch: AssembledBatch) -> npt.NDArray[np.float32]:
        """float32 [M + N], factor of each target's loss: the MLM rows, then the SBO rows."""
        weights = self.raw(batch) / self.mean
        return np.concatenate([weights, weights[_sbo_rows(batch)]]).astype(np.float32)

    def raw(self, batch: AssembledBatch) -> Doubles:
        """float64 [M], products of the factors for the MLM targets."""
        positions = batch.mlm_positions
        sequences = np.searchsorted(batch.cu_seqlens, positions, side="right") - 1
        lengths = np.diff(batch.cu_seqlens)[sequences] - SPECIAL_TOKENS_PER_BLOCK
        # [CLS] and [SEP] stand between blocks and are never masked, so a run ends with its block.
        firsts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
        runs = np.diff(firsts, append=len(positions))
        weights: Doubles = self.by_sequence_length[lengths]
        weights = weights * self.by_span_length[np.repeat(runs, runs)]
        return weights * self.by_token[batch.mlm_labels]


def _sbo_rows(batch: AssembledBatch) -> Int64s:
    """int64 [N], the MLM row of the piece that each SBO target is."""
    counts = np.diff(batch.sbo_cu)
    firsts = np.repeat(batch.sbo_left + 1 - batch.sbo_cu[:-1], counts)
    rows: Int64s = np.searchsorted(batch.mlm_positions, firsts + np.arange(len(firsts)))
    return rows


def measure_weights(
    weighting: LossWeighting, shards: TokenShards, masker: SpanMasker
) -> TargetWeights:
    """The weights that a weighting gives on a corpus.

    The mean is measured on masks: over the MLM targets of up to `SAMPLED_BLOCKS` training blocks,
    evenly spaced, or of all blocks if there are fewer.

    Args:
        weighting: The exponents.
        shards: Gives blocks and counts of the training split.
        masker: As the run's, but its seed should not depend on the run's.

    Raises:
        ValueError: The training split is empty, or the weights do not fit into floating point.
    """
    num_blocks = shards.num_blocks("train")
    if num_blocks == 0:
        raise ValueError(f"{shards.directory} has no training blocks, loss weights need some")
    lengths = np.maximum(np.arange(shards.manifest.seq_length + 1, dtype=np.float64), 1)
    unscaled = TargetWeights(
        by_sequence_length=lengths**weighting.sequence_length,
        by_span_length=lengths**weighting.span_length,
        by_token=rarities(
            shards.unigram_counts(), weighting.inverse_frequency, weighting.frequency_cap
        ),
        mean=1.0,
    )
    num_sampled = min(num_blocks, SAMPLED_BLOCKS)
    rows = np.arange(num_sampled, dtype=np.int64) * num_blocks // num_sampled
    total, count = 0.0, 0
    for start in range(0, num_sampled, _BLOCKS_AT_ONCE):
        part = rows[start : start + _BLOCKS_AT_ONCE]
        raw = unscaled.raw(assemble_rows(shards, "train", masker, part, EVALUATION_EPOCH))
        total, count = total + float(raw.sum()), count + len(raw)
    return TargetWeights(
        by_sequence_length=unscaled.by_sequence_length,
        by_span_length=unscaled.by_span_length,
        by_token=unscaled.by_token,
        mean=total / count,
    )


def rarities(counts: Int64s, exponent: float, cap: float) -> Doubles:
    """float64 [V]: min(count ^ -exponent, `cap` times the mean of the result over the corpus).

    The mean is sum(count * rarity) / sum(count). Which limit that makes is an equation with one
    solution: what a limit gives as its `cap`-fold mean is above it when it is small, and below it
    from there on.

    Args:
        counts: int64 [V], how often each piece stands in the corpus; 0 counts as 1.
        exponent: At least 0.
        cap: Above 1.
    """
    free = np.maximum(counts, 1).astype(np.float64) ** -exponent
    law = counts / counts.sum()

    def allowed(limit: float) -> float:
        return cap * float((law * np.minimum(free, limit)).sum())

    low, high = 0.0, float(free.max())
    if allowed(high) >= high:
        return free
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(middle) >= middle else (low, middle)
    return np.minimum(free, low)
