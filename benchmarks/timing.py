"""Times two callables in turn: median and spread of their ratio, wall and CPU time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from records import Record
from workload import Setting

NO_BF16 = "not measurable on this machine: its CPU has no bf16 products"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a comparison is about, for its line in the tables."""

    rows: tuple[str, ...] = ()
    workload: str = ""
    peer: str = ""
    dtype: str = ""
    """Of both sides, or ours / the peer's; by default that of the setting."""
    dropout: float = 0.0
    tokens: int | None = None
    """Real tokens of a call, on both sides."""
    padding: float | None = None
    scale: float = 1.0
    """Turns the ratio of medians into the figure of the row, if calls differ in work."""
    is_upper: bool = False
    """The figure is ours / peer, and a small one is good."""
    model: str = ""
    """What was worked on, where it is not the model of the setting."""


def padding_of(lengths: list[int]) -> float:
    """Share of padding of one padded batch."""
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


def name_of(benchmark: BenchmarkFixture) -> str:
    """File and test of a case."""
    return str(benchmark.fullname).rsplit("/", 1)[-1]


def command_of(benchmark: BenchmarkFixture) -> str:
    """What runs this case alone."""
    return f"python -m pytest 'benchmarks/{name_of(benchmark)}' --benchmark-only"


def describe(benchmark: BenchmarkFixture, setting: Setting, case: Case) -> Record:
    """What the record of a case says before anything is measured."""
    return Record(
        case=name_of(benchmark),
        rows=case.rows,
        workload=case.workload,
        peer=case.peer,
        dtype=case.dtype or NAMES[setting.dtype],
        dropout=case.dropout,
        threads=torch.get_num_threads(),
        model=case.model or setting.model,
        command=command_of(benchmark),
    )


def skip(benchmark: BenchmarkFixture, setting: Setting, case: Case, reason: str) -> None:
    """Skips the test; the table keeps its row, with the reason."""
    setting.records.append(replace(describe(benchmark, setting, case), skipped=reason))
    pytest.skip(reason)


def require_dtype(benchmark: BenchmarkFixture, setting: Setting, case: Case) -> None:
    """Skips a case with bf16 products where the CPU would emulate them."""
    if "bf16" in case.dtype and not setting.has_bf16:
        skip(benchmark, setting, case, NO_BF16)


def time_in_turn(
    benchmark: BenchmarkFixture,
    setting: Setting,
    case: Case,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    is_warm: bool = False,
) -> None:
    """Times `peer`, and `ours` before each of its rounds; the record has the medians.

    A machine that is slowed by its neighbours slows both: the ratio and its spread are the median
    and the 20th and 80th percentile of the ratios of neighbouring rounds. Results were compared
    before.
    """
    own: list[tuple[float, float]] = []
    other: list[tuple[float, float]] = []

    def timed(step: Callable[[], object], seconds: list[tuple[float, float]]) -> None:
        setting.synchronize()
        begun, begun_cpu = time.perf_counter(), time.process_time()
        step()
        setting.synchronize()
        seconds.append((time.perf_counter() - begun, time.process_time() - begun_cpu))

    if not is_warm:
        ours()
        peer()
    benchmark.pedantic(
        timed, args=(peer, other), setup=lambda: timed(ours, own), rounds=setting.sizes.rounds
    )
    record = make_record(benchmark, setting, case, np.array(own), np.array(other))
    benchmark.extra_info.update(
        ratio=record.ratio, ours_seconds=record.ours_seconds, threads=record.threads
    )
    setting.records.append(record)


def make_record(
    benchmark: BenchmarkFixture, setting: Setting, case: Case, own: np.ndarray, other: np.ndarray
) -> Record:
    """The record of two series of (wall, CPU) seconds [rounds, 2], or of two series of MiB."""
    above, below = (own, other) if case.is_upper else (other, own)
    low, middle, high = np.percentile(above[:, 0] / below[:, 0], [20, 50, 80]) * case.scale
    (mine, mine_cpu), (theirs, theirs_cpu) = np.median(own, 0), np.median(other, 0)
    return replace(
        describe(benchmark, setting, case),
        ratio=float(middle),
        ratio_20=float(low),
        ratio_80=float(high),
        ours_seconds=float(mine),
        peer_seconds=float(theirs),
        ours_cpu_seconds=float(mine_cpu),
        peer_cpu_seconds=float(theirs_cpu),
        ours_tokens_per_second=case.tokens / float(mine) if case.tokens else None,
        peer_tokens_per_second=case.tokens / float(theirs) if case.tokens else None,
        padding=case.padding,
    )
