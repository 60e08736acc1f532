"""Row 6: both heads, forward and backward to hidden states and weights, against the reference's
layout (`reference_layout.py`). BERT base's width and vocabulary; loss and gradient are compared.
"""

from __future__ import annotations

import pytest
import torch
from peers import Step, autocast, make_model
from pytest_benchmark.fixture import BenchmarkFixture
from reference_layout import heads_loss, pad_rows, pad_targets
from timing import DTYPES, Case, padding_of, require_dtype, time_in_turn
from torch import Tensor
from workload import WORKLOADS, Setting, make_batch, places, relative_error

from spanbert_fast.model.heads import combine_losses


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_heads(
    benchmark: BenchmarkFixture, setting: Setting, workload: str, precision: str
) -> None:
    base = setting.base().at(DTYPES[precision])
    lengths = base.lengths(workload)
    case = Case(
        rows=("6",) if precision == "bf16" else ("6 (fp32)",),
        workload=workload,
        peer="layout of the reference",
        dtype=f"{precision} / {precision}",
        tokens=sum(lengths),
        padding=padding_of(lengths),
    )
    require_dtype(benchmark, base, case)
    batch = make_batch(base, workload)
    model = make_model(base, 0.0)
    wanted = pad_targets(batch, model.config.max_span_targets)
    torch.manual_seed(1)
    rows = torch.randn(batch.num_tokens, base.sizes.hidden_size, device=base.device)
    rows.requires_grad_()
    plane = pad_rows(batch, rows.detach()).requires_grad_()

    def own_loss() -> Tensor:
        return combine_losses(model.cls.score(rows, batch), model.config).loss

    ours = step_of(base, model, rows, own_loss)
    peer = step_of(base, model, plane, lambda: heads_loss(model, plane, wanted))
    bound = 2e-2 if precision == "bf16" else 1e-4
    assert relative_error(ours(), peer()) < bound
    where = places(batch.cu_seqlens, batch.max_seqlen)
    assert relative_error(rows.grad, plane.grad.flatten(0, 1)[where]) < bound
    time_in_turn(benchmark, base, case, ours, peer, is_warm=True)


def step_of(setting: Setting, model: torch.nn.Module, hidden: Tensor, loss) -> Step:
    """Forward and backward to fresh gradients."""

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        hidden.grad = None
        with autocast(setting):
            value = loss()
        value.backward()
        return value.detach()

    return step
