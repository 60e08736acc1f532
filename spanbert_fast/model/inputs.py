"""The door: Hugging Face's input shapes in, packed rows inside, padded outputs back.

Shapes: B rows as given, S columns, T packed tokens, R spans of a row, K targets of a span, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.model.targets import SpanTargets, masked_targets, span_targets

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


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

    def unpack(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...], zero in the padding."""
        if self.kept is not None:
            empty = rows.new_zeros((self.shape[0] * self.shape[1], *rows.shape[1:]))
            rows = empty.index_copy(0, self.kept, rows)
        return rows.view(*self.shape, *rows.shape[1:])

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


@dataclass(frozen=True)
class _Rows:
    """Where the sequences lie among the given positions."""

    shape: tuple[int, int]
    kept: Tensor | None
    cu_seqlens: Tensor
    position_ids: Tensor
    max_seqlen: int


def pack_inputs(
    config: Config,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    labels: Tensor | None = None,
    sbo_spans: Tensor | None = None,
    sbo_targets: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> PackedInputs:
    """The packed form of a padded batch, or of a row that is packed already.

    Args:
        config: Sets the allowed ranges.
        input_ids: Integer [B, S]; or [1, T] with `cu_seq_lens_q`, or with `position_ids` that
            restart at 0.
        attention_mask: [B, S] of zeros and ones; none for packed rows.
        token_type_ids: Integer [B, S]; zeros by default.
        position_ids: Integer [B, S] or [1, S]; the column by default, in packed rows the place in
            the sequence.
        inputs_embeds: [B, S, D] instead of `input_ids`.
        cu_seq_lens_q: Integer [sequences + 1], boundaries of a packed row.
        max_length_q: Length of the longest sequence of a packed row.
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
    if position_ids is not None:
        position_ids = _integers(
            "position_ids", position_ids, shape, config.max_position_embeddings
        )
    if cu_seq_lens_q is not None:
        rows = _rows_of_boundaries(shape, attention_mask, position_ids, cu_seq_lens_q, max_length_q)
    elif attention_mask is None and position_ids is not None and shape[0] == 1:
        is_start = position_ids[0] == 0
        is_start[:1] = True
        boundaries = torch.cat([is_start.nonzero()[:, 0], position_ids.new_tensor([shape[1]])])
        rows = _rows_of_boundaries(shape, None, position_ids, boundaries, None)
    else:
        rows = _rows_of_padded(shape, attention_mask, position_ids, source.device)
    if rows.max_seqlen > config.max_position_embeddings:
        raise ValueError(
            f"a sequence may have {config.max_position_embeddings} tokens "
            f"(max_position_embeddings), got {rows.max_seqlen}"
        )
    names = _sequence_names(sequence_ids, rows)
    return _assemble(
        config,
        rows,
        names,
        input_ids,
        token_type_ids,
        inputs_embeds,
        labels,
        sbo_spans,
        sbo_targets,
    )


def _sequence_names(sequence_ids: Tensor | None, rows: _Rows) -> Tensor:
    num_sequences = rows.cu_seqlens.shape[0] - 1
    if sequence_ids is None:
        return torch.arange(num_sequences, device=rows.cu_seqlens.device)
    if tuple(sequence_ids.shape) != (num_sequences,) or sequence_ids.dtype not in _INTEGERS:
        raise ValueError(
            f"sequence_ids must be integers of shape ({num_sequences},), got "
            f"{sequence_ids.dtype} {tuple(sequence_ids.shape)}"
        )
    return sequence_ids.long()


def _assemble(
    config: Config,
    rows: _Rows,
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
        ("input_ids", input_ids, config.vocab_size),
        ("token_type_ids", token_type_ids, config.type_vocab_size),
    ):
        if values is None:
            flat[name] = torch.zeros_like(rows.position_ids)
        else:
            flat[name] = _keep(rows, _integers(name, values, rows.shape, size))
    positions, targets = masked_targets(config, labels, rows.shape, rows.kept, device)
    spans = SpanTargets.empty(device)
    if sbo_spans is not None:
        spans = span_targets(config, sbo_spans, sbo_targets, rows.shape, rows.kept, rows.cu_seqlens)
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


def _keep(rows: _Rows, values: Tensor) -> Tensor:
    flat = values.flatten(0, 1)
    return flat if rows.kept is None else flat.index_select(0, rows.kept)


def _integers(name: str, values: Tensor, shape: tuple[int, int], size: int) -> Tensor:
    if values.dtype not in _INTEGERS:
        raise TypeError(f"{name} must hold integers, got {values.dtype}")
    if values.dim() != 2 or values.shape[1] != shape[1] or values.shape[0] not in (1, shape[0]):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(values.shape)}")
    if values.numel():
        low, high = (int(bound) for bound in values.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"{name} must be in [0, {size}), got {low if low < 0 else high}")
    return values.long().expand(shape)


def _rows_of_boundaries(
    shape: tuple[int, int],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    boundaries: Tensor,
    max_length: int | None,
) -> _Rows:
    if attention_mask is not None:
        raise ValueError(
            "attention_mask must be None with cu_seq_lens_q: packed rows have no padding"
        )
    if shape[0] != 1:
        raise ValueError(f"with cu_seq_lens_q the input must have one row, got {shape[0]}")
    if boundaries.dim() != 1 or boundaries.dtype not in _INTEGERS or not len(boundaries):
        raise ValueError(
            f"cu_seq_lens_q must be integers [sequences + 1], got {boundaries.dtype} "
            f"{tuple(boundaries.shape)}"
        )
    lengths = boundaries.diff()
    ends = (int(boundaries[0]), int(boundaries[-1]))
    if ends != (0, shape[1]) or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to {shape[1]}, got {boundaries.tolist()[:16]}"
        )
    longest = int(lengths.max()) if len(lengths) else 0
    if max_length is not None and max_length < longest:
        raise ValueError(f"max_length_q must be at least {longest}, got {max_length}")
    if position_ids is None:
        starts = torch.repeat_interleave(boundaries[:-1], lengths, output_size=shape[1])
        position_ids = torch.arange(shape[1], device=boundaries.device) - starts
    return _Rows(shape, None, boundaries.int(), position_ids.flatten().long(), longest)


def _rows_of_padded(
    shape: tuple[int, int],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    device: torch.device,
) -> _Rows:
    num_rows, length = shape
    columns = torch.arange(length, device=device).expand(shape)
    flat = (columns if position_ids is None else position_ids).flatten()
    if attention_mask is None:
        cu_seqlens = torch.arange(num_rows + 1, device=device, dtype=torch.int32) * length
        return _Rows(shape, None, cu_seqlens, flat, length)
    if tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"attention_mask must have shape {shape}, got {tuple(attention_mask.shape)}: masks "
            "with 3 or 4 dimensions say who sees whom, which this encoder does not support"
        )
    is_kept = attention_mask != 0
    if not bool((is_kept == attention_mask).all()):
        raise ValueError("attention_mask must hold zeros and ones")
    lengths = is_kept.sum(dim=1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    kept = is_kept.flatten().nonzero()[:, 0]
    # S, not the longest length: attention probabilities come back by column.
    return _Rows(shape, kept, cu_seqlens, flat.index_select(0, kept), length)
