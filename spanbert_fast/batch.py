"""What travels from data to model: one packed batch.

Legend of shapes, used in the whole package: T packed tokens, B sequences, S padded length,
D hidden size, H heads, K head size (or slots of a span, next to R), F feed-forward size,
M tokens with an MLM label, R spans, N SBO targets, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Sequences laid end to end, without padding, with their MLM and SBO targets.

    The targets of span r are rows `sbo_cu[r]:sbo_cu[r + 1]` of `sbo_targets`; the offset of a row
    in its span is `row - sbo_cu[r]` and smaller than the number of slots of the SBO head. The
    tensors may live on any one device; `max_seqlen` and `num_items` are host numbers, so no step
    has to synchronise to learn them.
    """

    input_ids: Tensor
    """int64 [T], after masking."""
    position_ids: Tensor
    """int64 [T], position in the own sequence."""
    token_type_ids: Tensor
    """int64 [T]."""
    cu_seqlens: Tensor
    """int32 [B + 1]: sequence b is rows `cu_seqlens[b]:cu_seqlens[b + 1]`."""
    max_seqlen: int
    """Length of the longest sequence, or any bound above it."""
    sequence_ids: Tensor
    """int64 [B]: names a sequence in the dropout stream, wherever it stands in a batch."""
    mlm_positions: Tensor
    """int64 [M], packed positions."""
    mlm_labels: Tensor
    """int64 [M], original ids."""
    sbo_left: Tensor
    """int64 [R], packed position of the token before each span."""
    sbo_right: Tensor
    """int64 [R], packed position of the token after each span."""
    sbo_cu: Tensor
    """int32 [R + 1]."""
    sbo_targets: Tensor
    """int64 [N], original ids."""
    row_weights: Tensor | None = None
    """float32 [M + N], factor of each target's loss: the MLM rows, then the SBO rows; None: 1."""
    num_items: int | None = None
    """MLM labels of the whole step, over all micro-batches and ranks; None: those of this batch."""

    def _map(self, convert: Callable[[Tensor], Tensor]) -> Self:
        changes: dict[str, Any] = {
            field.name: convert(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same batch on `device`; this one, if it is there already."""
        if self.input_ids.device == torch.device(device):
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch in page-locked host memory, for asynchronous copies to a GPU."""
        return self._map(Tensor.pin_memory)

    @property
    def num_tokens(self) -> int:
        """T, the number of real tokens."""
        return self.input_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        """B, the number of sequences."""
        return self.cu_seqlens.shape[0] - 1
