"""The numbers of variable-length attention, on tensors whose boundaries the host may read.

Where every query sees every key, PyTorch's own tiled kernel runs on a CPU. It knows no dropout and
no window: for these the products are written out in `attention_planes`. Nothing of size length x
length is kept for backward.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spanbert_fast.ops.attention_planes import Dropout, backward_planes, forward_planes
from spanbert_fast.ops.precision import wide_dtype


class _Group(NamedTuple):
    """All sequences of one length, wherever they lie in the batch."""

    sequences: list[int]
    length: int
    rows: slice | Tensor
    """Their rows; int64 [n * L] if the sequences are no neighbours, which costs a gather."""

    def planes(self, rows: Tensor) -> Tensor:
        """The group's rows [n * L, H, ...] of [T, H, ...] as planes [n, H, L, ...].

        A view where the sequences are neighbours.
        """
        if isinstance(self.rows, slice):
            chosen = rows[self.rows]
        else:
            chosen = rows.index_select(0, self.rows)
        shape = (len(self.sequences), self.length, *rows.shape[1:])
        return chosen.view(shape).transpose(1, 2)

    def write(self, rows: Tensor, planes: Tensor) -> None:
        """Puts planes [n, H, L, ...] where `planes` took them from."""
        if isinstance(self.rows, slice):
            self.planes(rows).copy_(planes)
        else:
            rows.index_copy_(0, self.rows, planes.transpose(1, 2).flatten(0, 1))


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
            q, k, v = (group.planes(rows) for rows in (query, key, value))
            is_plain = dropout is None and _sees_all(window, group)
            if is_plain and query.device.type == "cpu":
                tiled = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                out, log = tiled(q, k, v, scale=scale)
            else:
                names = _plane_names(group, ids, query.shape[1])
                out, log = forward_planes(q, k, v, scale, window, dropout, names)
            group.write(output, out)
            group.write(lse, log)
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
            inputs = (group.planes(rows) for rows in (grad_output, query, key, value))
            above, q, k, v = inputs
            is_plain = dropout is None and _sees_all(window, group) and grad_lse is None
            if is_plain and query.device.type == "cpu":
                tiled = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
                out, log = group.planes(output), group.planes(lse)
                results = tiled(above, q, k, v, out, log, 0.0, False, scale=scale)
            else:
                delta = (above.to(lse.dtype) * group.planes(output)).sum(-1)
                if grad_lse is not None:
                    delta = delta - group.planes(grad_lse)
                names = _plane_names(group, ids, query.shape[1])
                results = backward_planes(above, q, k, v, delta, scale, window, dropout, names)
            for grad, result in zip(grads, results, strict=True):
                group.write(grad, result)
    return grads[0], grads[1], grads[2]


def _sees_all(window: int | None, group: _Group) -> bool:
    return window is None or window >= group.length - 1


def _groups(cu_seqlens: Tensor) -> Iterator[_Group]:
    """Sequences of one length together: many short texts are then few calls, in any order."""
    bounds = cu_seqlens.tolist()
    found: dict[int, list[int]] = defaultdict(list)
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        found[end - start].append(index)
    for length, sequences in found.items():
        if not length:
            continue
        first, last = bounds[sequences[0]], bounds[sequences[-1] + 1]
        if last - first == len(sequences) * length:  # nothing but empty ones between them
            yield _Group(sequences, length, slice(first, last))
            continue
        starts = torch.tensor([bounds[index] for index in sequences], device=cu_seqlens.device)
        columns = torch.arange(length, device=cu_seqlens.device)
        yield _Group(sequences, length, (starts[:, None] + columns).flatten())


def _dense(rows: Tensor) -> Tensor:
    """The same rows with neighbouring elements of a head next to each other, as kernels want."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _plane_names(group: _Group, ids: list[int], num_heads: int) -> list[int]:
    """For each plane: sequence id * H + head."""
    chosen = (ids[index] for index in group.sequences) if ids else ()
    return [number * num_heads + head for number in chosen for head in range(num_heads)]
