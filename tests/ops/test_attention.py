"""Variable-length attention: gradients, laws of packing, accuracy, dropout, export."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_obeys_rule
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from spanbert_fast import ops
from spanbert_fast.ops import attention_planes
from spanbert_fast.ops.random import attention_keep_mask, dropout_scale

OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"dropout_p": 0.3},
    {"dropout_p": 0.3, "window": 1},
]


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    site: int = 1,
) -> Tensor:
    """One sequence after another, as PyTorch users write it."""
    outputs = [query[:0]]
    for index, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        q, k, v = (rows[start:end].transpose(0, 1) for rows in (query, key, value))
        places = torch.arange(end - start)
        visible = (places[:, None] - places).abs() <= (end if window is None else window)
        if dropout_p == 0.0:
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
        else:
            scores = (q @ k.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))
            name, length = int(sequence_ids[index]), end - start
            keep = attention_keep_mask(len(q), length, length, name, dropout_p, seed, site)
            mixed = (torch.softmax(scores, -1) * keep * dropout_scale(dropout_p)) @ v
        outputs.append(mixed.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture(params=OPTIONS, ids=lambda options: "-".join(options) or "plain")
def options(request: pytest.FixtureRequest, seed: Tensor, sequence_ids: Tensor) -> dict[str, Any]:
    return {"scale": 0.4, "seed": seed, "sequence_ids": sequence_ids, "site": 1, **request.param}


@pytest.fixture(autouse=True, params=[1 << 20, 1], ids=["one block", "plane by plane"])
def _block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_planes, "_BLOCK_BYTES", request.param)


def test_gradients(options: dict[str, Any], doubles: Callable[..., Tensor]) -> None:
    cu_seqlens = torch.tensor([0, 0, 3, 6, 8, 8, 9], dtype=torch.int32)
    inputs = [doubles(9, 2, 2) for _ in range(3)]
    assert gradcheck(lambda *rows: ops.varlen_attention(*rows, cu_seqlens, 3, **options), inputs)
    both = ops.varlen_attention_with_lse
    assert gradcheck(lambda *rows: tuple(both(*rows, cu_seqlens, 3, **options)), inputs)


def test_equals_plain_attention(
    options: dict[str, Any], cu_seqlens: Tensor, doubles: Callable[..., Tensor]
) -> None:
    inputs = [doubles(20, 2, 3) for _ in range(3)]
    result = ops.varlen_attention_with_lse(*inputs, cu_seqlens, 7, **options)
    torch.testing.assert_close(
        result.output, plain_attention(*inputs, cu_seqlens, **options), rtol=1e-12, atol=1e-12
    )
    query, key = (rows[13:20].transpose(0, 1) for rows in inputs[:2])
    places = torch.arange(7)
    far = (places[:, None] - places).abs() > options.get("window", 7)
    scores = (query @ key.transpose(1, 2) * 0.4).masked_fill(far, float("-inf"))
    torch.testing.assert_close(result.log_sum_exp[13:20], scores.logsumexp(-1).t())


def test_window_of_zero_gives_the_values(options: dict[str, Any], cu_seqlens: Tensor) -> None:
    rows = torch.randn(3, 20, 2, 8)
    own = {**options, "window": 0, "dropout_p": 0.0}
    assert torch.equal(ops.varlen_attention(*rows, cu_seqlens, 7, **own), rows[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy(
    options: dict[str, Any], dtype: torch.dtype, seed: Tensor, sequence_ids: Tensor
) -> None:
    cu_seqlens = torch.tensor([0, 40, 80, 111, 112], dtype=torch.int32)
    inputs = [torch.randn(112, 2, 16) for _ in range(3)]
    assert_obeys_rule(
        lambda *rows: ops.varlen_attention(*rows, cu_seqlens, 40, **options),
        lambda *rows: plain_attention(*rows, cu_seqlens, **options),
        inputs,
        dtype,
    )


def test_packed_equals_one_by_one(
    options: dict[str, Any], cu_seqlens: Tensor, sequence_ids: Tensor
) -> None:
    rows = torch.randn(3, 20, 2, 8)
    packed = ops.varlen_attention(*rows, cu_seqlens, 7, **options)
    for index, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        own = {**options, "sequence_ids": sequence_ids[index : index + 1]}
        alone = ops.varlen_attention(
            *rows[:, start:end], torch.tensor([0, end - start], dtype=torch.int32), 7, **own
        )
        torch.testing.assert_close(packed[start:end], alone)


def test_nothing_to_attend(options: dict[str, Any]) -> None:
    rows = torch.zeros(3, 0, 2, 4, requires_grad=True)
    for bounds in ([0], [0, 0, 0]):
        own = {**options, "sequence_ids": torch.arange(len(bounds) - 1)}
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        output = ops.varlen_attention(*rows, cu_seqlens, 0, **own)
        output.sum().backward()
        assert output.shape == (0, 2, 4)


def test_strided_inputs_and_expanded_gradients(options: dict[str, Any]) -> None:
    """Slices of one fused product, and transposed heads, give what dense copies give."""
    fused = torch.randn(20, 3 * 8)
    cu_seqlens = torch.tensor([0, 10, 20], dtype=torch.int32)
    views = {
        "fused": [part.unflatten(-1, (2, 4)) for part in fused.chunk(3, dim=-1)],
        "transposed": [
            part.unflatten(-1, (4, 2)).transpose(1, 2) for part in fused.chunk(3, dim=-1)
        ],
    }
    for rows in views.values():
        results = []
        for inputs in (rows, [row.contiguous() for row in rows]):
            leaves = [row.detach().requires_grad_() for row in inputs]
            output = ops.varlen_attention(*leaves, cu_seqlens, 10, **options)
            output.sum().backward()
            results.append([output, *(leaf.grad for leaf in leaves)])
        torch.testing.assert_close(results[0], results[1])


def test_autocast_computes_in_its_dtype(options: dict[str, Any], cu_seqlens: Tensor) -> None:
    rows = torch.randn(3, 20, 2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.varlen_attention(*rows, cu_seqlens, 7, **options)
        inside = ops.varlen_attention(*rows.bfloat16(), cu_seqlens, 7, **options)
        output.float().sum().backward()
    outside = ops.varlen_attention(*rows.bfloat16(), cu_seqlens, 7, **options)
    assert output.dtype is torch.bfloat16
    assert torch.equal(output, outside)
    assert torch.equal(inside, outside)
    assert rows.grad is not None
    assert rows.grad.dtype is torch.float32


def test_gradient_is_deterministic(options: dict[str, Any], cu_seqlens: Tensor) -> None:
    rows = torch.randn(3, 20, 2, 8, requires_grad=True)
    grads = []
    for _ in range(3):
        output = ops.varlen_attention(*rows, cu_seqlens, 7, **options)
        grads.append(torch.autograd.grad(output.square().sum(), rows)[0])
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("window", [None, 2])
def test_exported_form_is_plain_and_equal(window: int | None, cu_seqlens: Tensor) -> None:
    class Attend(torch.nn.Module):
        def forward(self, rows: Tensor, cu: Tensor) -> Tensor:
            return ops.varlen_attention(*rows.unbind(), cu, 7, scale=0.4, window=window)

    rows = torch.randn(3, 20, 2, 8)
    program = torch.export.export(Attend(), (rows, cu_seqlens))
    names = [str(node.target) for node in program.graph.nodes]
    assert not any("spanbert_fast" in name for name in names)
    assert any("scaled_dot_product_attention" in name for name in names)
    torch.testing.assert_close(program.module()(rows, cu_seqlens), Attend()(rows, cu_seqlens))


def test_wrong_arguments_are_named(cu_seqlens: Tensor, seed: Tensor) -> None:
    rows = torch.zeros(20, 2, 4)
    with pytest.raises(ValueError, match=r"have shapes .*, allowed is \[T, H, K\] for all"):
        ops.varlen_attention(rows, rows[:3], rows, cu_seqlens, 7, scale=1.0)
    with pytest.raises(ValueError, match="window is -1, allowed is None or a number >= 0"):
        ops.varlen_attention(rows, rows, rows, cu_seqlens, 7, scale=1.0, window=-1)
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1, so seed and sequence_ids"):
        ops.varlen_attention(rows, rows, rows, cu_seqlens, 7, scale=1.0, dropout_p=0.1, seed=seed)
