"""Which body runs: orders are obeyed or raise, and twins are found by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from spanbert_fast import ops
from spanbert_fast.ops import dispatch

OPS = [
    "banded_attention",
    "bert_embedding",
    "bias_gelu",
    "bias_gelu_layer_norm",
    "dropout_add_layer_norm",
    "linear_cross_entropy",
    "span_boundary_hidden",
    "varlen_attention",
    "varlen_attention_with_lse",
]


def test_every_op_is_registered_and_public() -> None:
    assert ops.op_names() == OPS
    assert all(callable(getattr(ops, name)) for name in OPS)


def test_setting_is_restored_and_checked() -> None:
    assert ops.get_backend() == "auto"
    with ops.use_backend("torch"):
        assert ops.get_backend() == "torch"
    with pytest.raises(ZeroDivisionError), ops.use_backend("torch"):
        1 / 0  # noqa: B018
    assert ops.get_backend() == "auto"
    with pytest.raises(ValueError, match="backend is 'cuda', allowed are auto, torch, triton"):
        ops.set_backend("cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="op is 'gelu', allowed are banded_attention"):
        ops.backend_of("gelu", "cpu")


def test_triton_order_without_gpu_raises_at_the_call() -> None:
    with ops.use_backend("triton"):
        choices = [ops.backend_of(name, "cpu") for name in OPS]
        with pytest.raises(RuntimeError, match="bias_gelu: backend 'triton' was ordered, but"):
            ops.bias_gelu(torch.zeros(2, 3), torch.zeros(3))
        with pytest.raises(RuntimeError, match="linear_cross_entropy: backend 'triton'"):
            ops.linear_cross_entropy(
                rows=torch.zeros(2, 3),
                weight=torch.zeros(5, 3),
                mlm_bias=torch.zeros(5),
                sbo_bias=torch.zeros(5),
                num_mlm=1,
                targets=torch.zeros(2, dtype=torch.int64),
            )
    assert {choice.backend for choice in choices} == {"none"}


@pytest.fixture
def doubling() -> Iterator[Any]:
    """An op `y = x` whose twin gives `2x`, so that one sees which ran."""
    name = "spanbert_fast.kernels.made_up"
    kernel = ModuleType(name)
    kernel.doubled = lambda x: 2 * x  # type: ignore[attr-defined]
    parent = sys.modules.setdefault("spanbert_fast.kernels", ModuleType("spanbert_fast.kernels"))
    sys.modules[name] = kernel

    def doubled(x: Tensor) -> Tensor:
        return x

    doubled.__module__ = "spanbert_fast.ops.made_up"
    op = dispatch.accelerated(doubled)
    dispatch._twin_of("doubled")
    yield op
    del sys.modules[name], dispatch._rooms["doubled"], dispatch._twins["doubled"]
    if not hasattr(parent, "__path__"):
        del sys.modules["spanbert_fast.kernels"]


def test_twin_is_found_and_runs_where_it_can(
    doubling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_twins_run_on_cpu", False)
    one = torch.ones(1)
    assert doubling(one) == 1
    assert ops.backend_of("doubled", "cuda").backend == "triton"
    with ops.use_backend("torch"):
        assert ops.backend_of("doubled", "cuda").backend == "torch"
    with ops.use_backend("triton"):
        with pytest.raises(RuntimeError, match="tensors are on 'cpu' and Triton runs on CUDA"):
            doubling(one)
        with dispatch.twins_on_cpu():
            assert doubling(one) == 2
            assert doubling(x=one) == 2
    with dispatch.twins_on_cpu():
        assert doubling(one) == 1, "auto runs the reference on the CPU"


def test_setting_is_seen_by_compiled_code(doubling: Any) -> None:
    compiled = torch.compile(doubling, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)) == 1
    with dispatch.twins_on_cpu(), ops.use_backend("triton"):
        assert compiled(torch.ones(1)) == 2
    assert compiled(torch.ones(1)) == 1


@pytest.mark.skipif(torch.version.cuda is not None, reason="twins can run on this build of torch")
def test_triton_is_not_loaded_where_nobody_orders_it() -> None:
    program = "import sys, spanbert_fast.ops; print('triton' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert answer.stdout.strip() == b"False"


def test_op_without_tensors_is_refused() -> None:
    with pytest.raises(TypeError, match="without a tensor"):
        ops.bias_gelu(1.0, 2.0)  # type: ignore[arg-type]
