"""Labels and spans as Hugging Face's collators give them -> the flat targets of a packed batch.

Shapes: B rows as given, S columns, T packed tokens, M labels, R spans, K slots of the SBO head, N
SBO targets.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch
from spanbert_fast.model.rows import Sizes

IGNORED = -100
"""No label, no target: Hugging Face's and PyTorch's number for it."""


class SpanTargets(NamedTuple):
    """The SBO fields of a `PackedBatch`."""

    left: Tensor
    right: Tensor
    cu: Tensor
    targets: Tensor

    @classmethod
    def of(cls, batch: PackedBatch) -> SpanTargets:
        """Those of a packed batch."""
        return cls(batch.sbo_left, batch.sbo_right, batch.sbo_cu, batch.sbo_targets)

    @classmethod
    def empty(cls, device: torch.device) -> SpanTargets:
        """No spans."""
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(none, none, torch.zeros(1, dtype=torch.int32, device=device), none)


def without_spans(batch: PackedBatch) -> PackedBatch:
    """The same batch with nothing to predict from boundaries."""
    spans = SpanTargets.empty(batch.sbo_targets.device)
    return dataclasses.replace(
        batch,
        sbo_left=spans.left,
        sbo_right=spans.right,
        sbo_cu=spans.cu,
        sbo_targets=spans.targets,
    )


def masked_targets(
    sizes: Sizes,
    labels: Tensor | None,
    shape: tuple[int, int],
    kept: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Packed positions and ids, int64 [M] each, of all labels.

    Args:
        sizes: Sets the size of the vocabulary.
        labels: int64 [B, S], -100 = no label; None: no labels.
        shape: B and S.
        kept: int64 [T], flat positions that are not padding; None: all.
        device: Where the result lies.

    Raises:
        ValueError: The shape is another, an id is not in the vocabulary, or padding has a label.
    """
    if labels is None:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return none, none
    if tuple(labels.shape) != shape:
        raise ValueError(f"labels must have shape {shape}, got {tuple(labels.shape)}")
    flat = labels.flatten().long()
    ids = flat if kept is None else flat.index_select(0, kept)
    positions = (ids != IGNORED).nonzero()[:, 0]
    ids = ids.index_select(0, positions)
    if kept is not None and int((flat != IGNORED).sum()) != len(ids):
        raise ValueError("labels must be -100 where attention_mask is 0")
    _check_ids("labels", ids, sizes.vocab_size)
    return positions, ids


def span_targets(
    sizes: Sizes,
    spans: Tensor,
    targets: Tensor | None,
    shape: tuple[int, int],
    kept: Tensor | None,
    cu_seqlens: Tensor,
) -> SpanTargets:
    """The SBO fields of the batch, spans in the order of the rows.

    Args:
        sizes: Sets the number of slots and the size of the vocabulary.
        spans: int64 [B, R, 2], columns left and right of each span; -1 = padding.
        targets: int64 [B, R, up to K], -100 = padding after the ids of a span; None: one row per
            token of each span, with nothing to learn.
        shape: B and S.
        kept: int64 [T], flat positions that are not padding; None: all.
        cu_seqlens: int32 [sequences + 1] of the packed rows.

    Raises:
        ValueError: A shape does not fit, or a boundary is outside of its sequence.
    """
    if spans.dim() != 3 or spans.shape[0] != shape[0] or spans.shape[2] != 2:
        raise ValueError(
            f"sbo_spans must have shape ({shape[0]}, spans, 2), got {tuple(spans.shape)}"
        )
    spans = spans.long()
    is_span = (spans != -1).any(dim=2)
    edges = spans[is_span]
    in_order = (edges[:, 0] < edges[:, 1]) & (edges[:, 0] >= 0) & (edges[:, 1] < shape[1])
    if not bool(in_order.all()):
        wrong = edges[~in_order][0].tolist()
        raise ValueError(f"sbo_spans must satisfy 0 <= left < right < {shape[1]}, got {wrong}")
    if targets is None:
        counts = edges[:, 1] - edges[:, 0] - 1
        ids = torch.full((int(counts.sum()),), IGNORED, dtype=torch.int64, device=spans.device)
    else:
        counts, ids = _counted_targets(sizes, targets, is_span)
    if bool(((counts < 1) | (counts > sizes.max_span_targets)).any()):
        raise ValueError(
            f"a span must have 1 to {sizes.max_span_targets} targets (max_span_targets), "
            f"got {counts.tolist()[:16]}"
        )
    left, right = _packed_edges(edges, is_span, shape, kept, cu_seqlens)
    cu = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return SpanTargets(left, right, cu, ids)


def _counted_targets(sizes: Sizes, targets: Tensor, is_span: Tensor) -> tuple[Tensor, Tensor]:
    if targets.dim() != 3 or targets.shape[:2] != is_span.shape:
        raise ValueError(
            f"sbo_targets must have shape ({is_span.shape[0]}, {is_span.shape[1]}, slots), "
            f"got {tuple(targets.shape)}"
        )
    is_target = targets != IGNORED
    counts = is_target.sum(dim=2)
    columns = torch.arange(targets.shape[2], device=targets.device)
    if not torch.equal(is_target, columns < counts[..., None]):
        raise ValueError("sbo_targets must hold the ids of a span first, then -100")
    if not torch.equal(counts > 0, is_span):
        raise ValueError("sbo_targets must hold ids exactly where sbo_spans hold a span")
    ids = targets[is_target].long()
    _check_ids("sbo_targets", ids, sizes.vocab_size)
    return counts[is_span], ids


def _packed_edges(
    edges: Tensor, is_span: Tensor, shape: tuple[int, int], kept: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    flat = is_span.nonzero()[:, :1] * shape[1] + edges
    if kept is not None:
        place = torch.full((shape[0] * shape[1],), -1, device=edges.device)
        place[kept] = torch.arange(len(kept), device=edges.device)
        flat = place[flat]
    sequence = torch.searchsorted(cu_seqlens.long(), flat, right=True)
    apart = (sequence[:, 0] != sequence[:, 1]) | (flat < 0).any(dim=1)
    if bool(apart.any()):
        wrong = edges[apart][0].tolist()
        raise ValueError(
            f"both ends of a span must lie in one sequence, not in padding, got {wrong}"
        )
    left, right = flat.unbind(1)
    return left.contiguous(), right.contiguous()


def _check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    if ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} must be -100 or in [0, {vocab_size}), got {wrong}")
