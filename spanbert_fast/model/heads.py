"""The two prediction heads and the loss they share.

Shapes: T packed tokens, D hidden size, P position vector size, K slots, R spans, M MLM labels, N
SBO targets, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.model.encoder import is_plain, split_bias
from spanbert_fast.model.targets import SpanTargets
from spanbert_fast.ops.activation import bias_gelu_layer_norm
from spanbert_fast.ops.cross_entropy import linear_cross_entropy
from spanbert_fast.ops.span_boundary import span_boundary_hidden


class PredictionTransform(nn.Module):
    """Product, GELU and norm in front of a decoder."""

    def __init__(self, config: Config, input_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, rows: Tensor) -> Tensor:
        """[rows, input size] -> [rows, D]."""
        norm = self.LayerNorm
        product, bias = split_bias(self.dense, rows)
        return bias_gelu_layer_norm(product, bias, norm.weight, norm.bias, norm.eps)


class MaskedPrediction(nn.Module):
    """Predicts a token from its own hidden state (MLM)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.transform = PredictionTransform(config, config.hidden_size)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, rows: Tensor) -> Tensor:
        """[M, D] -> what the decoder reads, [M, D]."""
        transformed: Tensor = self.transform(rows)
        return transformed


class SpanBoundary(nn.Module):
    """Predicts a token of a span from the span's two neighbours and its place (paper, section 3.2).

    The decoder is the MLM head's matrix with a bias of its own.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config.span_position_embedding_size
        self.position_embeddings = nn.Embedding(config.max_span_targets, size)
        self.transform1 = PredictionTransform(config, 2 * config.hidden_size + size)
        self.transform2 = PredictionTransform(config, config.hidden_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, spans: SpanTargets) -> Tensor:
        """Packed hidden states [T, D] -> what the decoder reads, one row per target, [N, D]."""
        first, table = self.transform1, self.position_embeddings
        if is_plain(first.dense, nn.Linear) and is_plain(table, nn.Embedding):
            rows = span_boundary_hidden(
                hidden,
                spans.left,
                spans.right,
                spans.cu,
                table.weight,
                first.dense.weight,
                first.dense.bias,
                first.LayerNorm.weight,
                first.LayerNorm.bias,
                first.LayerNorm.eps,
                num_rows=spans.targets.shape[0],
            )
        else:
            rows = first(self._concatenated(hidden, spans))
        transformed: Tensor = self.transform2(rows)
        return transformed

    def _concatenated(self, hidden: Tensor, spans: SpanTargets) -> Tensor:
        row = torch.arange(spans.targets.shape[0], device=hidden.device)
        span = torch.searchsorted(spans.cu.long(), row, right=True) - 1
        offset = row - spans.cu.long().index_select(0, span)
        left, right = (
            hidden.index_select(0, edge.index_select(0, span)) for edge in (spans.left, spans.right)
        )
        return torch.cat([left, right, self.position_embeddings(offset)], dim=-1)


class RowScores(NamedTuple):
    """Cross-entropy of every target, and whether the best guess was right."""

    mlm_loss: Tensor
    """[M], at least fp32."""
    mlm_correct: Tensor
    """bool [M]."""
    sbo_loss: Tensor
    """[N], at least fp32."""
    sbo_correct: Tensor
    """bool [N]."""

    def weighted_sums(self, row_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both sums of the losses, each loss times its weight: float [M + N], or None for 1."""
        mlm, sbo = self.mlm_loss, self.sbo_loss
        if row_weights is None:
            return mlm.sum(), sbo.sum()
        num_mlm, num_rows = mlm.shape[0], mlm.shape[0] + sbo.shape[0]
        if row_weights.shape != (num_rows,):
            raise ValueError(
                f"row_weights must have one weight for each of {num_rows} targets, "
                f"got shape {tuple(row_weights.shape)}"
            )
        return (mlm * row_weights[:num_mlm]).sum(), (sbo * row_weights[num_mlm:]).sum()


