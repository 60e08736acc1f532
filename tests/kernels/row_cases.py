"""Inputs for the twins that work on rows, and the rule that each has to obey.

Used in processes of their own (`in_process.py`): Triton reads `TRITON_INTERPRET` once, and the
simulator refuses to run where it is set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from ops.tolerance import BACKWARD, FORWARD, assert_as_accurate
from torch import Tensor

from spanbert_fast import ops
from spanbert_fast.ops.dispatch import twins_on_cpu, use_backend

EPS = 1e-12
MAX_BYTES = 90
"""Of a token and layer, all norms, activations and embeddings, in units of the hidden size."""
OPS = (
    "dropout_add_layer_norm",
    "bias_gelu",
    "bias_gelu_layer_norm",
    "bert_embedding",
    "span_boundary_hidden",
    "linear_cross_entropy",
)


class Case(NamedTuple):
    """One call of an op: `function(*leaves)`; the leaves are what has a gradient."""

    op: str
    function: Callable[..., Tensor]
    leaves: list[Tensor]
    autocast: torch.dtype | None = None


class Shape(NamedTuple):
    """What a case is made of; each op reads what concerns it."""

    rows: int
    size: int
    dtype: torch.dtype
    parameters: torch.dtype | None = None
    """Dtype of parameters; None: that of the rows. float32 is what autocast gives."""
    dropout: float = 0.0
    unaligned: bool = False
    """Every tensor starts one element after a 16-byte boundary."""
    classes: int = 301
    label_smoothing: float = 0.0
    class_weights: bool = False


class _Maker:
    """Random tensors of one case."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.generator = torch.Generator().manual_seed(shape.rows + shape.size)

    def place(self, values: Tensor) -> Tensor:
        if not self.shape.unaligned:
            return values
        storage = values.new_empty(values.numel() + 1)
        return storage[1:].view(values.shape).copy_(values)

    def rows(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self.generator)
        return self.place(values.to(dtype or self.shape.dtype))

    def parameter(self, *shape: int) -> Tensor:
        return self.rows(*shape, dtype=self.shape.parameters or self.shape.dtype)

    def integers(self, high: int, count: int) -> Tensor:
        return self.place(torch.randint(high, (count,), generator=self.generator))

    def dropout(self) -> dict[str, Any]:
        """Lengths 0, 1, 0 and the rest: empty sequences, one of one token, a long one."""
        if not self.shape.dropout:
            return {}
        first = min(self.shape.rows, 1)
        bounds = torch.tensor([0, 0, first, first, self.shape.rows], dtype=torch.int32)
        return {
            "dropout_p": self.shape.dropout,
            "seed": torch.tensor(-1234567890123456789),
            "sequence_ids": torch.tensor([3, 2**40 + 1, 5, 2**31 + 7]),
            "cu_seqlens": self.place(bounds),
            "site": 16,
        }


def _norm(shape: Shape, make: _Maker) -> Case:
    rows, size = shape.rows, shape.size
    leaves = [make.rows(rows, size), make.rows(rows, size), make.parameter(size)]
    options = make.dropout()
    return Case(
        "dropout_add_layer_norm",
        lambda x, residual, weight, bias: ops.dropout_add_layer_norm(
            x, residual, weight, bias, EPS, **options
        ),
        [*leaves, make.parameter(size)],
    )


def _gelu(shape: Shape, make: _Maker) -> Case:
    leaves = [make.rows(shape.rows, shape.size), make.parameter(shape.size)]
    return Case("bias_gelu", ops.bias_gelu, leaves)


def _gelu_norm(shape: Shape, make: _Maker) -> Case:
    leaves = [make.rows(shape.rows, shape.size), *(make.parameter(shape.size) for _ in range(3))]
    return Case(
        "bias_gelu_layer_norm", lambda *inputs: ops.bias_gelu_layer_norm(*inputs, EPS), leaves
    )


