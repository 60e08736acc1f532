"""The twin of the banded op under Triton's interpreter; `test_banded_attention.py` runs it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from kernels.banded_cases import Case, assert_obeys_rule, run
from kernels.last_program import last_program_only as last_program_only
from spanbert_fast import ops
from spanbert_fast.kernels import banded_attention as banded
from spanbert_fast.ops.dispatch import backend_of, use_backend

HALF, SINGLE = torch.float16, torch.float32
CASES = [
    Case((37, 0, 1, 70), 2, 32, SINGLE, 9),
    Case((45,), 3, 64, SINGLE, 0),
    Case((1, 0, 4, 2) * 8, 2, 128, SINGLE, 50),
    Case((0,), 1, 32, SINGLE, 2),
    Case((), 2, 32, SINGLE, 2),
    Case((37, 0, 1, 140), 2, 64, HALF, 33),
    Case((130, 5), 1, 32, HALF, 3, unaligned=True),
    Case((2, 65, 0, 64), 3, 128, HALF, 70),
]


@pytest.fixture(autouse=True)
def _fill_empty_tensors_with_nan() -> None:
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_obeys_the_rule(case: Case) -> None:
    assert_obeys_rule(case, run(case, "triton"))


def test_triton_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_backend("triton"):
        assert backend_of("banded_attention", "cpu").backend == "triton"
    launched = []
    monkeypatch.setattr(banded, "_launch", lambda kernel, *_, **__: launched.append(kernel))
    run(Case((9,), 1, 32, SINGLE, 2), "triton")
    assert launched == [banded.banded_forward, *[banded.banded_backward] * 2]


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("reach", [16, 64, 128])
def test_results_do_not_depend_on_the_tile_size(
    block: int, reach: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((50, 1, 30), 2, 32, SINGLE, 21)
    expected = run(case, "triton")
    settings = banded.Settings(block, reach, 4, 1)
    monkeypatch.setattr(banded, "launch_settings", lambda *_: settings)
    for result, other in zip(run(case, "triton"), expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_strangers_of_any_size_have_probability_zero() -> None:
    """Scores between sequences that overflow, and ones that are not a number."""
    query, key, lse = Case((6, 7), 2, 32, SINGLE, 4).operands()
    cu = torch.tensor([0, 6, 13], dtype=torch.int32)
    alone = ops.banded_attention(query[:6], key[:6], lse[:6], cu[:2], scale=0.2, band=4)
    for stranger in (1e30, float("inf"), float("nan")):
        key[6:] = stranger
        with use_backend("triton"):
            near = ops.banded_attention(query, key, lse, cu, scale=0.2, band=4)
        torch.testing.assert_close(near[:6], alone)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_any_scale(scale: float) -> None:
    query, key, _ = Case((20,), 2, 32, SINGLE, 4).operands()
    lse, cu = torch.full((20, 2), 3.0), torch.tensor([0, 20], dtype=torch.int32)
    results = []
    for backend in ("torch", "triton"):
        leaves = [rows.detach().requires_grad_() for rows in (query, key, lse)]
        with use_backend(backend):
            near = ops.banded_attention(*leaves, cu, scale=scale, band=4)
        results.append([near, *torch.autograd.grad(near.sum(), leaves)])
    for result, other in zip(*results, strict=True):
        torch.testing.assert_close(result, other)


def test_bands_of_the_twin_of_attention() -> None:
    """Its log-sum-exp fits, and a band that covers a sequence has rows that sum to one."""
    query, key, _ = Case((20, 0, 33), 2, 32, SINGLE, 4).operands()
    cu = torch.tensor([0, 20, 20, 53], dtype=torch.int32)
    with use_backend("triton"):
        lse = ops.varlen_attention_with_lse(query, key, key, cu, 33, scale=0.2).log_sum_exp
        near = ops.banded_attention(query, key, lse, cu, scale=0.2, band=32)
    torch.testing.assert_close(near.sum(1), torch.ones(53))


def test_operators_pass_opcheck() -> None:
    query, key, lse = (
        rows.requires_grad_() for rows in Case((9, 0, 4), 2, 32, SINGLE, 3).operands()
    )
    rest = (torch.tensor([0, 9, 9, 13], dtype=torch.int32), 0.2, 3)
    opcheck(banded._forward_op, (query, key, lse.detach().t().requires_grad_(), *rest))
    plain = [rows.detach() for rows in (query, key, lse.t())]
    # A backward has no backward, so there is no graph of both to trace.
    utils = ("test_schema", "test_faketensor")
    opcheck(banded._backward_op, (torch.ones(13, 7), *plain, *rest), test_utils=utils)


def test_tokens_beyond_31_bits() -> None:
    """Three tokens 2^30 elements apart; the pages between them are never touched."""
    torch.use_deterministic_algorithms(False)
    storage = torch.empty(2**31 + 2 * 32, dtype=HALF)
    near = [torch.randn(3, 1, 32).to(HALF) for _ in range(2)]
    far = [storage.as_strided((3, 1, 32), (2**30, 32, 1), 32 * index) for index in range(2)]
    for there, here in zip(far, near, strict=True):
        there.copy_(here)
    rest = (torch.zeros(1, 3), torch.tensor([0, 3], dtype=torch.int32), 0.2, 2)
    above = torch.randn(3, 5)
    results = [
        [banded._forward_op(*rows, *rest), *banded._backward_op(above, *rows, *rest)]
        for rows in (near, far)
    ]
    for result, other in zip(*results, strict=True):
        assert result.count_nonzero()
        assert torch.equal(result, other)


@pytest.mark.usefixtures("last_program_only")
def test_band_beyond_31_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last elements of band and gradients lie beyond 2^31; only the last rows are real."""
    torch.use_deterministic_algorithms(False)
    # One tile has all that a block meets, so that the last program writes all of the last rows.
    monkeypatch.setattr(banded, "launch_settings", lambda *_: banded.Settings(64, 128, 8, 1))
    num_tokens, band, num_heads = 2**31 // 64 + 5, 32, 2
    last = slice(num_tokens - 5, num_tokens)
    cu = torch.tensor([0, num_tokens - 5, num_tokens], dtype=torch.int32)
    query, key = (torch.empty(num_tokens, num_heads, 32, dtype=HALF) for _ in range(2))
    lse, above = torch.empty(num_heads, num_tokens), torch.empty(num_tokens, 2 * band + 1)
    for rows in (query, key):
        rows[last] = torch.randn(5, num_heads, 32).to(HALF)
    lse[:, last], above[last] = 1.0, torch.randn(5, 2 * band + 1)
    leaves = [rows[last].float().requires_grad_() for rows in (query, key)]
    leaves.append(torch.ones(5, num_heads, requires_grad=True))
    small = torch.tensor([0, 5], dtype=torch.int32)
    expected = ops.banded_attention(*leaves, small, scale=0.2, band=band)
    gradients = torch.autograd.grad(expected, leaves, above[last])
    near = banded._forward_op(query, key, lse, cu, 0.2, band)
    torch.testing.assert_close(near[last], expected.detach(), rtol=1e-3, atol=1e-3)
    grads = banded._backward_op(above, query, key, lse, cu, 0.2, band)
    for result, other in zip(grads[:2], gradients[:2], strict=True):
        # The last program is the last head's.
        found = result[last, -1].float()
        assert found.count_nonzero()
        torch.testing.assert_close(found, other[:, -1], rtol=0.01, atol=1e-4)
    torch.testing.assert_close(grads[2][-1, last], gradients[2][:, -1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": torch.float64}, TypeError, "query has dtype torch.float64, allowed"),
        ({"head_size": 40}, ValueError, r"head size is 40, allowed are \(32, 64, 128\)"),
        ({"band": -1}, ValueError, "band is -1, allowed is a number >= 0"),
    ],
)
def test_wrong_inputs_raise(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = Case((5,), 1, 32, SINGLE, 1)._replace(**change)
    with use_backend("triton"), pytest.raises(error, match=message):
        ops.banded_attention(*case.operands(), case.cu_seqlens, scale=1.0, band=case.band)


def test_operands_that_do_not_fit_raise() -> None:
    case = Case((5,), 1, 32, SINGLE, 1)
    query, key, lse = case.operands()

    def call(*rows: Tensor, cu: Tensor = case.cu_seqlens) -> None:
        with use_backend("triton"):
            ops.banded_attention(*rows, cu, scale=1.0, band=1)

    with pytest.raises(ValueError, match=r"query, key, log_sum_exp have shapes"):
        call(query, key, lse[:4])
    with pytest.raises(TypeError, match=r"key has dtype torch\.float16, allowed is the query's"):
        call(query, key.half(), lse)
    with pytest.raises(TypeError, match=r"cu_seqlens has dtype torch\.int64, allowed"):
        call(query, key, lse, cu=case.cu_seqlens.long())


def test_a_head_of_other_strides() -> None:
    """Rows whose elements are not neighbours are copied first."""
    query, key, lse = Case((23,), 2, 32, SINGLE, 4).operands()
    cu = torch.tensor([0, 23], dtype=torch.int32)
    turned = [rows.transpose(1, 2).contiguous().transpose(1, 2) for rows in (query, key)]
    with use_backend("triton"):
        results = [
            ops.banded_attention(*rows, lse.contiguous(), cu, scale=0.2, band=4)
            for rows in ((query, key), turned)
        ]
    assert torch.equal(*results)


def test_every_pair_is_met_once() -> None:
    """With scores of zero and a log-sum-exp of zero, the band says who is whose neighbour."""
    lengths = (3, 0, 70, 1, 20)
    case = Case(lengths, 2, 32, HALF, 11)
    query, key, lse = (torch.zeros_like(rows) for rows in case.operands())
    with use_backend("triton"):
        near = ops.banded_attention(query, key, lse, case.cu_seqlens, scale=1.0, band=11)
    owners = list(itertools.chain(*([index] * length for index, length in enumerate(lengths))))
    for row, column in itertools.product(range(94), range(23)):
        other = row + column - 11
        is_near = 0 <= other < 94 and owners[row] == owners[other]
        assert near[row, column] == is_near