class Heads(nn.Module):
    """Both heads, under the names `cls.predictions` and `cls.span_boundary`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.predictions = MaskedPrediction(config)
        self.span_boundary = SpanBoundary(config)

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """[rows, D] -> [rows, V]."""
        logits: Tensor = self.predictions.decoder(self.predictions(hidden))
        return logits

    def sbo_logits(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Packed hidden states [T, D] -> [N, V]."""
        rows = self.span_boundary(hidden, SpanTargets.of(batch))
        return functional.linear(rows, self._decoder().weight, self.span_boundary.bias)

    def score(self, hidden: Tensor, batch: PackedBatch) -> RowScores:
        """Loss and hit of every target; only labelled rows meet the decoder.

        Without targets a head still has a gradient, of zeros.

        Args:
            hidden: Packed hidden states [T, D].
            batch: Where the targets are.
        """
        decoder = self._decoder()
        num_mlm = batch.mlm_positions.shape[0]
        masked = self.predictions(hidden.index_select(0, batch.mlm_positions))
        losses, correct = linear_cross_entropy(
            torch.cat([masked, self.span_boundary(hidden, SpanTargets.of(batch))]),
            decoder.weight,
            decoder.bias,
            self.span_boundary.bias,
            num_mlm,
            torch.cat([batch.mlm_labels, batch.sbo_targets]),
        )
        return RowScores(losses[:num_mlm], correct[:num_mlm], losses[num_mlm:], correct[num_mlm:])

    def _decoder(self) -> nn.Linear:
        decoder = self.predictions.decoder
        if not is_plain(decoder, nn.Linear):
            raise TypeError(
                "cls.predictions.decoder must be a plain nn.Linear, because the loss reads its "
                "weight and never calls it; got hooks, an adapter or a parametrization on "
                f"{type(decoder).__name__}"
            )
        return decoder


class Losses(NamedTuple):
    """The loss to train on, and the two means to look at."""

    loss: Tensor
    mlm_loss: Tensor
    """Detached mean over the labels of this batch, 0 if there are none."""
    sbo_loss: Tensor
    """Detached mean over the SBO targets of this batch, 0 if there are none."""


def combine_losses(
    scores: RowScores,
    config: Config,
    num_items: int | Tensor | None = None,
    num_sbo_items: int | Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Losses:
    """The loss of a batch, divided by what the whole step has to learn.

    With `loss_normalization="tokens"`, (sum CE_mlm + w sum CE_sbo) / N with N the MLM labels: the
    sum of both losses per token (paper, section 3.2), and equal however a batch is split.
    "reference": sum CE_mlm / N + w sum CE_sbo / (N_sbo + 1), the rule of the released code.

    Args:
        scores: Cross-entropy of each target.
        config: Gives w and the rule.
        num_items: MLM labels of the whole step, over all micro-batches and ranks; None: those of
            this batch.
        num_sbo_items: SBO targets of the whole step; only "reference" reads it.
        row_weights: [M + N], factor of each cross-entropy in the loss; the denominators and the
            two means stay as they are.

    Raises:
        ValueError: "reference" got `num_items` without `num_sbo_items`.
    """
    mlm_sum, sbo_sum = scores.weighted_sums(row_weights)
    num_mlm, num_sbo = scores.mlm_loss.shape[0], scores.sbo_loss.shape[0]
    step_items = num_mlm if num_items is None else num_items
    if config.loss_normalization == "reference":
        if num_items is not None and num_sbo_items is None:
            raise ValueError(
                'loss_normalization="reference" needs the number of SBO targets of the whole step '
                "(num_sbo_items_in_batch) together with num_items_in_batch, got None"
            )
        step_sbo_items = num_sbo if num_sbo_items is None else num_sbo_items
        loss = mlm_sum / _at_least_one(step_items) + config.sbo_weight * sbo_sum / (
            step_sbo_items + 1
        )
    else:
        loss = (mlm_sum + config.sbo_weight * sbo_sum) / _at_least_one(step_items)
    if row_weights is not None:
        mlm_sum, sbo_sum = scores.weighted_sums(None)
    return Losses(
        loss, mlm_sum.detach() / _at_least_one(num_mlm), sbo_sum.detach() / _at_least_one(num_sbo)
    )


def _at_least_one(count: int | Tensor) -> int | Tensor:
    """A divisor: without any label the sum is 0 and must stay 0."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
