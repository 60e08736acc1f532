"""The layout of the reference's heads, written plainly over the weights of our model.

What is known of it: the MLM decoder sees every row of the padded batch, with or without a label;
every sequence has as many spans as the batch's richest one, and every span as many rows as the
longest can have, so that all of them meet both transforms and the decoder. Padding is left out of
the loss only.

Shapes: B sequences, S columns, D hidden size, R spans of the richest sequence, K slots, V words.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from peers import padded
from torch import Tensor
from torch.nn import functional
from workload import places

from spanbert_fast import Model
from spanbert_fast.batch import PackedBatch
from spanbert_fast.model.heads import PredictionTransform


class PaddedTargets(NamedTuple):
    """What both heads learn, padded."""

    labels: Tensor
    """int64 [B, S], -100 = none."""
    left: Tensor
    """int64 [B, R], columns; padding points at column 0."""
    right: Tensor
    targets: Tensor
    """int64 [B, R, K], -100 = padding."""


def pad_targets(batch: PackedBatch, max_span_targets: int) -> PaddedTargets:
    """The targets of a packed batch in padded shapes."""
    begins = batch.cu_seqlens[:-1].long()
    sequence = torch.searchsorted(batch.cu_seqlens.long(), batch.sbo_left, right=True) - 1
    counts = torch.bincount(sequence, minlength=batch.num_sequences)
    device = sequence.device
    place = torch.arange(len(sequence), device=device) - (counts.cumsum(0) - counts)[sequence]
    shape = (batch.num_sequences, int(counts.max()))
    left = torch.zeros(shape, dtype=torch.int64, device=device)
    right = torch.zeros_like(left)
    left[sequence, place] = batch.sbo_left - begins[sequence]
    right[sequence, place] = batch.sbo_right - begins[sequence]
    targets = torch.full((*shape, max_span_targets), -100, device=device)
    sizes = batch.sbo_cu.diff().long()
    span = torch.repeat_interleave(sizes)
    offset = torch.arange(len(batch.sbo_targets), device=device) - batch.sbo_cu[:-1].long()[span]
    targets[sequence[span], place[span], offset] = batch.sbo_targets
    return PaddedTargets(padded(batch)["labels"], left, right, targets)


def pad_rows(batch: PackedBatch, rows: Tensor) -> Tensor:
    """Packed rows [T, D] as [B, S, D], padding 0."""
    plane = rows.new_zeros(batch.num_sequences * batch.max_seqlen, rows.shape[1])
    plane = plane.index_copy(0, places(batch.cu_seqlens, batch.max_seqlen), rows)
    return plane.view(batch.num_sequences, batch.max_seqlen, -1)


def transformed(transform: PredictionTransform, rows: Tensor) -> Tensor:
    """Product, GELU and norm, one after the other."""
    norm = transform.LayerNorm
    product = functional.linear(rows, transform.dense.weight, transform.dense.bias)
    shape = (product.shape[-1],)
    return functional.layer_norm(functional.gelu(product), shape, norm.weight, norm.bias, norm.eps)


def heads_loss(model: Model, hidden: Tensor, wanted: PaddedTargets) -> Tensor:
    """Both losses per MLM label, as ours counts them, from hidden states [B, S, D]."""
    head, spans = model.cls.predictions, model.cls.span_boundary
    logits = functional.linear(
        transformed(head.transform, hidden), head.decoder.weight, head.decoder.bias
    )
    mlm = functional.cross_entropy(
        logits.flatten(0, 1).float(), wanted.labels.flatten(), reduction="sum"
    )
    rows = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
    num_slots = wanted.targets.shape[2]
    pair = torch.cat([hidden[rows, wanted.left], hidden[rows, wanted.right]], dim=-1)
    pair = pair[:, :, None].expand(-1, -1, num_slots, -1)
    position = spans.position_embeddings.weight[:num_slots].expand(*pair.shape[:2], -1, -1)
    joined = torch.cat([pair, position.to(pair.dtype)], dim=-1)
    decoded = transformed(spans.transform2, transformed(spans.transform1, joined))
    logits = functional.linear(decoded, head.decoder.weight, spans.bias)
    sbo = functional.cross_entropy(
        logits.flatten(0, 2).float(), wanted.targets.flatten(), reduction="sum"
    )
    return (mlm + sbo) / (wanted.labels != -100).sum()
