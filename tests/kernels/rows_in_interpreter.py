"""The twins under Triton's interpreter; `test_*.py` runs this file in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

from kernels.row_cases import OPS, Shape, assert_obeys_rule, make_case, run
from spanbert_fast import ops
from spanbert_fast.kernels import activation, cross_entropy, embedding, norm, span_boundary
from spanbert_fast.ops.dispatch import backend_of, use_backend

HALF, SINGLE = torch.float16, torch.float32
SHAPES = [
    Shape(21, 40, SINGLE, dropout=0.1),
    Shape(37, 72, HALF, dropout=0.5, label_smoothing=0.1, class_weights=True),
    Shape(19, 24, HALF, SINGLE, class_weights=True, unaligned=True, classes=130),
    Shape(1, 40, HALF, dropout=0.1, label_smoothing=0.1, classes=70),
    Shape(0, 40, SINGLE, dropout=0.1),
]


@pytest.fixture(autouse=True)
def _fill_empty_tensors_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)
    # Several chunks of the vocabulary, and several blocks in a part of it.
    monkeypatch.setattr(cross_entropy, "_SLOPE_BYTES", 1 << 14)
    monkeypatch.setattr(cross_entropy, "_PROGRAMS", 4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_obeys_the_rule(op: str, shape: Shape) -> None:
    case = make_case(op, shape)
    assert_obeys_rule(case, run(case, "triton"))


@pytest.mark.parametrize("op", OPS)
def test_triton_is_what_runs(op: str) -> None:
    with use_backend("triton"):
        assert backend_of(op, "cpu").backend == "triton"


@pytest.mark.parametrize("op", OPS)
def test_float64_raises(op: str) -> None:
    case = make_case(op, Shape(3, 24, torch.float64))
    with pytest.raises(TypeError, match=r"float64.*allowed"):
        run(case, "triton")


@pytest.mark.parametrize("op", ["dropout_add_layer_norm", "bert_embedding"])
def test_dropout_does_not_depend_on_the_packing(op: str) -> None:
    """The mask of a sequence is that of its id, wherever it stands."""
    case = make_case("dropout_add_layer_norm", Shape(24, 40, SINGLE))
    x, residual, weight, bias = case.leaves
    seed, kinds = torch.tensor(5), {"dropout_p": 0.5, "site": 3}

    def rows(tokens: slice, bounds: list[int], ids: list[int]) -> torch.Tensor:
        places = {
            "seed": seed,
            "sequence_ids": torch.tensor(ids),
            "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        }
        with use_backend("triton"):
            if op == "dropout_add_layer_norm":
                return ops.dropout_add_layer_norm(
                    x[tokens], residual[tokens], weight, bias, 1e-12, **kinds, **places
                )
            index = torch.arange(24)[tokens]
            tables = (x, residual, x, weight, bias)
            return ops.bert_embedding(index, index, index, *tables, 1e-12, **kinds, **places)

    together = rows(slice(None), [0, 5, 24], [8, 9])
    torch.testing.assert_close(together[:5], rows(slice(0, 5), [0, 5], [8]), rtol=0, atol=0)
    torch.testing.assert_close(together[5:], rows(slice(5, 24), [0, 19], [9]), rtol=0, atol=0)


def test_dropout_without_its_arguments_raises() -> None:
    case = make_case("dropout_add_layer_norm", Shape(3, 24, SINGLE))
    with use_backend("triton"):
        with pytest.raises(ValueError, match="sequence_ids and cu_seqlens have to be given"):
            ops.dropout_add_layer_norm(*case.leaves, 1e-12, dropout_p=0.1)
        with pytest.raises(ValueError, match=r"dropout_p is 1\.0"):
            ops.dropout_add_layer_norm(*case.leaves, 1e-12, dropout_p=1.0)


def test_eps_of_1e_12_keeps_a_constant_row_finite() -> None:
    row, parameter = torch.ones(1, 40, dtype=HALF), torch.ones(40, dtype=HALF)
    with use_backend("triton"):
        out = ops.dropout_add_layer_norm(row, row, parameter, parameter, 1e-12)
    torch.testing.assert_close(out, row)


def test_number_of_correct_predictions_and_ignored_rows() -> None:
    rows, weight = torch.eye(5, 16), torch.eye(7, 16) * 9
    zeros = torch.zeros(7)
    # Row 3 points at class 3; its target is another. Row 4 is ignored. Row 2 is an SBO row.
    targets = torch.tensor([0, 1, 2, 6, -100])
    for backend in ("torch", "triton"):
        with use_backend(backend):
            result = ops.linear_cross_entropy(rows, weight, zeros, zeros, 2, targets)
        assert result.correct.tolist() == [True, True, True, False, False]
        assert result.loss[4] == 0


def test_first_class_wins_a_tie_across_blocks() -> None:
    rows, weight, bias = torch.ones(2, 16), torch.zeros(150, 16), torch.zeros(150)
    bias[[70, 140]] = 1.0
    with use_backend("triton"):
        result = ops.linear_cross_entropy(rows, weight, bias, bias, 1, torch.tensor([70, 140]))
    assert result.correct.tolist() == [True, False]


def test_target_outside_the_vocabulary_gives_nan() -> None:
    rows, weight, bias = torch.ones(2, 16), torch.zeros(7, 16), torch.zeros(7)
    with use_backend("triton"):
        loss = ops.linear_cross_entropy(rows, weight, bias, bias, 1, torch.tensor([7, 3])).loss
    assert loss.isnan().tolist() == [True, False]


def test_matrix_gradient_under_autocast_is_not_rounded() -> None:
    case = make_case("linear_cross_entropy", Shape(40, 24, SINGLE, classes=33))
    rows, weight, *biases = case.leaves
    targets = torch.arange(40) % 33

    def gradient(backend: str, kind: torch.dtype) -> torch.Tensor:
        leaf = weight.to(kind).requires_grad_()
        with use_backend(backend), torch.autocast("cpu", HALF, enabled=kind is SINGLE):
            losses = ops.linear_cross_entropy(
                rows.half().to(kind), leaf, *(bias.to(kind) for bias in biases), 20, targets
            ).loss
        return torch.autograd.grad(losses.sum(), leaf)[0]

    exact = gradient("torch", torch.float64)
    ours, reference = (gradient(name, SINGLE) for name in ("triton", "torch"))
    assert ours.dtype is SINGLE
    assert (ours - exact).square().mean() <= (reference - exact).square().mean()


def _operands(op: str, **changes: object) -> list[torch.Tensor]:
    shape = Shape(9, 24, SINGLE, classes=33)._replace(**changes)
    return [leaf.requires_grad_() for leaf in make_case(op, shape).leaves]


def opcheck_backward(op: Any, operands: tuple[object, ...]) -> None:
    """A backward has no backward, so there is no graph of both to trace."""
    opcheck(op, operands, test_utils=("test_schema", "test_faketensor"))


PLACES = (torch.tensor(3), torch.tensor([7, 8]), torch.tensor([0, 4, 9], dtype=torch.int32))


@pytest.mark.parametrize("dropout", [(0, 1, None, None, None), (9999, 1, *PLACES)])
def test_norm_and_embedding_pass_opcheck(dropout: tuple[object, ...]) -> None:
    operands = _operands("dropout_add_layer_norm")
    opcheck(norm._forward_op, (*operands, 1e-12, *dropout))
    x, residual, weight, _ = (leaf.detach() for leaf in operands)
    statistics = torch.ones(9), torch.ones(9)
    opcheck_backward(norm._backward_op, (x, x.clone(), residual, weight, *statistics, *dropout))
    where = torch.arange(9) % 2
    tables = _operands("bert_embedding")
    opcheck(embedding._forward_op, (where, where, where, *tables, 1e-12, SINGLE, *dropout))
    *plain, _ = (leaf.detach() for leaf in tables)
    opcheck_backward(
        embedding._backward_op, (x, where, where, where, *plain, *statistics, *dropout)
    )


def test_activation_passes_opcheck() -> None:
    operands = _operands("bias_gelu_layer_norm")
    opcheck(activation._gelu_op, tuple(operands[:2]))
    opcheck(activation._gelu_norm_op, (*operands, 1e-12))
    x, bias, weight, _ = (leaf.detach() for leaf in operands)
    opcheck_backward(activation._gelu_backward_op, (x, x.clone(), bias))
    statistics = torch.ones(9), torch.ones(9)
    opcheck_backward(activation._gelu_norm_backward_op, (x, x.clone(), bias, weight, *statistics))


def test_span_boundary_passes_opcheck() -> None:
    hidden, _, _, *parameters = _operands("span_boundary_hidden")
    ends = torch.arange(4), torch.arange(4) + 2
    opcheck(span_boundary._boundary_op, (hidden, *ends))
    opcheck_backward(span_boundary._boundary_backward_op, (torch.ones(4, 48), *ends, 10))
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    parts = torch.randn(3, 24, requires_grad=True), torch.randn(4, 24, requires_grad=True)
    opcheck(span_boundary._forward_op, (*parts, cu, *parameters, 1e-12, 5))
    plain = [part.detach() for part in parts]
    bias, weight, _ = (leaf.detach() for leaf in parameters)
    statistics = torch.ones(5), torch.ones(5)
    opcheck_backward(
        span_boundary._backward_op, (torch.ones(5, 24), *plain, cu, bias, weight, *statistics)
    )


def test_cross_entropy_passes_opcheck() -> None:
    operands = _operands("linear_cross_entropy")
    options = (4, torch.arange(9), torch.rand(33), 0.1, -100)
    opcheck(cross_entropy._forward_op, (*operands, *options))
    plain = [leaf.detach() for leaf in operands]
    opcheck_backward(cross_entropy._backward_op, (torch.ones(9), torch.ones(9), *plain, *options))


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    rows, weight, *biases = _operands("linear_cross_entropy")
    with FlopCounterMode(display=False) as counter, use_backend("triton"):
        loss = ops.linear_cross_entropy(rows, weight, *biases, 4, torch.arange(9)).loss
        loss.sum().backward()
    assert counter.get_total_flops() == 8 * 9 * 24 * 33
