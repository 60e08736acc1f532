"""Row 13: peak memory of a `ragged-50` step of BERT base, each side in a fresh process.

The bar compares whole processes: interpreter, libraries and weights are in both, and weigh against
us. `growth` compares what the step adds to a process that holds model and batch.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from records import Record
from timing import Case, command_of, make_record, name_of, padding_of
from workload import Setting

PROBE = Path(__file__).with_name("memory_probe.py")


@functools.cache
def probe(kind: str, lengths: tuple[int, ...], is_base: bool) -> tuple[float, float]:
    """Peak, and growth above the resident memory before the step, in MiB."""
    options = ["--base"] if is_base else []
    command = [sys.executable, str(PROBE), kind, *options, "--lengths", *map(str, lengths)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found["peak"], max(found["peak"] - found["before"], 1e-3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory(benchmark: BenchmarkFixture, setting: Setting) -> None:
    base = setting.base()
    lengths = base.lengths("ragged-50")
    found = {}

    def both() -> None:
        for kind in ("ours", "sdpa"):
            found[kind] = probe(kind, tuple(lengths), not base.is_smoke)

    benchmark.pedantic(both, rounds=1)
    row = "13" if base.dtype.itemsize == 2 else "13 (fp32)"
    for index, suffix in enumerate(("", " growth")):
        case = Case(
            rows=(row + suffix,),
            workload="ragged-50",
            peer="Hugging Face sdpa",
            dropout=0.1,
            padding=padding_of(lengths),
        )
        own, other = (np.array([[found[kind][index], 0.0]]) for kind in ("ours", "sdpa"))
        record = make_record(benchmark, base, case, own, other)
        setting.records.append(replace(record, case=record.case + suffix, unit="MiB"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_against_batch(benchmark: BenchmarkFixture, setting: Setting) -> None:
    parts = tuple(setting.lengths("ragged-50")[:4])
    batches = (1,) if setting.is_smoke else (1, 2, 4)

    def all_points() -> None:
        for kind in ("ours", "sdpa"):
            for times in batches:
                peak, growth = probe(kind, parts * times, False)
                assert 0 < growth < peak
                setting.records.append(
                    Record(
                        case=f"{name_of(benchmark)}, {kind}, {4 * times}",
                        curve="memory",
                        series="ours" if kind == "ours" else "Hugging Face sdpa, padded",
                        x=4 * times,
                        y=growth,
                        model=setting.model,
                        command=command_of(benchmark),
                    )
                )

    benchmark.pedantic(all_points, rounds=1)
