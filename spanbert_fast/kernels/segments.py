"""Sums of rows that share a key, without atomics: the backward of every gather.

The keys are sorted, so equal ones stand together, and the sorted rows are cut into windows of fixed
size. A first kernel sums each key's rows inside each window; a key that lies inside one window is
then done. A second kernel adds the pieces of keys that reach over windows, in the order of the
windows. The order of every sum follows from the keys alone, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spanbert_fast.kernels.common import COUNTS, launch_on

# A window is the contraction of one small product, whose other operand says which keys are equal:
# 32 is the least that fills two steps of a tensor core and keeps that matrix in few registers. 64
# columns are two whole sectors of each row; with 128 a float32 product takes 212 registers.
_WINDOW = 32
_COLUMNS = 64
# Pieces that are added at a time; only keys with more than 32 rows have several.
_PIECES = 8


@triton.jit(do_not_specialize=COUNTS)
def _sum_windows(
    rows_ptr,
    keys_ptr,
    order_ptr,
    out_ptr,
    head_ptr,
    tail_ptr,
    num_rows,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums inside windows: to the result, or to the window's head or tail piece.

    A head piece began in an earlier window, a tail piece began in this one and goes on.
    """
    window = tl.program_id(0).to(tl.int64)
    places = window * WINDOW + tl.arange(0, WINDOW)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = places < num_rows
    is_column = columns < SIZE
    keys = tl.load(keys_ptr + places, mask=is_row, other=-1)
    before = tl.load(keys_ptr + places - 1, mask=is_row & (places > 0), other=-1)
    next_place = (window + 1) * WINDOW
    next_key = tl.load(keys_ptr + next_place, mask=next_place < num_rows, other=-2)

    sources = tl.load(order_ptr + places, mask=is_row, other=0)
    mask = is_row[:, None] & is_column[None, :]
    rows = tl.load(rows_ptr + sources[:, None] * SIZE + columns[None, :], mask=mask, other=0.0)
    equal = (keys[:, None] == keys[None, :]).to(rows.dtype)
    sums = tl.dot(equal, rows, input_precision="ieee")

    begins = is_row & (keys != before)
    goes_on = keys == next_key
    done = (begins & ~goes_on)[:, None] & is_column[None, :]
    out = out_ptr + keys[:, None] * SIZE + columns[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=done)
    # One row of the window is its head and one its tail at most, so no two rows meet here.
    piece = tl.zeros_like(keys)[:, None] + window * SIZE + columns[None, :]
    is_head = is_row & (keys == before) & (places == window * WINDOW)
    tl.store(head_ptr + piece, sums, mask=is_head[:, None] & is_column[None, :])
    tl.store(tail_ptr + piece, sums, mask=(begins & goes_on)[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=COUNTS)
def _join_windows(
    keys_ptr,
    out_ptr,
    head_ptr,
    tail_ptr,
    num_rows,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Adds to a window's tail piece the head pieces of the windows it goes on in."""
    window = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < SIZE
    last = (window + 1) * WINDOW - 1
    key = tl.load(keys_ptr + last, mask=last < num_rows, other=-1)
    next_key = tl.load(keys_ptr + last + 1, mask=last + 1 < num_rows, other=-2)
    before = tl.load(keys_ptr + window * WINDOW - 1, mask=window > 0, other=-1)
    if (key == next_key) & (key != before):
        total = tl.load(tail_ptr + window * SIZE + columns, mask=is_column, other=0.0)
        start = window + 1
        goes_on = True
        while goes_on:
            windows = start + tl.arange(0, PIECES)
            places = windows * WINDOW
            keys = tl.load(keys_ptr + places, mask=places < num_rows, other=-2)
            mask = (keys == key)[:, None] & is_column[None, :]
            pieces = head_ptr + windows[:, None] * SIZE + columns[None, :]
            total += tl.sum(tl.load(pieces, mask=mask, other=0.0), axis=0)
            start += PIECES
            goes_on = tl.min(keys) == key
        out = out_ptr + key * SIZE + columns
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=is_column)


def segment_sum(rows: Tensor, keys: Tensor, num_segments: int, dtype: torch.dtype) -> Tensor:
    """Sum of the rows of each key: [num_segments, D], zero for keys without a row.

    Args:
        rows: [N, D]; summed in float32.
        keys: int64 [N], each below `num_segments`.
        num_segments: How many keys there are.
        dtype: Of the result.
    """
    num_rows, size = rows.shape
    out = torch.zeros((num_segments, size), dtype=dtype, device=rows.device)
    sorted_keys, order = torch.sort(keys, stable=True)
    num_windows = triton.cdiv(num_rows, _WINDOW)
    head = torch.empty((num_windows, size), dtype=torch.float32, device=rows.device)
    tail = torch.empty_like(head)
    columns = min(_COLUMNS, max(triton.next_power_of_2(size), 16))
    grid = (num_windows, triton.cdiv(size, columns))
    with launch_on(rows):
        _sum_windows[grid](
            rows.contiguous(),
            sorted_keys,
            order,
            out,
            head,
            tail,
            num_rows=num_rows,
            SIZE=size,
            WINDOW=_WINDOW,
            COLUMNS=columns,
            num_warps=4,
            num_stages=1,
            enable_fp_fusion=True,
        )
        _join_windows[grid](
            sorted_keys,
            out,
            head,
            tail,
            num_rows=num_rows,
            SIZE=size,
            WINDOW=_WINDOW,
            COLUMNS=columns,
            PIECES=_PIECES,
            num_warps=4,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return out
