"""The numbers of variable-length attention, on tensors whose boundaries the host may read.

Without dropout and window, PyTorch's own tiled kernel runs on a CPU. It knows no dropout, so the
rest is written out: products of whole planes (one head of one sequence), a few planes at a time,
so that their scores stay in the cache. Nothing of size length x length is kept for backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spanbert_fast.ops.precision import wide_dtype
from spanbert_fast.ops.random import plane_keep_mask

# Scores of one block of planes. Three such buffers live at a time, and should stay in the cache.
_BLOCK_BYTES = 1 << 20


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


class _Group(NamedTuple):
    """Neighbouring sequences of one length."""

    first_sequence: int
    num_sequences: int
    rows: slice
    length: int


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, K] in the dtype of `query`, and log-sum-exp [T, H], wide."""
    query, key, value = (_dense(rows) for rows in (query, key, value))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = output.new_empty(query.shape[:2], dtype=wide_dtype(query.dtype))
    ids = dropout.sequence_ids.tolist() if dropout else []
    with torch.autocast(query.device.type, enabled=False):
        for group in _groups(cu_seqlens):
            q, k, v = (_planes(rows, group) for rows in (query, key, value))
            bias = _window_bias(window, group.length, query)
            if dropout is None and bias is None and query.device.type == "cpu":
                tiled = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                out, log = tiled(q, k, v, scale=scale)
            else:
                names = _plane_names(group, ids, query.shape[1])
                out, log = _forward_planes(q, k, v, scale, bias, dropout, names)
            _planes(output, group).copy_(out)
            _planes(lse, group).copy_(log)
    return output, lse


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, [T, H, K] each."""
    query, key, value, grad_output = (_dense(rows) for rows in (query, key, value, grad_output))
    grads = [torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(3)]
    ids = dropout.sequence_ids.tolist() if dropout else []
    with torch.autocast(query.device.type, enabled=False):
        for group in _groups(cu_seqlens):
            inputs = (_planes(rows, group) for rows in (grad_output, query, key, value))
            above, q, k, v = inputs
            bias = _window_bias(window, group.length, query)
            plain = dropout is None and bias is None and grad_lse is None
            if plain and query.device.type == "cpu":
                tiled = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
                out, log = _planes(output, group), _planes(lse, group)
                results = tiled(above, q, k, v, out, log, 0.0, False, scale=scale)
            else:
                delta = (above.to(lse.dtype) * _planes(output, group)).sum(-1)
                if grad_lse is not None:
                    delta = delta - _planes(grad_lse, group)
                names = _plane_names(group, ids, query.shape[1])
                results = _backward_planes(above, q, k, v, delta, scale, bias, dropout, names)
            for grad, result in zip(grads, results, strict=True):
                _planes(grad, group).copy_(result)
    return grads[0], grads[1], grads[2]


def _groups(cu_seqlens: Tensor) -> Iterator[_Group]:
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    first = 0
    for index in range(1, len(lengths) + 1):
        if index < len(lengths) and lengths[index] == lengths[first]:
            continue
        if lengths[first]:
            rows = slice(bounds[first], bounds[index])
            yield _Group(first, index - first, rows, lengths[first])
        first = index


def _dense(rows: Tensor) -> Tensor:
    """The same rows with neighbouring elements of a head next to each other, as kernels want."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _planes(rows: Tensor, group: _Group) -> Tensor:
    """The group's rows [n * L, H, ...] as planes [n, H, L, ...]; a view."""
    shape = (group.num_sequences, group.length, *rows.shape[1:])
    return rows[group.rows].view(shape).transpose(1, 2)


def _plane_names(group: _Group, ids: list[int], num_heads: int) -> list[int]:
    """For each plane: sequence id * H + head."""
    chosen = ids[group.first_sequence : group.first_sequence + group.num_sequences]
    return [number * num_heads + head for number in chosen for head in range(num_heads)]


def _window_bias(window: int | None, length: int, like: Tensor) -> Tensor | None:
    """0 where a key is in the window of a query, else -inf: [L, L]; None: all are."""
    if window is None or window >= length - 1:
        return None
    places = torch.arange(length, device=like.device)
    far = (places[:, None] - places).abs() > window
    return like.new_zeros((length, length), dtype=wide_dtype(like.dtype)).masked_fill_(
        far, float("-inf")
    )


