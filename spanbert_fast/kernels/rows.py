"""What the kernels that work on whole rows share: tiles, layer normalisation, hidden dropout.

A tile is [ROWS, BLOCK]: BLOCK is the row's size rounded up to a power of two. A program walks over
a chunk of consecutive tiles, so that it reads the parameters once and can sum their gradients in
registers; each program writes its sum to a row of its own and the rows are added afterwards. The
chunks depend on the number of rows alone, so the order of every sum is the same on every GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from spanbert_fast.kernels.common import check_dtype, dropout_threshold, philox_lanes


class Tiles(NamedTuple):
    """How rows are laid out over programs."""

    block: int
    """Columns of a tile: a power of two, at least the row's size."""
    rows: int
    """Rows of a tile."""
    num_warps: int
    rows_per_program: int
    """A multiple of `rows`."""
    num_programs: int


def row_tiles(num_rows: int, size: int, *, num_operands: int) -> Tiles:
    """Tiles for rows of `size` elements, of which `num_operands` rows are in registers at a time.

    | elements of a tile | reason |
    | --- | --- |
    | 4,096 with 2 operands | four 16-byte loads of each are in flight in each of 128 threads |
    | 2,048 with more | two would leave the backward of 1,024 columns above 128 registers a thread |

    Rows per program: enough that parameters (read) and partial sums (written) cost under a tenth
    of the rows' own bytes; fewer for small batches, so that 132 processors have work.
    """
    block = max(triton.next_power_of_2(size), 16)
    rows = max((4096 if num_operands <= 2 else 2048) // block, 1)
    # Beyond 8 columns a thread, more warps only add barriers to the sum over a row.
    num_warps = min(max(block // 256, 4 if rows * block >= 1024 else 1), 16)
    rows_per_program = max(rows, 8 if num_rows <= 2048 else 16 if num_rows <= 8192 else 32)
    num_programs = triton.cdiv(num_rows, rows_per_program)
    return Tiles(block, rows, num_warps, rows_per_program, num_programs)


@triton.jit
def gelu(x):
    """GELU, x * Phi(x) with the exact Gaussian distribution function, float32."""
    return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x):
    """Derivative of `gelu`: Phi(x) + x * phi(x)."""
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476) + x * density


@triton.jit
def find_sequences(rows, cu_ptr, num_sequences, search_steps):
    """The sequence of each packed row, and the row's position in it.

    The last sequence that starts at or before a row is the row's own: empty ones before it start
    there too but come earlier.
    """
    low = tl.zeros_like(rows).to(tl.int32)
    high = low + (num_sequences - 1)
    for _ in range(search_steps):
        middle = (low + high + 1) // 2
        is_before = tl.load(cu_ptr + middle) <= rows
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle - 1)
    return low, (rows - tl.load(cu_ptr + low)).to(tl.int32)


@triton.jit
def hidden_keep(
    rows,
    seed_ptr,
    sequence_ids_ptr,
    cu_ptr,
    num_sequences,
    search_steps,
    site,
    threshold,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which elements of a tile dropout keeps: [ROWS, BLOCK]; the law is in `ops.random`.

    One counter serves the eight neighbouring columns that a thread holds of a 16-bit tensor, so
    the lanes need no exchange between threads.
    """
    sequences, positions = find_sequences(rows, cu_ptr, num_sequences, search_steps)
    ids = tl.load(sequence_ids_ptr + sequences).to(tl.int32)
    groups = tl.arange(0, BLOCK // 8)
    lanes = philox_lanes(tl.load(seed_ptr), groups[None, :], positions[:, None], ids[:, None], site)
    return tl.reshape(lanes, (ROWS, BLOCK)) >= threshold.to(tl.uint32) << 16


@triton.jit
def row_statistics(x, mask, eps, SIZE: tl.constexpr):
    """Mean and reciprocal standard deviation of each row of a float32 tile."""
    mean = tl.sum(x, axis=1) / SIZE
    centred = tl.where(mask, x - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, axis=1) / SIZE + eps)


@triton.jit
def layer_norm_gradient(dy, normalised, weight, rstd, SIZE: tl.constexpr):
    """Gradient before the normalisation; zero where `dy` and `normalised` are."""
    scaled = dy * weight[None, :]
    mean_scaled = tl.sum(scaled, axis=1) / SIZE
    mean_product = tl.sum(scaled * normalised, axis=1) / SIZE
    return (scaled - mean_scaled[:, None] - normalised * mean_product[:, None]) * rstd[:, None]


def check_dtypes(name: str, **tensors: Tensor) -> None:
    """Raises where a kernel cannot compute in the dtype of one of the tensors.

    Raises:
        TypeError: A dtype is none that kernels take.
    """
    for argument, tensor in tensors.items():
        check_dtype(f"{name}: {argument}", tensor)


def hidden_threshold(
    dropout_p: float,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> int:
    """The number of 16-bit lanes that mean "dropped"; the law is in `ops.random`.

    Raises:
        ValueError: `dropout_p` is out of range, or what it needs is missing.
    """
    threshold = dropout_threshold(dropout_p)
    if threshold and (seed is None or sequence_ids is None or cu_seqlens is None):
        raise ValueError(
            f"dropout_p is {dropout_p}, so seed, sequence_ids and cu_seqlens have to be given"
        )
    return threshold


def hidden_dropout_arguments(
    threshold: int,
    site: int,
    seed: Tensor | None,
    sequence_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> dict[str, Any]:
    """The arguments of a kernel that calls `hidden_keep`."""
    num_sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return {
        "seed_ptr": seed,
        "sequence_ids_ptr": None if sequence_ids is None else sequence_ids.contiguous(),
        "cu_ptr": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "num_sequences": num_sequences,
        "search_steps": max(num_sequences - 1, 0).bit_length(),
        "site": site,
        "threshold": threshold,
    }
