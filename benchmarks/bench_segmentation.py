"""Units per second of the segmentation core on one thread: the best segmentation, and marginals.

Texts of 64 to 510 units, scores as a trained model has them (normal, standard deviation 2). The
figure comes from the fastest round, because other work on the machine can only slow a round down.
Run with `pytest benchmarks/bench_segmentation.py --benchmark-only`.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from spanbert_fast import _core

SMOKE = os.environ.get("SPANBERT_FAST_BENCH_SIZES") == "smoke"
NUM_SEQUENCES = 8 if SMOKE else 400
TARGET_UNITS_PER_SECOND = 1e6


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("width", [10, 30])
@pytest.mark.parametrize("name", ["best_segmentation", "span_marginals"])
def test_segmentation(benchmark: BenchmarkFixture, name: str, width: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(64, 511, NUM_SEQUENCES)
    cu = np.array([0, *np.cumsum(lengths)], np.int32)
    scores = (2 * rng.standard_normal((cu[-1], width))).astype(dtype)
    benchmark(getattr(_core, name), scores, cu, 1)
    if benchmark.stats is not None:
        speed = float(cu[-1]) / benchmark.stats.stats.min
        benchmark.extra_info["units_per_second"] = speed
        print(f"\n{name} W={width} {dtype}: {speed / 1e6:.2f} M units/s on one thread")
        if width == 10:
            assert speed >= TARGET_UNITS_PER_SECOND