def _blocks(num_planes: int, num_heads: int, length: int, itemsize: int) -> list[slice]:
    """Planes whose scores fit the budget: whole sequences, or else some heads of one."""
    step = max(1, _BLOCK_BYTES // (length * length * itemsize))
    step = step // num_heads * num_heads if step >= num_heads else step
    starts = range(0, num_planes, step)
    return [slice(start, min(start + step, num_planes)) for start in starts]


class _Buffers:
    """Memory for the scores of one block, used again by the next: fresh pages cost more to get."""

    def __init__(self, number: int, blocks: list[slice], length: int, like: Tensor) -> None:
        shape = (number, blocks[0].stop, length, length)
        self.memory = like.new_empty(shape, dtype=wide_dtype(like.dtype))

    def part(self, block: slice) -> Iterator[Tensor]:
        """Each buffer, cut to the planes of `block`."""
        return iter(self.memory[:, : block.stop - block.start])


def _keep(dropout: Dropout, names: list[int], length: int) -> Tensor:
    # As bytes: a product with them is several times faster than one with booleans.
    seed, site = dropout.seed, dropout.site
    keep = plane_keep_mask(names, length, length, dropout.threshold, seed, site)
    return keep.view(torch.uint8)


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


def _forward_planes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout: Dropout | None,
    names: list[int],
) -> tuple[Tensor, Tensor]:
    """Output [n, H, L, K] and log-sum-exp [n, H, L] of planes [n, H, L, K]."""
    shape, (num_heads, length) = query.shape, query.shape[1:3]
    query, key, value = (rows.flatten(0, 1) for rows in (query, key, value))
    output = torch.empty_like(query)
    lse = query.new_empty(query.shape[:2], dtype=wide_dtype(query.dtype))
    blocks = _blocks(len(query), num_heads, length, lse.element_size())
    buffers = _Buffers(2, blocks, length, query)
    for block in blocks:
        scores, weights = buffers.part(block)
        _softmax(query[block], key[block], scale, bias, scores, out=weights)
        # The largest score and its probability give the sum without a second exponential.
        lse[block] = scores.amax(-1) - weights.amax(-1).log()
        factor = 1.0
        if dropout is not None:
            weights.mul_(_keep(dropout, names[block], length))
            factor = dropout.scale
        narrow, out = weights.to(value.dtype), output[block]
        torch.baddbmm(out, narrow, value[block], beta=0, alpha=factor, out=out)
    return output.view(shape), lse.view(shape[:3])


def _backward_planes(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout: Dropout | None,
    names: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of planes [n, H, L, K]; `delta` [n, H, L] is sum(output * its gradient)."""
    shape, dtype, (num_heads, length) = query.shape, query.dtype, query.shape[1:3]
    inputs = (grad_output, query, key, value)
    grad_output, query, key, value = (rows.flatten(0, 1) for rows in inputs)
    delta = delta.flatten(0, 1)[..., None]
    grads = [torch.empty_like(query) for _ in range(3)]
    blocks = _blocks(len(query), num_heads, length, delta.element_size())
    buffers = _Buffers(3, blocks, length, query)
    factor = dropout.scale if dropout else 1.0
    for block in blocks:
        scores, weights, slope = buffers.part(block)
        grad_query, grad_key, grad_value = (grad[block] for grad in grads)
        _softmax(query[block], key[block], scale, bias, scores, out=weights)
        wide = (grad_output[block].to(slope.dtype), value[block].to(slope.dtype).transpose(1, 2))
        torch.baddbmm(slope, *wide, beta=0, alpha=factor, out=slope)
        applied = weights
        if dropout is not None:
            keep = _keep(dropout, names[block], length)
            applied = torch.mul(weights, keep, out=scores)
            slope.mul_(keep)
        narrow = applied.to(dtype).transpose(1, 2)
        torch.baddbmm(grad_value, narrow, grad_output[block], beta=0, alpha=factor, out=grad_value)
        narrow = slope.sub_(delta[block]).mul_(weights).mul_(scale).to(dtype)
        torch.bmm(narrow, key[block], out=grad_query)
        torch.bmm(narrow.transpose(1, 2), query[block], out=grad_key)
    return grads[0].view(shape), grads[1].view(shape), grads[2].view(shape)
