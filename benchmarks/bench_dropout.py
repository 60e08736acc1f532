"""Row 11: dropout with reproducible counter bits against `F.dropout`, forward, on hidden states."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timing import DTYPES, Case, time_in_turn
from torch.nn import functional
from workload import Setting

from spanbert_fast.ops.dropout import hidden_dropout

PROBABILITY = 0.1


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_hidden_dropout(benchmark: BenchmarkFixture, setting: Setting, precision: str) -> None:
    """Elementwise work needs no bf16 products, so that this row is measured in both dtypes."""
    base = setting.base()
    length, width = base.sizes.length, base.sizes.hidden_size
    cu = torch.arange(5, dtype=torch.int32, device=base.device) * length
    rows = torch.ones(4 * length, width, dtype=DTYPES[precision], device=base.device)
    seed = torch.tensor(1, device=base.device)
    sequence_ids = torch.arange(4, device=base.device)

    def ours() -> torch.Tensor:
        return hidden_dropout(rows, PROBABILITY, seed, sequence_ids, cu, 1)

    def peer() -> torch.Tensor:
        return functional.dropout(rows, PROBABILITY)

    assert torch.equal(ours(), ours())  # the same bits each time, as the peer's are not
    for made in (ours(), peer()):
        kept = made != 0
        assert abs(float(kept.float().mean()) - (1 - PROBABILITY)) < 0.01
        assert float((made[kept].float() - 1 / (1 - PROBABILITY)).abs().max()) < 5e-3
    case = Case(
        rows=("11",) if precision == "bf16" else ("11 (fp32)",),
        peer="F.dropout",
        dtype=precision,
        model=f"{4 * length:,} x {width}",
        dropout=PROBABILITY,
    )
    time_in_turn(benchmark, base, case, ours, peer)
