"""What `torch.compile` and PyTorch's own checks say to the registered operators and the ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from spanbert_fast import ops
from spanbert_fast.ops import attention, cross_entropy
from spanbert_fast.ops import random as dropout

EPS = 1e-12
CU = torch.tensor([0, 0, 3, 6, 8], dtype=torch.int32)
IDS, SEED = torch.arange(4), torch.tensor(3)
DROPOUT: dict[str, Any] = {"dropout_p": 0.25, "seed": SEED, "sequence_ids": IDS}
PLACES: dict[str, Any] = {**DROPOUT, "cu_seqlens": CU}


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("threshold", [0, 20000])
def test_attention_passes_opcheck(window: int | None, threshold: int) -> None:
    rows = [leaf(8, 2, 4) for _ in range(3)]
    opcheck(attention._attention, (*rows, CU, 0.5, window, threshold, SEED, IDS, 1))
    plain = [row.detach() for row in rows]
    saved = (*plain, plain[0], torch.zeros(8, 2))
    for grad_lse in (None, torch.zeros(8, 2)):
        opcheck(
            attention._attention_backward,
            (plain[0], grad_lse, *saved, CU, 0.5, window, threshold, SEED, IDS, 1),
        )


@pytest.mark.parametrize("keep_logits", [False, True])
def test_cross_entropy_passes_opcheck(keep_logits: bool) -> None:
    operands = (leaf(8, 4), leaf(11, 4), leaf(11), leaf(11), 3, torch.arange(8))
    options = (None, 0.1, -100, keep_logits)
    opcheck(cross_entropy._cross_entropy, (*operands, *options))
    kept = torch.zeros(8 if keep_logits else 0, 11)
    plain = [v.detach() if isinstance(v, Tensor) else v for v in operands]
    opcheck(cross_entropy._cross_entropy_backward, (torch.ones(8), kept, *plain, *options))


def test_hidden_mask_passes_opcheck() -> None:
    places = torch.arange(5)
    opcheck(dropout._hidden_keep_mask, (places, places, 13, 20000, SEED, 2))


def step(hidden: Tensor, table: Tensor, vector: Tensor, targets: Tensor) -> Tensor:
    """One packed step through every op; all sizes are 8, so that few parameters serve."""
    where = torch.arange(8)
    rows = ops.bert_embedding(
        where, where, where, table, table, table, vector, vector, EPS, **PLACES, site=0
    )
    heads = (rows + hidden).unflatten(-1, (2, 4))
    mixed = ops.varlen_attention(heads, heads, heads, CU, 3, scale=0.5, **DROPOUT, site=1)
    rows = ops.dropout_add_layer_norm(
        mixed.flatten(-2), rows, vector, vector, EPS, **PLACES, site=2
    )
    rows = ops.bias_gelu_layer_norm(ops.bias_gelu(rows, vector), vector, vector, vector, EPS)
    spans = torch.tensor([0, 3]), torch.tensor([2, 5]), torch.tensor([0, 2, 3], dtype=torch.int32)
    weight = table.repeat(1, 3)
    extra = ops.span_boundary_hidden(
        rows, *spans, table, weight, vector, vector, vector, EPS, num_rows=3
    )
    both = torch.cat([rows, extra])
    return ops.linear_cross_entropy(both, table, vector, vector, 8, targets).loss.sum()


@pytest.mark.parametrize("autocast", [False, True])
def test_packed_step_compiles_into_one_graph(autocast: bool) -> None:
    inputs = [leaf(8, 8), leaf(8, 8), leaf(8)]
    targets = torch.randint(0, 8, (11,))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(*inputs, targets)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    tolerance = {"rtol": 0.05, "atol": 0.1} if autocast else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(results[0], results[1], **tolerance)


def test_inductor_draws_the_same_mask() -> None:
    """One op only, because inductor calls a C++ compiler."""
    x, vector = torch.randn(8, 8), torch.ones(8)

    def normalise(x: Tensor) -> Tensor:
        return ops.dropout_add_layer_norm(x, x, vector, vector, EPS, **PLACES, site=2)

    compiled = torch.compile(normalise, fullgraph=True)
    torch.testing.assert_close(compiled(x), normalise(x))


def test_number_of_rows_may_change_without_compiling_again() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def losses(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        bias = weight[:, 0]
        return ops.linear_cross_entropy(rows, weight, bias, bias, 1, targets).loss

    compiled = torch.compile(losses, fullgraph=True, dynamic=True, backend=count)
    weight = leaf(11, 4)
    for num_rows in (6, 5, 9):
        rows, targets = leaf(num_rows, 4), torch.arange(num_rows)
        expected = losses(rows, weight, targets)
        torch.testing.assert_close(compiled(rows, weight, targets), expected)
    assert len(graphs) == 1
