"""Attention written out as products of whole planes: one plane is one head of one sequence.

A few planes at a time, so that their scores stay in the cache; under a window, a few queries of
them at a time against the keys in their reach, so that time and memory are linear in the length.
Shapes: n sequences of length L, H heads, K head size; a plane is [L, K].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spanbert_fast.ops.precision import wide_dtype
from spanbert_fast.ops.random import LANES, plane_keep_mask

# Scores of one block of planes. Three such buffers live at a time, and should stay in the cache.
_BLOCK_BYTES = 1 << 20
# Queries of a tile under a window, a multiple of LANES. More of them waste more keys (a tile has
# this many beyond twice the window), fewer make the products too small.
_TILE_QUERIES = 128


class Dropout(NamedTuple):
    """Where the dropout mask comes from."""

    threshold: int
    """Of 65,536 lanes, so many mean "dropped"; not 0."""
    seed: Tensor
    """int64 scalar."""
    sequence_ids: Tensor
    """int64 [B]."""
    site: int

    @property
    def scale(self) -> float:
        """Factor of what is kept."""
        return 65536 / (65536 - self.threshold)


class _Tile(NamedTuple):
    """Neighbouring queries of a plane, and the keys that some of them see."""

    queries: slice
    keys: slice
    bias: Tensor | None
    """[queries, keys], 0 where a key is in the window of a query, else -inf; None: all are."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and of keys."""
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start


def forward_planes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    dropout: Dropout | None,
    names: list[int],
) -> tuple[Tensor, Tensor]:
    """Output [n, H, L, K] and log-sum-exp [n, H, L] of planes [n, H, L, K]."""
    shape, (num_heads, length) = query.shape, query.shape[1:3]
    query, key, value = (rows.flatten(0, 1) for rows in (query, key, value))
    output = torch.empty_like(query)
    lse = query.new_empty(query.shape[:2], dtype=wide_dtype(query.dtype))
    tiles = _tiles(length, window, lse)
    blocks = _blocks(len(query), num_heads, tiles, lse.element_size())
    buffers = _Buffers(2, blocks, tiles, lse)
    factor = dropout.scale if dropout else 1.0
    for block in blocks:
        for tile in tiles:
            scores, weights = buffers.part(block, tile)
            rows, columns = (block, tile.queries), (block, tile.keys)
            _softmax(query[rows], key[columns], scale, tile.bias, scores, out=weights)
            # The largest score and its probability give the sum without a second exponential.
            lse[rows] = scores.amax(-1) - weights.amax(-1).log()
            if dropout is not None:
                weights.mul_(_keep(dropout, names[block], tile))
            narrow, out = weights.to(value.dtype), output[rows]
            torch.baddbmm(out, narrow, value[columns], beta=0, alpha=factor, out=out)
    return output.view(shape), lse.view(shape[:3])


