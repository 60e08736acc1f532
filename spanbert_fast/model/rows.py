"""Where the sequences lie in what is given: padded rows, or rows that hold several sequences.

Shapes: B rows as given, S columns, T packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spanbert_fast.model.positions import LONGER_TEXTS

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Sizes(Protocol):
    """The ranges of ids; a `Config` has them."""

    @property
    def vocab_size(self) -> int:
        """Ids of tokens are below it."""

    @property
    def type_vocab_size(self) -> int:
        """Ids of token types are below it."""

    @property
    def max_position_embeddings(self) -> int:
        """Ids of positions are below it."""

    @property
    def max_span_targets(self) -> int:
        """Most targets of a span."""


@dataclass(frozen=True)
class Rows:
    """Where the sequences lie among the given positions."""

    shape: tuple[int, int]
    """B and S."""
    kept: Tensor | None
    """int64 [T], flat position of each packed token in [B, S]; None: all of them."""
    cu_seqlens: Tensor
    """int32 [sequences + 1]."""
    position_ids: Tensor
    """int64 [T]."""
    max_seqlen: int
    """Length of the longest sequence, or S for padded rows."""


@dataclass(frozen=True)
class Boundaries:
    """What Hugging Face's padding-free inputs say about where sequences end."""

    cu_seq_lens_q: Tensor | None = None
    """Integer [sequences + 1]."""
    cu_seq_lens_k: Tensor | None = None
    """Those of the keys; the same ones."""
    max_length_q: int | None = None
    """Length of the longest sequence."""
    max_length_k: int | None = None
    """The same length."""
    seq_idx: Tensor | None = None
    """Integer [B, S]: which sequence of its row a token belongs to."""

    def check_keys(self) -> None:
        """Raises ValueError if keys are laid out in another way than queries."""
        queries, keys = self.cu_seq_lens_q, self.cu_seq_lens_k
        if keys is not None and (queries is None or queries.tolist() != keys.tolist()):
            raise ValueError(f"cu_seq_lens_k must equal cu_seq_lens_q ({queries}), got {keys}")
        if self.max_length_k is not None and self.max_length_k != self.max_length_q:
            raise ValueError(
                f"max_length_k must equal max_length_q ({self.max_length_q}), "
                f"got {self.max_length_k}"
            )


def find_rows(
    sizes: Sizes,
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    boundaries: Boundaries,
) -> Rows:
    """The sequences of a batch.

    Without a mask, boundaries are taken from `cu_seq_lens_q`, else from `seq_idx`, else from
    positions that restart.

    Args:
        sizes: Sets the allowed ranges.
        shape: B and S.
        device: Where the inputs lie.
        attention_mask: [B, S] of zeros and ones; None if rows have no padding.
        position_ids: Integer [B, S] or [1, S].
        boundaries: What else says where sequences end.

    Raises:
        ValueError: A shape or a value does not fit; named with what is allowed.
        TypeError: A tensor of ids is not of integers.
    """
    boundaries.check_keys()
    if position_ids is not None:
        size = sizes.max_position_embeddings
        position_ids = checked_integers("position_ids", position_ids, shape, size)
    seq_idx = boundaries.seq_idx
    given = "cu_seq_lens_q" if boundaries.cu_seq_lens_q is not None else "seq_idx"
    if attention_mask is not None and (boundaries.cu_seq_lens_q is not None or seq_idx is not None):
        raise ValueError(f"attention_mask must be None with {given}: packed rows have no padding")
    if boundaries.cu_seq_lens_q is not None:
        rows = _rows_of_boundaries(
            shape, position_ids, boundaries.cu_seq_lens_q.to(device), boundaries.max_length_q
        )
        if seq_idx is not None:
            _check_agreement(rows.cu_seqlens, _starts_of_indices(seq_idx, shape))
    elif seq_idx is not None:
        rows = _rows_of_starts(shape, position_ids, _starts_of_indices(seq_idx, shape))
    elif attention_mask is None and position_ids is not None:
        rows = _rows_of_starts(shape, position_ids, _starts_of_positions(position_ids))
    else:
        rows = _rows_of_padded(shape, attention_mask, position_ids, device)
    if rows.max_seqlen > sizes.max_position_embeddings:
        raise ValueError(
            f"a sequence may have {sizes.max_position_embeddings} tokens "
            f"(max_position_embeddings), got {rows.max_seqlen}. {LONGER_TEXTS}"
        )
    return rows


def checked_integers(
    name: str, values: Tensor, shape: tuple[int, int], size: int | None = None
) -> Tensor:
    """`values` as int64 [B, S].

    Args:
        name: What they are called in an error.
        values: Integer [B, S] or [1, S].
        shape: B and S.
        size: They have to be in [0, size); None: anything.

    Raises:
        ValueError: A shape or a value does not fit.
        TypeError: They are no integers.
    """
    if values.dtype not in _INTEGERS:
        raise TypeError(f"{name} must hold integers, got {values.dtype}")
    if values.dim() != 2 or values.shape[1] != shape[1] or values.shape[0] not in (1, shape[0]):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(values.shape)}")
    if size is not None and values.numel():
        low, high = (int(bound) for bound in values.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"{name} must be in [0, {size}), got {low if low < 0 else high}")
    return values.long().expand(shape)


