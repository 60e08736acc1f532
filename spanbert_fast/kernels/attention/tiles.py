"""Device functions that the three attention kernels share: where a program works, what it keeps.

The order of keys inside a tile. One counter of the generator serves eight neighbouring keys of a
query, but a tensor core leaves a thread two neighbouring columns of every eight: drawn in that
order, each word would have to travel between threads. A sum over keys does not mind their order, so
under dropout the columns of a tile stand for keys in another order, in which the eight keys of a
counter lie in one thread: the column bits (word, thread, half) of a block of 8 * SPREAD are the key
bits (thread, word, half). Only the addresses of rows of K and V change. SPREAD is the number of
threads that share neighbouring columns: 4 for mma.sync and wgmma; with tcgen05 a thread owns a run
of columns, SPREAD is 1 and the order is the natural one.
"""

import triton
import triton.language as tl

from spanbert_fast.kernels.common import philox4x32


@triton.jit
def place(cu_ptr, num_heads, num_blocks):
    """Block, head and sequence of this program; first token and length of the sequence.

    Blocks of one head of one sequence are neighbours, so that they find its keys in the cache.
    """
    program = tl.program_id(0)
    block = program % num_blocks
    plane = program // num_blocks
    sequence = plane // num_heads
    start = tl.load(cu_ptr + sequence)
    length = tl.load(cu_ptr + sequence + 1) - start
    return block, plane % num_heads, sequence, start.to(tl.int64), length


@triton.jit
def keys_of_columns(BLOCK_K: tl.constexpr, SPREAD: tl.constexpr, DROPOUT: tl.constexpr):
    """The key, counted from the tile's first, of each column of a tile: int32 [BLOCK_K]."""
    columns = tl.arange(0, BLOCK_K)
    if DROPOUT and SPREAD > 1:
        owner = columns & (2 * SPREAD - 2)
        word = columns & (6 * SPREAD)
        columns = (columns & (1 - 8 * SPREAD)) | (owner * 4) | (word // SPREAD)
    return columns


@triton.jit
def plane_counter(ids_ptr, sequence, head, num_heads):
    """Third counter word of a head of a sequence: (id * H + head) mod 2^32."""
    return (tl.load(ids_ptr + sequence) * num_heads + head).to(tl.uint32)


@triton.jit
def keep_tile(
    seed,
    first_key,
    queries,
    plane,
    site,
    threshold,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Which scores of a tile dropout keeps, in the order of `keys_of_columns`.

    Args:
        seed: int64 scalar.
        first_key: First key of the tile, a multiple of 8 * SPREAD.
        queries: int32 [BLOCK_Q], places in the sequence.
        plane: See `plane_counter`.
        site: Which dropout of the model this is.
        threshold: Of 65,536 lanes, so many mean "dropped".
        BLOCK_Q: Queries of the tile.
        BLOCK_K: Keys of the tile, a multiple of 8 * SPREAD.
        SPREAD: Threads that share neighbouring columns; see the top of this file.

    Returns:
        bool [BLOCK_Q, BLOCK_K].
    """
    # Axes: query, block of 32 keys, word, thread, half. No `tl.join` and no `tl.permute`: Triton
    # takes a join before a product for unpacked 4-bit numbers and lays its operand out for those.
    counters = (first_key >> 3) + tl.reshape(
        tl.arange(0, BLOCK_K // 8), (1, BLOCK_K // (8 * SPREAD), 1, SPREAD, 1)
    )
    rows = tl.reshape(queries, (BLOCK_Q, 1, 1, 1, 1))
    word0, word1, word2, word3 = philox4x32(seed, counters, rows, plane, site)
    number = tl.reshape(tl.arange(0, 4), (1, 1, 4, 1, 1))
    word = tl.where(
        number < 2, tl.where(number == 0, word0, word1), tl.where(number == 2, word2, word3)
    )
    half = tl.reshape(tl.arange(0, 2), (1, 1, 1, 1, 2))
    lanes = tl.reshape(tl.where(half == 0, word << 16, word), (BLOCK_Q, BLOCK_K))
    return lanes >= threshold.to(tl.uint32) << 16


@triton.jit
def dropped_value(threshold, SPREAD: tl.constexpr):
    """A float32 zero: what a weight that is not kept becomes.

    With tcgen05 one that the compiler cannot know. A zero that it knows it moves behind the
    rounding to 16 bits, and then each half of a rounded pair is selected and put back in place.
    """
    zero = 0.0
    if SPREAD == 1:
        zero = (threshold >> 16).to(tl.float32)
    return zero


@triton.jit
def in_window(queries, keys, window):
    """Which keys are at most `window` away: bool, in the shape the first two broadcast to."""
    # One comparison for both sides: a negative number is a large unsigned one.
    return (queries + window - keys).to(tl.uint32) <= 2 * window


@triton.jit
def visible_tile(queries, keys, length, window, HAS_WINDOW: tl.constexpr):
    """Which keys a query sees: bool, in the shape that `queries` and `keys` broadcast to."""
    visible = keys < length
    if HAS_WINDOW:
        visible = visible & in_window(queries, keys, window)
    return visible


@triton.jit
def seen_range(
    first, length, window, BLOCK: tl.constexpr, STEP: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """First and end of what the rows `first` to `first + BLOCK` see; the first in steps of STEP."""
    begin = 0
    end = length
    if HAS_WINDOW:
        begin = tl.maximum(first - window, 0) // STEP * STEP
        end = tl.minimum(first + (BLOCK - 1) + window + 1, length)
    return begin, end