def backward_planes(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    scale: float,
    window: int | None,
    dropout: Dropout | None,
    names: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of planes [n, H, L, K]; `delta` [n, H, L] is sum(output * its gradient)."""
    shape, dtype, (num_heads, length) = query.shape, query.dtype, query.shape[1:3]
    inputs = (grad_output, query, key, value)
    grad_output, query, key, value = (rows.flatten(0, 1) for rows in inputs)
    delta = delta.flatten(0, 1)[..., None]
    tiles = _tiles(length, window, delta)
    blocks = _blocks(len(query), num_heads, tiles, delta.element_size())
    buffers = _Buffers(3, blocks, tiles, delta)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (_Total(rows, len(tiles)) for rows in (key, value))
    factor = dropout.scale if dropout else 1.0
    for block in blocks:
        for tile in tiles:
            scores, weights, slope = buffers.part(block, tile)
            rows, columns = (block, tile.queries), (block, tile.keys)
            above, q, k = grad_output[rows], query[rows], key[columns]
            _softmax(q, k, scale, tile.bias, scores, out=weights)
            wide = (above.to(slope.dtype), value[columns].to(slope.dtype).transpose(1, 2))
            torch.baddbmm(slope, *wide, beta=0, alpha=factor, out=slope)
            applied = weights
            if dropout is not None:
                keep = _keep(dropout, names[block], tile)
                applied = torch.mul(weights, keep, out=scores)
                slope.mul_(keep)
            grad_value.add(columns, applied.to(dtype), above, factor)
            narrow = slope.sub_(delta[rows]).mul_(weights).mul_(scale).to(dtype)
            torch.bmm(narrow, k, out=grad_query[rows])
            grad_key.add(columns, narrow, q, 1.0)
    grads = (grad_query, grad_key.narrow(), grad_value.narrow())
    return grads[0].view(shape), grads[1].view(shape), grads[2].view(shape)


def _tiles(length: int, window: int | None, like: Tensor) -> list[_Tile]:
    """Tiles that hold every query once; one tile if every query sees every key."""
    if window is None or window >= length - 1:
        everything = slice(0, length)
        return [_Tile(everything, everything, None)]
    # Random bits begin at a multiple of LANES; so do tiles, whose last needless keys are masked.
    before = -(-window // LANES) * LANES
    queries = torch.arange(min(_TILE_QUERIES, length), device=like.device)
    keys = torch.arange(-before, len(queries) + window, device=like.device)
    far = (queries[:, None] - keys).abs() > window
    bias = like.new_zeros(far.shape).masked_fill_(far, float("-inf"))
    tiles = []
    for start in range(0, length, len(queries)):
        stop = min(start + len(queries), length)
        seen = slice(max(0, start - before), min(length, stop + window))
        columns = slice(seen.start - start + before, seen.stop - start + before)
        tiles.append(_Tile(slice(start, stop), seen, bias[: stop - start, columns]))
    return tiles


def _area(tiles: list[_Tile]) -> int:
    """Scores of the largest tile of a plane."""
    return max(tile.shape[0] * tile.shape[1] for tile in tiles)


def _blocks(num_planes: int, num_heads: int, tiles: list[_Tile], itemsize: int) -> list[slice]:
    """Planes whose scores fit the budget: whole sequences, or else some heads of one."""
    step = max(1, _BLOCK_BYTES // (_area(tiles) * itemsize))
    step = step // num_heads * num_heads if step >= num_heads else step
    starts = range(0, num_planes, step)
    return [slice(start, min(start + step, num_planes)) for start in starts]


def backward_bytes(
    planes: tuple[int, int, int, int], dtype: torch.dtype, window: int | None, has_dropout: bool
) -> int:
    """Bytes that `backward_planes` holds at its peak beside its arguments, results included.

    Args:
        planes: n, H, L and K.
        dtype: Of the query.
        window: See `forward_planes`.
        has_dropout: See `forward_planes`.
    """
    size, wide = dtype.itemsize, wide_dtype(dtype)
    num_sequences, num_heads, length, head_size = planes
    tiles = _tiles(length, window, torch.empty(0, device="meta"))
    block = _blocks(num_sequences * num_heads, num_heads, tiles, wide.itemsize)[0].stop
    scores = block * _area(tiles)
    elements = num_sequences * num_heads * length * head_size
    # Planes of one sequence are views of its rows; those of several are copies.
    rows = (3 + (4 if num_sequences > 1 else 0)) * size
    if len(tiles) > 1:
        rows += 2 * (wide.itemsize if wide is not dtype else 0)
    narrow = 2 * size if wide is not dtype else 0
    # The keep mask of one tile and of the next.
    masks = 2 if has_dropout else 0
    total: int = elements * rows + scores * (3 * wide.itemsize + narrow + masks)
    return total


class _Buffers:
    """Memory for the scores of one block, used again by the next: fresh pages cost more to get."""

    def __init__(self, number: int, blocks: list[slice], tiles: list[_Tile], like: Tensor) -> None:
        self.memory = like.new_empty((number, blocks[0].stop * _area(tiles)))

    def part(self, block: slice, tile: _Tile) -> Iterator[Tensor]:
        """Each buffer, as the scores of one tile of the planes of `block`."""
        shape = (block.stop - block.start, *tile.shape)
        size = shape[0] * shape[1] * shape[2]
        return (memory[:size].view(shape) for memory in self.memory)


class _Total:
    """A gradient to which tiles that share keys add, one after another; wide, if there are such."""

    def __init__(self, like: Tensor, num_tiles: int) -> None:
        self.dtype, self.is_shared = like.dtype, num_tiles > 1
        if self.is_shared:
            self.rows = torch.zeros_like(like, dtype=wide_dtype(like.dtype))
        else:
            self.rows = torch.empty_like(like)

    def add(
        self, place: tuple[slice, slice], weights: Tensor, vectors: Tensor, factor: float
    ) -> None:
        """Adds factor * weights^T vectors to the rows at `place`."""
        rows, turned = self.rows[place], weights.transpose(1, 2)
        if rows.dtype is not vectors.dtype:
            rows.add_(torch.bmm(turned, vectors), alpha=factor)
        else:
            beta = 1 if self.is_shared else 0
            torch.baddbmm(rows, turned, vectors, beta=beta, alpha=factor, out=rows)

    def narrow(self) -> Tensor:
        """The sum, in the dtype of what it is the gradient of."""
        return self.rows.to(self.dtype)


def _keep(dropout: Dropout, names: list[int], tile: _Tile) -> Tensor:
    # As bytes: a product with them is several times faster than one with booleans.
    place = {"first_query": tile.queries.start, "first_key": tile.keys.start}
    threshold, seed, site = dropout.threshold, dropout.seed, dropout.site
    return plane_keep_mask(names, *tile.shape, threshold, seed, site, **place).view(torch.uint8)


def _softmax(
    query: Tensor, key: Tensor, scale: float, bias: Tensor | None, scores: Tensor, out: Tensor
) -> None:
    """Writes the scaled scores of some planes and their softmax."""
    wide = (query.to(out.dtype), key.to(out.dtype).transpose(1, 2))
    if bias is None:
        torch.baddbmm(scores, *wide, beta=0, alpha=scale, out=scores)
    else:
        torch.baddbmm(bias, *wide, alpha=scale, out=scores)
    torch.softmax(scores, dim=-1, out=out)
