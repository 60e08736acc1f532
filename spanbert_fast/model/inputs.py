"""The door: Hugging Face's input shapes in, packed rows inside, padded outputs back.

Shapes: B rows as given, S columns, T packed tokens, R spans of a row, K targets of a span, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch
from spanbert_fast.model.rows import (
    Boundaries,
    Rows,
    Sizes,
    checked_integers,
    find_rows,
    sequence_names,
)
from spanbert_fast.model.targets import SpanTargets, masked_targets, span_targets


@dataclass(frozen=True)
class PackedInputs:
    """A batch without its padding, and the way back."""

    batch: PackedBatch
    shape: tuple[int, int]
    """B and S as given."""
    kept: Tensor | None
    """int64 [T], flat position of each packed token in [B, S]; None: all of them."""
    inputs_embeds: Tensor | None
    """[T, D]."""

    @property
    def has_one_sequence_per_row(self) -> bool:
        """Whether the sequences are the rows as given, with or without padding."""
        return self.batch.cu_seqlens.shape[0] - 1 == self.shape[0]

    def unpack(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...], zero in the padding."""
        if self.kept is not None:
            empty = rows.new_zeros((self.shape[0] * self.shape[1], *rows.shape[1:]))
            rows = empty.index_copy(0, self.kept, rows)
        return rows.view(*self.shape, *rows.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.kept is None else flat.index_select(0, self.kept)

    def first_rows(self, rows: Tensor) -> Tensor:
        """[T, D] -> the first token of each sequence [sequences, D], zero where there is none."""
        starts, ends = self.batch.cu_seqlens[:-1].long(), self.batch.cu_seqlens[1:]
        if not rows.shape[0]:
            return rows.new_zeros((len(starts), *rows.shape[1:]))
        first = rows.index_select(0, starts.clamp(max=rows.shape[0] - 1))
        return first * (starts < ends)[:, None]

    def unpack_attention(self, probabilities: Tensor) -> Tensor:
        """[sequences, H, S, S] by place among the kept tokens -> the same by column."""
        if self.kept is None:
            return probabilities
        is_kept = torch.zeros(self.shape[0] * self.shape[1], device=probabilities.device)
        is_kept = is_kept.index_fill(0, self.kept, 1.0).view(self.shape)
        # Kept columns first, in order; then the place of each column among them.
        place = torch.argsort(is_kept, dim=1, descending=True, stable=True).argsort(dim=1)
        by_query = probabilities.gather(2, place[:, None, :, None].expand_as(probabilities))
        return by_query.gather(3, place[:, None, None, :].expand_as(probabilities))


def pack_inputs(
    sizes: Sizes,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    boundaries: Boundaries | None = None,
    labels: Tensor | None = None,
    sbo_spans: Tensor | None = None,
    sbo_targets: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> PackedInputs:
    """The packed form of a padded batch, or of a row that is packed already.

    Args:
        sizes: Sets the allowed ranges.
        input_ids: Integer [B, S]; with `boundaries`, or with `position_ids` that restart, a row
            may hold several sequences.
        attention_mask: [B, S] of zeros and ones; none for packed rows.
        token_type_ids: Integer [B, S]; zeros by default.
        position_ids: Integer [B, S] or [1, S]; the column by default, in packed rows the place in
            the sequence.
        inputs_embeds: [B, S, D] instead of `input_ids`.
        boundaries: Where the sequences of packed rows end.
        labels: int64 [B, S]; -100 = no label.
        sbo_spans: int64 [B, R, 2]; the columns left and right of each span, -1 = padding.
        sbo_targets: int64 [B, R, up to K]; original ids of the span, -100 = padding. Without them
            each span asks for as many predictions as it has tokens.
        sequence_ids: int64 [sequences]; the index by default.

    Raises:
        ValueError: A shape or a value does not fit; named with what is allowed.
        TypeError: A tensor of ids is not of integers.
    """
    source = inputs_embeds if input_ids is None else input_ids
    if source is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    wanted = 2 if source is input_ids else 3
    if source.dim() != wanted:
        raise ValueError(f"inputs must have {wanted} dimensions, got shape {tuple(source.shape)}")
    shape = (source.shape[0], source.shape[1])
    rows = find_rows(
        sizes, shape, source.device, attention_mask, position_ids, boundaries or Boundaries()
    )
    names = sequence_names(sequence_ids, rows)
    return _assemble(
        sizes,
        rows,
        names,
        input_ids,
        token_type_ids,
        inputs_embeds,
        labels,
        sbo_spans,
        sbo_targets,
    )


def _assemble(
    sizes: Sizes,
    rows: Rows,
    sequence_ids: Tensor,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    labels: Tensor | None,
    sbo_spans: Tensor | None,
    sbo_targets: Tensor | None,
) -> PackedInputs:
    flat: dict[str, Tensor] = {}
    device = rows.position_ids.device
    for name, values, size in (
        ("input_ids", input_ids, sizes.vocab_size),
        ("token_type_ids", token_type_ids, sizes.type_vocab_size),
    ):
        if values is None:
            flat[name] = torch.zeros_like(rows.position_ids)
        else:
            flat[name] = _keep(rows, checked_integers(name, values, rows.shape, size))
    positions, targets = masked_targets(sizes, labels, rows.shape, rows.kept, device)
    spans = SpanTargets.empty(device)
    if sbo_spans is not None:
        spans = span_targets(sizes, sbo_spans, sbo_targets, rows.shape, rows.kept, rows.cu_seqlens)
    elif sbo_targets is not None:
        raise ValueError("sbo_targets need sbo_spans")
    batch = PackedBatch(
        input_ids=flat["input_ids"],
        position_ids=rows.position_ids,
        token_type_ids=flat["token_type_ids"],
        cu_seqlens=rows.cu_seqlens,
        max_seqlen=rows.max_seqlen,
        sequence_ids=sequence_ids,
        mlm_positions=positions,
        mlm_labels=targets,
        sbo_left=spans.left,
        sbo_right=spans.right,
        sbo_cu=spans.cu,
        sbo_targets=spans.targets,
    )
    embeds = None if inputs_embeds is None else _keep(rows, inputs_embeds)
    return PackedInputs(batch, rows.shape, rows.kept, embeds)


def _keep(rows: Rows, values: Tensor) -> Tensor:
    flat = values.flatten(0, 1)
    return flat if rows.kept is None else flat.index_select(0, rows.kept)