def _embedding(shape: Shape, make: _Maker) -> Case:
    rows, size, options = shape.rows, shape.size, make.dropout()
    # One word is frequent, so that its rows reach over several windows of the sorted sum.
    ids = make.integers(20, rows) * (make.integers(3, rows) > 0)
    places = torch.arange(rows) % max(rows // 2, 1)
    types = make.integers(2, rows)
    tables = [make.parameter(count, size) for count in (31, max(rows, 1), 2)]
    return Case(
        "bert_embedding",
        lambda *inputs: ops.bert_embedding(ids, places, types, *inputs, EPS, **options),
        [*tables, make.parameter(size), make.parameter(size)],
    )


def _span_boundary(shape: Shape, make: _Maker) -> Case:
    lengths = [(3, 1, 0, 7, 2, 4)[index % 6] for index in range(shape.rows)]
    num_spans, size, slots, width = len(lengths), shape.size, 7, 24
    cu = make.place(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))
    # Neighbouring spans share a token, which then bounds two.
    left = make.place(torch.arange(num_spans))
    right = make.place(torch.arange(num_spans) + 1)
    weight = make.parameter(size, 2 * size + width)
    with torch.no_grad():
        weight /= (2 * size) ** 0.5
    leaves = [make.rows(num_spans + 1, size), make.parameter(slots, width), weight]
    return Case(
        "span_boundary_hidden",
        lambda hidden, *inputs: ops.span_boundary_hidden(
            hidden, left, right, cu, *inputs, EPS, num_rows=sum(lengths)
        ),
        [*leaves, *(make.parameter(size) for _ in range(3))],
    )


def _cross_entropy(shape: Shape, make: _Maker) -> Case:
    rows, classes = shape.rows, shape.classes
    targets = make.integers(classes, rows)
    targets[2::7] = -100
    options: dict[str, Any] = {"label_smoothing": shape.label_smoothing}
    if shape.class_weights:
        options["class_weight"] = torch.rand(classes, generator=make.generator)
    weights = torch.rand(rows, generator=make.generator)
    weight = make.parameter(classes, shape.size)
    with torch.no_grad():
        weight /= shape.size**0.5
    leaves = [make.rows(rows, shape.size), weight, *(make.parameter(classes) for _ in range(2))]
    return Case(
        "linear_cross_entropy",
        lambda matrix_rows, *inputs: (
            ops.linear_cross_entropy(
                matrix_rows, *inputs, rows * 2 // 3, targets, row_weight=weights, **options
            ).loss
        ),
        leaves,
    )


_MAKERS = dict(
    zip(OPS, (_norm, _gelu, _gelu_norm, _embedding, _span_boundary, _cross_entropy), strict=True)
)


def make_case(op: str, shape: Shape) -> Case:
    case = _MAKERS[op](shape, _Maker(shape))
    return case if shape.parameters is None else case._replace(autocast=shape.dtype)


def run(case: Case, backend: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The result and the gradient of each leaf; leaves are converted to `dtype` if it is given."""
    # A tensor made anew would be aligned, so leaves keep their storage unless they change dtype.
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in case.leaves]
    autocast = torch.autocast(
        "cpu", case.autocast or torch.bfloat16, enabled=bool(case.autocast) and dtype is None
    )
    with use_backend(backend), twins_on_cpu():
        with autocast:
            result = case.function(*leaves)
        generator = torch.Generator().manual_seed(1)
        above = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        # The gradient from above is the same numbers in every dtype.
        above = above.to(case.autocast or case.leaves[0].dtype).to(result.dtype)
        return [result.detach(), *torch.autograd.grad(result, leaves, above)]


def assert_obeys_rule(case: Case, ours: Sequence[Tensor]) -> None:
    exact, plain = run(case, "torch", torch.float64), run(case, "torch")
    for index, (result, other, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        name = f"{case.op}: " + (f"gradient {index - 1}" if index else "output")
        assert result.dtype is other.dtype, name
        assert result.shape == other.shape, name
        assert not result.isnan().any(), f"{name} has elements that were not written"
        if result.numel():
            assert_as_accurate(result, other, truth, BACKWARD if index else FORWARD, name)
