"""Bytes that the elementwise kernels move, counted by `ptxsim` in a part of a real launch.

`test_compile_elementwise.py` runs this file. The launch is that of 8,224 tokens; two and four of
its programs run, and their difference is what programs cost: parameters, which all of them read
but only one fetches, drop out.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import ptxsim
import pytest
import torch
from torch import Tensor

from kernels.row_cases import MAX_BYTES, Shape, make_case, run
from spanbert_fast.kernels import activation, embedding, norm
from spanbert_fast.kernels.rows import row_tiles
from spanbert_fast.kernels.segments import segment_sum

BRAIN, SINGLE = torch.bfloat16, torch.float32
TOKENS, SIZE, FEED_FORWARD, LAYERS = 8224, 768, 3072, 12
ROWS_PER_PROGRAM = row_tiles(TOKENS, SIZE, num_operands=2).rows_per_program
DROPOUT = (6554, 1, torch.tensor(3), torch.arange(17), torch.arange(17, dtype=torch.int32) * 484)


def bytes_per_token(
    launch: Callable[[], Any], programs: Callable[[int], list[Any]], least_coalescing: float = 0.95
) -> float:
    """Bytes from and to memory for each token, of one launch with its sums over programs."""
    moved = []
    for count in (2, 4):
        with ptxsim.patched(target=90, programs=programs(count)) as reports:
            launch()
        (report,) = reports
        report.check()
        totals = report.totals
        for kind in ("load", "store"):
            # Threads that share an address make the ratio larger than one.
            assert totals["coalescing"][kind] >= least_coalescing, f"{report.name}: {kind}"
        moved.append(totals["dram_read"] + totals["dram_written"])
    return (moved[1] - moved[0]) / (2 * ROWS_PER_PROGRAM)


def rows_first(count: int) -> list[Any]:
    return list(range(count))


def whole_rows(count: int) -> list[Any]:
    """All blocks of columns of the first programs, in a grid of (rows, columns)."""
    return [(row, column) for row in range(count) for column in range(FEED_FORWARD // 1024)]


def sums_over_programs(width: int) -> float:
    """Reading the partial sums again, once, for each token."""
    return 4 * width / ROWS_PER_PROGRAM


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BRAIN)


@functools.cache
def traffic() -> dict[tuple[str, str], float]:
    """Bytes for each token, by op and kernel; the last pass over partial sums is a kernel's own."""
    torch.manual_seed(0)
    x, residual, dy = (rows(TOKENS, SIZE) for _ in range(3))
    weight, bias, more = torch.ones(SIZE), torch.zeros(SIZE), torch.zeros(SIZE)
    statistics = torch.zeros(TOKENS), torch.ones(TOKENS)
    launches: dict[tuple[str, str], tuple[Callable[[], Any], int]] = {
        # Each with the number of its partial sums.
        ("dropout_add_layer_norm", "_forward"): (
            lambda: norm._forward_op(x, residual, weight, bias, 1e-12, *DROPOUT),
            0,
        ),
        ("dropout_add_layer_norm", "_backward"): (
            lambda: norm._backward_op(dy, x, residual, weight, *statistics, *DROPOUT),
            2 * SIZE,
        ),
        ("bias_gelu_layer_norm", "_gelu_norm_forward"): (
            lambda: activation._gelu_norm_op(x, more, weight, bias, 1e-12),
            0,
        ),
        ("bias_gelu_layer_norm", "_gelu_norm_backward"): (
            lambda: activation._gelu_norm_backward_op(dy, x, more, weight, *statistics),
            3 * SIZE,
        ),
    }
    moved = {
        name: bytes_per_token(launch, rows_first) + sums_over_programs(width)
        for name, (launch, width) in launches.items()
    }
    return moved | gelu_traffic() | embedding_traffic(dy, weight, bias, statistics)