def sequence_names(sequence_ids: Tensor | None, rows: Rows) -> Tensor:
    """int64 [sequences], the index by default.

    Raises:
        ValueError: There is not one integer for each sequence.
    """
    num_sequences = rows.cu_seqlens.shape[0] - 1
    if sequence_ids is None:
        return torch.arange(num_sequences, device=rows.cu_seqlens.device)
    if tuple(sequence_ids.shape) != (num_sequences,) or sequence_ids.dtype not in _INTEGERS:
        raise ValueError(
            f"sequence_ids must be integers of shape ({num_sequences},), got "
            f"{sequence_ids.dtype} {tuple(sequence_ids.shape)}"
        )
    return sequence_ids.long()


def _starts_of_positions(position_ids: Tensor) -> Tensor:
    """Bool [B, S]: where positions restart, at 0 or at the value that their row begins with."""
    before, after = position_ids[:, :-1], position_ids[:, 1:]
    rises = after == before + 1
    returns = (after == 0) | (after == position_ids[:, :1])
    wrong = ~(rises | returns)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        step = position_ids[row, column : column + 2].tolist()
        raise ValueError(
            "without attention_mask, position_ids must rise by 1 or return to 0 or to the first "
            f"position of their row, where the next sequence begins; got {step[1]} after "
            f"{step[0]} in row {row}. An attention_mask of ones makes a row one sequence"
        )
    return torch.nn.functional.pad(returns & ~rises, (1, 0), value=True)[:, : position_ids.shape[1]]


def _starts_of_indices(seq_idx: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bool [B, S]: where the index of the sequence changes."""
    steps = checked_integers("seq_idx", seq_idx, shape).diff(dim=1)
    if bool((steps < 0).any()):
        raise ValueError(f"seq_idx must not fall inside a row, got {seq_idx.tolist()[0][:16]}")
    return torch.nn.functional.pad(steps != 0, (1, 0), value=True)[:, : shape[1]]


def _check_agreement(cu_seqlens: Tensor, is_start: Tensor) -> None:
    starts = is_start.flatten().nonzero()[:, 0].tolist()
    ends = [*starts, is_start.numel()]
    if ends != sorted(set(cu_seqlens.tolist())):
        raise ValueError(
            f"seq_idx must change at the boundaries of cu_seq_lens_q {cu_seqlens.tolist()[:16]}, "
            f"got changes at {ends[:16]}"
        )


def _rows_of_starts(shape: tuple[int, int], position_ids: Tensor | None, is_start: Tensor) -> Rows:
    starts = is_start.flatten().nonzero()[:, 0]
    boundaries = torch.cat([starts, starts.new_tensor([is_start.numel()])])
    return _rows_between(shape, position_ids, boundaries)


def _rows_of_boundaries(
    shape: tuple[int, int],
    position_ids: Tensor | None,
    boundaries: Tensor,
    max_length: int | None,
) -> Rows:
    if shape[0] != 1:
        raise ValueError(f"with cu_seq_lens_q the input must have one row, got {shape[0]}")
    if boundaries.dim() != 1 or boundaries.dtype not in _INTEGERS or not len(boundaries):
        raise ValueError(
            f"cu_seq_lens_q must be integers [sequences + 1], got {boundaries.dtype} "
            f"{tuple(boundaries.shape)}"
        )
    boundaries = boundaries.long()
    ends = (int(boundaries[0]), int(boundaries[-1]))
    if ends != (0, shape[1]) or bool((boundaries.diff() < 0).any()):
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to {shape[1]}, got {boundaries.tolist()[:16]}"
        )
    rows = _rows_between(shape, position_ids, boundaries)
    if max_length is not None and max_length < rows.max_seqlen:
        raise ValueError(f"max_length_q must be at least {rows.max_seqlen}, got {max_length}")
    return rows


def _rows_between(shape: tuple[int, int], position_ids: Tensor | None, boundaries: Tensor) -> Rows:
    lengths = boundaries.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    if position_ids is None:
        num_tokens = shape[0] * shape[1]
        starts = torch.repeat_interleave(boundaries[:-1], lengths, output_size=num_tokens)
        position_ids = torch.arange(num_tokens, device=boundaries.device) - starts
    return Rows(shape, None, boundaries.int(), position_ids.flatten(), longest)


def _rows_of_padded(
    shape: tuple[int, int],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    device: torch.device,
) -> Rows:
    num_rows, length = shape
    columns = torch.arange(length, device=device).expand(shape)
    flat = (columns if position_ids is None else position_ids).flatten()
    if attention_mask is None:
        cu_seqlens = torch.arange(num_rows + 1, device=device, dtype=torch.int32) * length
        return Rows(shape, None, cu_seqlens, flat, length)
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
    return Rows(shape, kept, cu_seqlens, flat.index_select(0, kept), length)
