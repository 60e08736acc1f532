"""A large batch on a CPU, encoded part by part where no gradient is wanted.

What a layer writes for thousands of rows fills fresh pages each time, which cost more than the
arithmetic on them; a few megabytes are used again and again. Sequences of one length lie together
in a part, so that attention takes them at once. Shapes: T packed tokens, B sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch

PART_BYTES = 8 << 20
"""Of the widest activation of a part, in float32: 2 to 8 MiB measured alike, 16 and more slower."""


def split_by_length(batch: PackedBatch, most: int) -> Iterator[tuple[Tensor, PackedBatch]]:
    """The sequences from short to long in parts of at most `most` tokens, or of one sequence.

    Args:
        batch: On the CPU.
        most: Tokens of a part.

    Yields:
        Packed rows of `batch`, int64 [tokens of the part], and the part, without targets.
    """
    lengths = batch.cu_seqlens.diff().long()
    order = lengths.sort(stable=True).indices
    for chosen in torch.split(order, _sizes(lengths.index_select(0, order).tolist(), most)):
        own = lengths.index_select(0, chosen)
        cu_seqlens = torch.nn.functional.pad(own.cumsum(0), (1, 0))
        shifts = batch.cu_seqlens.index_select(0, chosen) - cu_seqlens[:-1]
        rows = torch.repeat_interleave(shifts, own)
        rows += torch.arange(rows.shape[0])
        none = rows[:0]
        yield (
            rows,
            dataclasses.replace(
                batch,
                input_ids=batch.input_ids.index_select(0, rows),
                position_ids=batch.position_ids.index_select(0, rows),
                token_type_ids=batch.token_type_ids.index_select(0, rows),
                cu_seqlens=cu_seqlens.int(),
                max_seqlen=int(own.max()),
                sequence_ids=batch.sequence_ids.index_select(0, chosen),
                mlm_positions=none,
                mlm_labels=none,
                sbo_left=none,
                sbo_right=none,
                sbo_cu=batch.sbo_cu[:1],
                sbo_targets=none,
                row_weights=None,
            ),
        )


def _sizes(lengths: Sequence[int], most: int) -> list[int]:
    """How many sequences each part takes, one after the other."""
    sizes, tokens = [0], 0
    for length in lengths:
        if sizes[-1] and tokens + length > most:
            sizes.append(0)
            tokens = 0
        sizes[-1] += 1
        tokens += length
    return sizes
