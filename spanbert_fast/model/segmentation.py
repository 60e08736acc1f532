"""Distributions over segmentations: the best one, span probabilities, and a likelihood to learn.

A segmentation of a sequence of units (words) into spans of at most W units has probability
proportional to exp(sum of its spans' scores): a semi-Markov conditional random field (Sarawagi and
Cohen, 2004). Shapes: N units, B sequences, W longest span; scores [N, W], where entry [i, n - 1] is
the span of n units that begins at unit i. Minus infinity forbids a span; entries of spans that
would leave their sequence are ignored. The work is done in C++, on the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spanbert_fast import _core


class Segmentation(NamedTuple):
    """The best segmentation of each sequence."""

    starts: Tensor
    """int64 [R], first unit of each span, ascending."""
    lengths: Tensor
    """int64 [R], units of each span."""
    scores: Tensor
    """float64 [B], sum over the spans of each sequence."""


class SpanProbabilities(NamedTuple):
    """What all segmentations of a batch say together."""

    marginals: Tensor
    """[N, W], probability that the span is part of a segmentation; in the dtype of the scores."""
    log_partition: Tensor
    """float64 [B], log of the sum over segmentations of exp(score)."""


def best_segmentation(scores: Tensor, cu_seqlens: Tensor, *, num_threads: int = 1) -> Segmentation:
    """The segmentation of highest score of each sequence, by semi-Markov Viterbi in O(N W).

    Args:
        scores: float32 or float64 [N, W].
        cu_seqlens: int32 [B + 1]; a border in it is a border of every segmentation.
        num_threads: Sequences are dealt to so many threads.

    Raises:
        ValueError: A score is NaN or plus infinity, a sequence has no allowed segmentation, or a
            shape or boundary does not fit.
    """
    lengths, best = _core.best_segmentation(*_arrays(scores, cu_seqlens), num_threads)
    every = torch.from_numpy(lengths).to(torch.int64)
    starts = every.nonzero()[:, 0]
    return Segmentation(starts, every.index_select(0, starts), torch.from_numpy(best))


def span_probabilities(
    scores: Tensor, cu_seqlens: Tensor, *, num_threads: int = 1
) -> SpanProbabilities:
    """The probability of every span, by forward-backward in O(N W); arguments as above."""
    marginals, log_partition = _core.span_marginals(*_arrays(scores, cu_seqlens), num_threads)
    return SpanProbabilities(torch.from_numpy(marginals), torch.from_numpy(log_partition))


def _arrays(scores: Tensor, cu_seqlens: Tensor) -> tuple[Any, Any]:
    if scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scores have dtype {scores.dtype}, allowed are float32 and float64")
    plain = scores.detach().contiguous().cpu()
    return plain.numpy(), cu_seqlens.to("cpu", torch.int32).numpy()


class _LogPartition(torch.autograd.Function):
    """log of the sum over segmentations [B]; its gradient is the marginals."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, cu_seqlens: Tensor, num_threads: int) -> Tensor:
        found = span_probabilities(scores, cu_seqlens, num_threads=num_threads)
        ctx.save_for_backward(found.marginals.to(scores.device), cu_seqlens)
        return found.log_partition.to(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        marginals, cu_seqlens = ctx.saved_tensors
        lengths = cu_seqlens.to(grad.device).diff().to(torch.int64)
        rows = torch.repeat_interleave(grad, lengths)
        return marginals * rows[:, None], None, None


def segmentation_loss(
    scores: Tensor, cu_seqlens: Tensor, gold_lengths: Tensor, *, num_threads: int = 1
) -> Tensor:
    """Minus the log-probability of the gold segmentation, summed over sequences: a scalar.

    Args:
        scores: float32 or float64 [N, W], differentiable once.
        cu_seqlens: int32 [B + 1].
        gold_lengths: int64 [N], units of the gold span at its first unit, 0 at the other units.
        num_threads: See `best_segmentation`.

    Raises:
        ValueError: The gold spans do not tile the sequences, or one is longer than W.
    """
    starts = gold_lengths.nonzero()[:, 0]
    lengths = gold_lengths.index_select(0, starts)
    _check_gold(starts, lengths, cu_seqlens, scores.shape)
    chosen = scores.flatten().index_select(0, starts * scores.shape[1] + lengths - 1)
    log_partition: Tensor = _LogPartition.apply(  # type: ignore[no-untyped-call]
        scores, cu_seqlens, num_threads
    )
    return log_partition.sum() - chosen.sum()


def _check_gold(starts: Tensor, lengths: Tensor, cu_seqlens: Tensor, shape: torch.Size) -> None:
    if lengths.numel() and int(lengths.max()) > shape[1]:
        raise ValueError(f"a gold span has {int(lengths.max())} units, the scores allow {shape[1]}")
    ends = starts + lengths
    expected = torch.cat([ends.new_zeros(1), ends])
    borders = cu_seqlens.to(ends)
    if not torch.equal(expected[:-1], starts) or not torch.isin(borders, expected).all():
        raise ValueError(
            "gold spans must follow one another without a gap and end at the sequences' ends"
        )
