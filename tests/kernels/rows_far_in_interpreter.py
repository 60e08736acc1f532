"""Rows whose elements lie beyond 2^31: only the last program of each launch runs.

The tensors are as large as they say, but of address space alone: no page of theirs is touched
except where the last rows lie.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.last_program import last_program_only as last_program_only
from spanbert_fast.kernels import activation, cross_entropy, embedding, norm, span_boundary
from spanbert_fast.kernels.segments import segment_sum

pytestmark = pytest.mark.usefixtures("last_program_only")
HALF = torch.float16
SIZE = 4096
ROWS = (1 << 31) // SIZE + 5
LAST = slice(ROWS - 5, ROWS)
# Whole chunks of 4,096, so that the last tile of the last chunk is not an empty one.
CLASSES = (1 << 31) // SIZE + 4096
ENDING = slice(CLASSES - 5, CLASSES)


def far(rows: int = ROWS) -> Tensor:
    """[rows, SIZE] with values in the last five rows."""
    values = torch.empty(rows, SIZE, dtype=HALF)
    values[-5:] = torch.randn(5, SIZE)
    return values


def parameter(*shape: int) -> Tensor:
    return torch.randn(*shape).to(HALF)


def statistics() -> tuple[Tensor, Tensor]:
    mean, rstd = torch.empty(ROWS), torch.empty(ROWS)
    mean[LAST], rstd[LAST] = 0.0, 1.0
    return mean, rstd


def norm_of(values: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(values.float(), (SIZE,), eps=1e-12)


def assert_last(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result[LAST].float(), expected.float(), rtol=0.02, atol=0.02)


def gradient_of(function: Any, values: Tensor, dy: Tensor) -> Tensor:
    leaf = values.float().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, dy.float())[0]


def test_norm() -> None:
    ones, zeros = torch.ones(SIZE), torch.zeros(SIZE)
    none = (0, 0, None, None, None)
    x, residual, dy = far(), far(), far()
    total = (x[LAST] + residual[LAST]).float()
    out, mean, rstd = norm._forward_op(x, residual, ones, zeros, 1e-12, *none)
    assert_last(out, norm_of(total))
    dx, _, _ = norm._backward_op(dy, x, residual, ones, mean, rstd, *none)
    assert_last(dx, gradient_of(norm_of, total, dy[LAST]))


def test_activation() -> None:
    x, dy, zeros = far(), far(), torch.zeros(SIZE)
    gelu = torch.nn.functional.gelu
    columns = slice(SIZE - 1024, SIZE)
    out = activation._gelu_op(x, zeros)
    torch.testing.assert_close(out[LAST, columns], gelu(x[LAST, columns]), rtol=0.01, atol=0.01)
    dx, _ = activation._gelu_backward_op(dy, x, zeros)
    expected = gradient_of(gelu, x[LAST], dy[LAST])[:, columns]
    torch.testing.assert_close(dx[LAST, columns].float(), expected, rtol=0.01, atol=0.01)
    out, mean, rstd = activation._gelu_norm_op(x, zeros, torch.ones(SIZE), zeros, 1e-12)
    assert_last(out, norm_of(gelu(x[LAST].float())))
    dx, _ = activation._gelu_norm_backward_op(dy, x, zeros, torch.ones(SIZE), mean, rstd)
    assert_last(dx, gradient_of(lambda values: norm_of(gelu(values)), x[LAST], dy[LAST]))


def test_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, nowhere = torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    word, small = far(), torch.zeros(1, SIZE, dtype=HALF)
    ones, zeros = torch.ones(SIZE), torch.zeros(SIZE)
    none = (0, 0, None, None, None)
    tables = (ids, nowhere, nowhere, word, small, small)
    out, mean, rstd = embedding._forward_op(*tables, ones, zeros, 1e-12, HALF, *none)
    assert_last(out, norm_of(word[LAST]))
    seen = []
    monkeypatch.setattr(
        embedding, "segment_sum", lambda rows, *_: seen.append(rows) or small.clone()
    )
    dy = far()
    embedding._backward_op(dy, *tables, ones, mean, rstd, *none)
    assert_last(seen[0], gradient_of(norm_of, word[LAST], dy[LAST]))


def test_sorted_sums() -> None:
    keys = torch.zeros(ROWS, dtype=torch.int64)
    keys[LAST] = torch.tensor([1, 1, 1, 2, 2])
    rows = far()
    out = segment_sum(rows, keys, 3, torch.float32)
    columns = slice(SIZE - 64, SIZE)
    expected = torch.stack([rows[LAST][:3].float().sum(0), rows[LAST][3:].float().sum(0)])
    torch.testing.assert_close(out[1:, columns], expected[:, columns], rtol=0.01, atol=0.01)


def test_span_boundary() -> None:
    by_span, slots, dy = far(), torch.zeros(1, SIZE, dtype=HALF), far()
    cu = torch.arange(ROWS + 1, dtype=torch.int32)
    ones, zeros = torch.ones(SIZE), torch.zeros(SIZE)
    last = slice(ROWS - 1, ROWS)

    def body(values: Tensor) -> Tensor:
        return norm_of(torch.nn.functional.gelu(values))

    out, mean, rstd = span_boundary._forward_op(by_span, slots, cu, zeros, ones, zeros, 1e-12, ROWS)
    torch.testing.assert_close(out[last].float(), body(by_span[last].float()), rtol=0.02, atol=0.02)
    dspan, _, _ = span_boundary._backward_op(dy, by_span, slots, cu, zeros, ones, mean, rstd)
    expected = gradient_of(body, by_span[last], dy[last])
    torch.testing.assert_close(dspan[last].float(), expected, rtol=0.02, atol=0.02)


def test_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    # One block of classes to a part, and of the chunks only the last: no time for the others.
    monkeypatch.setattr(cross_entropy, "_PROGRAMS", 1 << 30)
    monkeypatch.setattr(cross_entropy, "_SLOPE_BYTES", 1 << 14)
    weight, bias = far(CLASSES), torch.zeros(CLASSES)
    weight[-4096:-5] = 0
    rows = parameter(2, SIZE) / SIZE**0.5
    targets = torch.tensor([CLASSES - 2, CLASSES - 4])
    seen = {}

    def keep(name: str, **changes: Any) -> Any:
        kernel = getattr(cross_entropy, name)

        class Kept:
            def __getitem__(self, grid: Any) -> Any:
                def launch(*arguments: Any, **options: Any) -> None:
                    seen[name] = arguments
                    if name == "slope_of_logits":
                        arguments[8].zero_()
                    last = CLASSES - options.get("slope_stride", 0)
                    if options.get("first_class", last) >= last:
                        kernel[grid](*arguments, **{**options, **changes})

                return launch

        return Kept()

    for name in ("score_vocabulary", "slope_of_logits", "gradient_of_weight"):
        monkeypatch.setattr(cross_entropy, name, keep(name))
    # The parts that were not written are no input for it.
    monkeypatch.setattr(cross_entropy, "merge_parts", defaultdict(lambda: lambda *_, **__: None))
    monkeypatch.setattr(cross_entropy, "gradient_of_rows", keep("gradient_of_rows", ADD=False))
    cross_entropy._forward_op(rows, weight, bias, bias, 2, targets, None, 0.0, -100)
    logits = rows.float() @ weight[ENDING].float().T
    parts = seen["score_vocabulary"][5]
    torch.testing.assert_close(parts[-1, 2], logits[[0, 1], [3, 1]], rtol=0.01, atol=0.01)
    lse = logits.logsumexp(1)
    drows, dweight, _ = cross_entropy._backward_op(
        torch.ones(2), lse, rows, weight, bias, bias, 2, targets, None, 0.0, -100
    )
    slope = (logits - lse[:, None]).exp()
    slope[[0, 1], [3, 1]] -= 1
    columns = slice(SIZE - 128, SIZE)
    expected = (slope.T @ rows.float())[:, columns]
    torch.testing.assert_close(dweight[ENDING, columns].float(), expected, rtol=0.02, atol=0.01)
    expected = (slope @ weight[ENDING].float())[:, columns]
    torch.testing.assert_close(drows[:, columns].float(), expected, rtol=0.02, atol=0.02)
