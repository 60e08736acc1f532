"""What the layers of the encoder have to know beside the hidden states.

Shapes: T packed tokens, B sequences, D hidden size, n rows that are read.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch
from spanbert_fast.model.inputs import PackedInputs


class ReadRows(NamedTuple):
    """The rows of the last layer that something reads: no other needs its feed-forward.

    Their number follows from shapes alone, so nothing has to be fetched from a GPU to know it: a
    row that is read twice, like a token between two spans, is computed twice.
    """

    rows: Tensor
    """int64 [n], ascending packed rows."""
    places: Tensor
    """int64 [n], all different: where the result goes; a repeated row's lands behind the T rows."""

    @staticmethod
    def count(batch: PackedBatch) -> int:
        """How many rows of the last layer are computed: n, or all T if n is most of them."""
        read = batch.mlm_positions.shape[0] + 2 * batch.sbo_left.shape[0]
        return read if 4 * read <= 3 * batch.num_tokens else batch.num_tokens

    @classmethod
    def of(cls, batch: PackedBatch) -> Self | None:
        """What the heads read to score the batch's targets; None: all rows."""
        if cls.count(batch) == batch.num_tokens:
            return None
        rows = torch.cat([batch.mlm_positions, batch.sbo_left, batch.sbo_right]).sort().values
        behind = torch.arange(rows.shape[0], device=rows.device) + batch.num_tokens
        is_repeated = torch.nn.functional.pad(rows[1:] == rows[:-1], (min(1, rows.shape[0]), 0))
        return cls(rows, torch.where(is_repeated, behind, rows))

    def take(self, full: Tensor) -> Tensor:
        """[T, D] -> [n, D]."""
        return full.index_select(0, self.rows)

    def put(self, rows: Tensor, num_tokens: int) -> Tensor:
        """[n, D] -> [T, D], zeros where nothing is read."""
        full = rows.new_zeros(num_tokens + rows.shape[0], rows.shape[1])
        return full.index_copy_(0, self.places, rows)[:num_tokens]


class Layout(NamedTuple):
    """Where the sequences lie in the packed rows, and what their dropout masks are drawn from."""

    cu_seqlens: Tensor
    """int32 [B + 1]."""
    max_seqlen: int
    """Length of the longest sequence, or any bound above it."""
    sequence_ids: Tensor
    """int64 [B]."""
    seed: Tensor | None
    """int64 scalar; None: no dropout."""
    inputs: PackedInputs | None = None
    """The padded batch in whose shape states and probabilities are returned; None: packed."""
    wants_probabilities: bool = False
    """Whether attention probabilities are returned."""
    read: ReadRows | None = None
    """The only rows that are read of what this layer, or the last one, returns; None: all."""

    def dropout(self, p: float, site: int) -> dict[str, Any]:
        """What the ops take for a dropout with probability `p` at this place in the model."""
        return {
            "dropout_p": 0.0 if self.seed is None else p,
            "seed": self.seed,
            "sequence_ids": self.sequence_ids,
            "site": site,
        }

    def take(self, full: Tensor) -> Tensor:
        """The rows [T, D] that have to be computed on: [n, D]."""
        return full if self.read is None else self.read.take(full)

    def put(self, rows: Tensor, num_tokens: int) -> Tensor:
        """Back from what `take` gave to [T, D]."""
        return rows if self.read is None else self.read.put(rows, num_tokens)
