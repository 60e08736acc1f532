"""Row 14: a `full-512` step of BERT base over the floor that its matrix products set.

The floor is the step's floating-point operations (`model_flops`: attention and heads included)
divided by the rate of the model's own product shapes, timed in turn with the step.
"""

from __future__ import annotations

import pytest
import torch
from peers import make_model, our_step
from pytest_benchmark.fixture import BenchmarkFixture
from timing import DTYPES, Case, require_dtype, time_in_turn
from workload import Setting, make_batch

from spanbert_fast.train.metrics import model_flops

REPEATS = 8


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("row", "dropout"), [("14a", 0.0), ("14b", 0.1)])
def test_floor(
    benchmark: BenchmarkFixture, setting: Setting, row: str, dropout: float, precision: str
) -> None:
    base = setting.base().at(DTYPES[precision])
    batch = make_batch(base, "full-512")
    model = make_model(base, dropout)
    width, tokens = base.sizes.hidden_size, batch.num_tokens
    # Forward and backward of the feed-forward: [T, D] x [D, 4 D], [T, 4 D] x [4 D, D] and the
    # weight's [D, T] x [T, 4 D].
    flops = REPEATS * 3 * 2 * tokens * width * 4 * width
    case = Case(
        rows=(row if precision == "bf16" else f"{row} (fp32)",),
        workload="full-512",
        peer="floor of its matrix products",
        dropout=dropout,
        scale=flops / model_flops(model.config, batch),
        is_upper=True,
        tokens=None,
    )
    require_dtype(benchmark, base, Case(**{**vars(case), "dtype": precision}))
    narrow, wide, weight = (
        torch.randn(shape, dtype=base.dtype, device=base.device)
        for shape in ((tokens, width), (tokens, 4 * width), (width, 4 * width))
    )
    # Into memory that stands: a floor has no allocation in it.
    outputs = [torch.empty_like(tensor) for tensor in (wide, narrow, weight)]

    def products() -> None:
        for _ in range(REPEATS):
            torch.mm(narrow, weight, out=outputs[0])
            torch.mm(wide, weight.T, out=outputs[1])
            torch.mm(narrow.T, wide, out=outputs[2])

    step = our_step(base, model, batch)
    assert bool(step().isfinite())
    time_in_turn(benchmark, base, case, step, products)
