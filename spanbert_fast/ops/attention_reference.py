"""The numbers of variable-length attention, on tensors whose boundaries the host may read.

Where every query sees every key, PyTorch's own tiled kernel runs on a CPU. It knows no dropout and
no window: for these the products are written out in `attention_planes`. Nothing of size length x
length is kept for backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spanbert_fast.ops.attention_planes import Dropout, backward_planes, forward_planes
from spanbert_fast.ops.precision import wide_dtype


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
            is_plain = dropout is None and _sees_all(window, group)
            if is_plain and query.device.type == "cpu":
                tiled = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                out, log = tiled(q, k, v, scale=scale)
            else:
                names = _plane_names(group, ids, query.shape[1])
                out, log = forward_planes(q, k, v, scale, window, dropout, names)
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
            is_plain = dropout is None and _sees_all(window, group) and grad_lse is None
            if is_plain and query.device.type == "cpu":
                tiled = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
                out, log = _planes(output, group), _planes(lse, group)
                results = tiled(above, q, k, v, out, log, 0.0, False, scale=scale)
            else:
                delta = (above.to(lse.dtype) * _planes(output, group)).sum(-1)
                if grad_lse is not None:
                    delta = delta - _planes(grad_lse, group)
                names = _plane_names(group, ids, query.shape[1])
                results = backward_planes(above, q, k, v, delta, scale, window, dropout, names)
            for grad, result in zip(grads, results, strict=True):
                _planes(grad, group).copy_(result)
    return grads[0], grads[1], grads[2]


def _sees_all(window: int | None, group: _Group) -> bool:
    return window is None or window >= group.length - 1


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