def gelu_traffic() -> dict[tuple[str, str], float]:
    """Bytes of the activation of the feed-forward layer for each token."""
    wide, dwide = (rows(TOKENS, FEED_FORWARD) for _ in range(2))
    bias = torch.zeros(FEED_FORWARD)
    forward = bytes_per_token(lambda: activation._gelu_op(wide, bias), whole_rows)
    backward = bytes_per_token(lambda: activation._gelu_backward_op(dwide, wide, bias), whole_rows)
    return {
        ("bias_gelu", "_gelu_forward"): forward,
        ("bias_gelu", "_gelu_backward"): backward + sums_over_programs(FEED_FORWARD),
    }


def embedding_traffic(
    dy: Tensor, weight: Tensor, bias: Tensor, statistics: tuple[Tensor, Tensor]
) -> dict[tuple[str, str], float]:
    """Bytes of the embedding for each token, once in a step; every token is another word."""
    op = "bert_embedding"
    ids, positions = torch.arange(TOKENS), torch.arange(TOKENS) % 484
    types = torch.zeros_like(ids)
    tables = torch.randn(TOKENS, SIZE), torch.randn(512, SIZE), torch.randn(2, SIZE)
    operands = (ids, positions, types, *tables, weight)
    # A thread that writes eight bfloat16 reads eight float32 in two loads of half a sector each;
    # the second finds its half in the first-level cache. Tables in bfloat16 meet the rule, below.
    least = 0.6
    forward = bytes_per_token(
        lambda: embedding._forward_op(*operands, bias, 1e-12, BRAIN, *DROPOUT), rows_first, least
    )
    with mock.patch.object(embedding, "segment_sum", side_effect=lambda *_: torch.empty(1)):
        backward = bytes_per_token(
            lambda: embedding._backward_op(dy, *operands, *statistics, *DROPOUT),
            rows_first,
            least,
        )
    moved = Counter({(op, "_forward"): forward})
    moved[op, "_backward"] = backward + sums_over_programs(2 * SIZE)
    for keys, table in zip((ids, positions, types), tables, strict=True):
        for name, count in bytes_of_sum(keys, len(table)).items():
            moved[op, name] += count
    return dict(moved)


def bytes_of_sum(keys: Tensor, num_segments: int) -> dict[str, float]:
    """Bytes for each token of a sum by key, from one block of 64 columns of 1,028 tokens."""
    keys = keys[: TOKENS // 8]
    with ptxsim.patched(target=90) as reports:
        segment_sum(torch.randn(len(keys), 64), keys, num_segments, SINGLE)
    per_token = SIZE / 64 / len(keys)
    totals = {report.name: report.check().totals for report in reports}
    return {
        name: (total["dram_read"] + total["dram_written"]) * per_token
        for name, total in totals.items()
    }


def bytes_per_layer() -> dict[str, float]:
    """Bytes for each token and layer, by op; the embedding's are spread over all layers."""
    moved: Counter[str] = Counter()
    # The feed-forward layer and the attention before it end in a norm each.
    times = {"dropout_add_layer_norm": 2, "bias_gelu": 1, "bert_embedding": 1 / LAYERS}
    for (op, _), count in traffic().items():
        if op in times:
            moved[op] += count * times[op]
    return dict(moved)


def test_bytes_of_a_layer_stay_below_90_times_the_hidden_size() -> None:
    parts = {op: round(count / SIZE, 1) for op, count in bytes_per_layer().items()}
    total = sum(bytes_per_layer().values()) / SIZE
    print(f"bytes per token and layer, in units of the hidden size: {total:.1f} {parts}")
    # The sums are known by hand: 6 + 10 each for the two norms, 4 (4 + 6) for GELU.
    assert 70 < total <= MAX_BYTES, parts


@pytest.mark.parametrize("op", ["bias_gelu_layer_norm", "span_boundary_hidden", "bert_embedding"])
def test_other_kernels_are_coalesced(op: str) -> None:
    parameters = None if op == "bert_embedding" else SINGLE
    case = make_case(op, Shape(24, SIZE, BRAIN, parameters))
    with ptxsim.patched(target=90) as reports:
        run(case, "triton")
    for report in reports:
        for kind, ratio in report.totals["coalescing"].items():
            # None: no key's rows reach over two windows, so there is nothing to join.
            assert ratio is None or ratio >= 0.95, f"{report.name}: {kind}"
