"""The span boundary objective for any encoder: a head to put on its hidden states.

Shapes: B rows, S columns, T packed tokens, D hidden size, R spans of a row, K slots, N targets,
V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from spanbert_fast.config import Config
from spanbert_fast.model.heads import SpanBoundary
from spanbert_fast.model.targets import span_targets
from spanbert_fast.ops.cross_entropy import linear_cross_entropy


class SpanBoundaryOutput(NamedTuple):
    """What a `SBOHead` says about the spans of a batch."""

    loss: Tensor | None
    """Cross-entropy, summed and divided by `num_items`; 0 without any span, None without targets.
    """
    logits: Tensor | None
    """[N, V], targets in the order of the rows; None while training with targets."""


class SBOHead(nn.Module):
    """Predicts each token of a masked span from the two tokens around it (paper, section 3.2).

    It reads the last hidden states of any encoder, and decodes with the encoder's own word vectors
    and a bias of its own. `SpanMaskingCollator` makes its inputs.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        max_span_targets: int = 15,
        span_position_embedding_size: int = 200,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
    ) -> None:
        """Builds a head with random weights.

        Args:
            hidden_size: D.
            vocab_size: V, rows of the decoder's matrix.
            max_span_targets: K; as the collator's.
            span_position_embedding_size: size of the vector that tells which token of the span is
                to be predicted.
            layer_norm_eps: added to the variance.
            initializer_range: standard deviation of the weights.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__()
        # The head is that of `Model`, which reads these five fields of a configuration.
        self._config = Config(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_attention_heads=1,
            max_span_targets=max_span_targets,
            span_position_embedding_size=span_position_embedding_size,
            layer_norm_eps=layer_norm_eps,
        )
        self.span_boundary = SpanBoundary(self._config)
        for module in self.span_boundary.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self,
        hidden: Tensor,
        sbo_spans: Tensor,
        sbo_targets: Tensor | None = None,
        *,
        decoder_weight: Tensor,
        num_items: int | Tensor | None = None,
    ) -> SpanBoundaryOutput:
        """Loss and logits of the spans of a batch.

        Args:
            hidden: [B, S, D] last hidden states; or [T, D], packed.
            sbo_spans: [B, R, 2] columns left and right of each span, -1 = padding; packed: [R, 2]
                packed positions.
            sbo_targets: [B, R, up to K] ids of each span, -100 = padding; packed: [R, up to K].
                Without them every token of each span is predicted.
            decoder_weight: [V, D], usually the encoder's word vectors.
            num_items: what divides the sum of the cross-entropies; by default N, their number.
                The number of MLM labels of the step gives SpanBERT's loss per token.

        Raises:
            ValueError: a shape does not fit, or a boundary or an id is out of range.
        """
        expected = (self._config.vocab_size, self._config.hidden_size)
        if tuple(decoder_weight.shape) != expected:
            raise ValueError(
                f"decoder_weight must have shape {expected} (vocab_size, hidden_size), got "
                f"{tuple(decoder_weight.shape)}; if the word vectors have another size, give the "
                "weight of a decoder of its own"
            )
        if hidden.dim() == 2:
            hidden, sbo_spans = hidden[None], sbo_spans[None]
            sbo_targets = None if sbo_targets is None else sbo_targets[None]
        if hidden.dim() != 3 or hidden.shape[2] != expected[1]:
            raise ValueError(
                f"hidden must have shape (rows, columns, {expected[1]}) or (tokens, "
                f"{expected[1]}), got {tuple(hidden.shape)}"
            )
        shape = (hidden.shape[0], hidden.shape[1])
        ends = torch.arange(shape[0] + 1, device=hidden.device, dtype=torch.int32) * shape[1]
        spans = span_targets(self._config, sbo_spans, sbo_targets, shape, None, ends)
        rows = self.span_boundary(hidden.flatten(0, 1), spans)
        bias = self.span_boundary.bias
        loss = logits = None
        if sbo_targets is not None:
            losses, _ = linear_cross_entropy(rows, decoder_weight, bias, bias, 0, spans.targets)
            divisor = losses.shape[0] if num_items is None else num_items
            loss = losses.sum() / torch.as_tensor(divisor, device=losses.device).clamp(min=1)
        if sbo_targets is None or not self.training:
            logits = functional.linear(rows, decoder_weight, bias)
        return SpanBoundaryOutput(loss, logits)
