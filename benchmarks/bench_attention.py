"""Attention of packed sequences against PyTorch's own kernels, forward and backward.

Peers: `scaled_dot_product_attention` on padded planes (flash on a GPU where no padding forbids it;
on a CPU with dropout it falls back to written-out mathematics), `varlen_attn` and FlexAttention
with a document mask (both without dropout). Ours draws reproducible bits.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timing import NO_BF16, Case, skip, time_in_turn
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from workload import WORKLOADS, Setting, places, relative_error

from spanbert_fast import ops, use_backend

HEAD_SIZE = 64
SCALE = HEAD_SIZE**-0.5
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def boundaries(setting: Setting, workload: str) -> tuple[Tensor, int]:
    """Packed boundaries int32 [B + 1] and the longest length."""
    lengths = torch.tensor(setting.lengths(workload))
    cu = functional.pad(lengths.cumsum(0), (1, 0)).int().to(setting.device)
    return cu, int(lengths.max())


def ours(cu: Tensor, longest: int, dropout: float, backend: str = "auto") -> Attend:
    """[T, H, K] by our op."""
    seed = torch.tensor(1, device=cu.device)
    sequence_ids = torch.arange(len(cu) - 1, device=cu.device)

    def attend(*rows: Tensor) -> Tensor:
        with use_backend(backend):
            return ops.varlen_attention(
                *rows,
                cu,
                longest,
                scale=SCALE,
                dropout_p=dropout,
                seed=seed,
                sequence_ids=sequence_ids,
                site=1,
            )

    return attend


def padded_sdpa(cu: Tensor, longest: int, dropout: float) -> Attend:
    """[T, H, K] by PyTorch's op on [B, H, S, K]; full sequences need neither mask nor gather."""
    num_sequences, where = len(cu) - 1, places(cu, longest)
    is_full = len(where) == num_sequences * longest
    keys = torch.zeros(num_sequences * longest, dtype=torch.bool, device=cu.device)
    keys[where] = True
    mask = None if is_full else keys.view(num_sequences, 1, 1, longest)
    flash = is_full and cu.is_cuda
    backends = [SDPBackend.FLASH_ATTENTION] if flash else list(SDPBackend.__members__.values())

    def plane(rows: Tensor) -> Tensor:
        if not is_full:
            empty = rows.new_zeros(num_sequences * longest, *rows.shape[1:])
            rows = empty.index_copy(0, where, rows)
        return rows.view(num_sequences, longest, *rows.shape[1:]).transpose(1, 2)

    def attend(*rows: Tensor) -> Tensor:
        planes = [plane(row) for row in rows]
        with sdpa_kernel([b for b in backends if b is not SDPBackend.ERROR]):
            mixed = functional.scaled_dot_product_attention(
                *planes, attn_mask=mask, dropout_p=dropout, scale=SCALE
            )
        flat = mixed.transpose(1, 2).flatten(0, 1)
        return flat if is_full else flat.index_select(0, where)

    return attend


def varlen(cu: Tensor, longest: int, dropout: float) -> Attend:
    """[T, H, K] by `torch.nn.attention.varlen`, where this PyTorch has it."""
    assert dropout == 0
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    arguments = (cu, cu, longest, longest)
    inspect.signature(varlen_attn).bind(cu, cu, cu, *arguments, scale=SCALE)
    return lambda *rows: varlen_attn(*rows, *arguments, scale=SCALE)


def flex(cu: Tensor, longest: int, dropout: float, compiler: str = "inductor") -> Attend:
    """[T, H, K] by FlexAttention over one row whose blocks are the sequences."""
    assert dropout == 0
    document = torch.repeat_interleave(
        torch.arange(len(cu) - 1, device=cu.device), cu.diff().long()
    )
    num_tokens = len(document)

    def same_document(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document[query] == document[key]

    mask: Any = create_block_mask(same_document, None, None, num_tokens, num_tokens, cu.device)
    compiled: Any = torch.compile(flex_attention, backend=compiler, dynamic=False)

    def attend(*rows: Tensor) -> Tensor:
        planes = [row.transpose(0, 1).unsqueeze(0) for row in rows]
        mixed: Tensor = compiled(*planes, block_mask=mask, scale=SCALE)
        return mixed.squeeze(0).transpose(0, 1)

    return attend


def make_rows(setting: Setting, num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value [T, H, K] with gradients."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_tokens, setting.sizes.attention_heads, HEAD_SIZE)
    rows = [torch.randn(shape, generator=generator).to(setting.device, dtype) for _ in range(3)]
    return [row.requires_grad_() for row in rows]


def step_of(attend: Attend, rows: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Forward and backward: output and three gradients."""
    slope = torch.linspace(-1, 1, rows[0].numel(), device=rows[0].device, dtype=rows[0].dtype)

    def step() -> list[Tensor]:
        out = attend(*rows)
        return [out.detach(), *torch.autograd.grad(out, rows, slope.view_as(out))]

    return step


def assert_agree(setting: Setting, workload: str, dtype: torch.dtype, peer: Attend) -> None:
    """Both without dropout, from float64: no error over twice (gradients thrice) the other's."""
    cu, longest = boundaries(setting, workload)
    rows = make_rows(setting, int(cu[-1]), dtype)
    math = padded_sdpa(cu.cpu(), longest, 0.0)
    exact = step_of(math, [row.detach().cpu().double().requires_grad_() for row in rows])()
    own, other = step_of(ours(cu, longest, 0.0), rows)(), step_of(peer, rows)()
    for index, expected in enumerate(exact):
        error, theirs = (relative_error(x[index].cpu(), expected) for x in (own, other))
        factor = 3 if index else 2
        assert error <= factor * max(theirs, torch.finfo(dtype).eps / 2), f"tensor {index}"
        assert theirs <= factor * max(error, torch.finfo(dtype).eps / 2), f"tensor {index}"


def size_of(setting: Setting) -> str:
    """What stands for the model in a table."""
    return f"{setting.sizes.attention_heads} heads of {HEAD_SIZE}"


def name_rows(name: tuple[str, torch.dtype, float, str]) -> tuple[str, ...]:
    """The row of the table of bars that a comparison answers."""
    workload, dtype, dropout, title = name
    if workload != "full-512" or not dropout or title != "padded SDPA":
        return ()
    return ("12",) if dtype == torch.bfloat16 else ("12 (fp32)",)


def compare(
    benchmark: BenchmarkFixture,
    setting: Setting,
    name: tuple[str, torch.dtype, float, str],
    peer: Callable[[Tensor, int, float], Attend],
) -> None:
    """Asserts that both agree without dropout, then times them in turn."""
    workload, dtype, dropout, title = name
    cu, longest = boundaries(setting, workload)
    assert_agree(setting, workload, dtype, peer(cu, longest, 0.0))
    rows = make_rows(setting, int(cu[-1]), dtype)
    own, other = ours(cu, longest, dropout), peer(cu, longest, dropout)
    benchmark.group = f"attention {workload}, {dtype}, dropout {dropout}"
    case = Case(
        rows=name_rows(name), workload=workload, peer=title, dropout=dropout, model=size_of(setting)
    )
    time_in_turn(benchmark, setting.at(dtype), case, step_of(own, rows), step_of(other, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_sdpa(
    benchmark: BenchmarkFixture,
    setting: Setting,
    workload: str,
    dropout: float,
    dtype: torch.dtype,
) -> None:
    if setting.device.type == "cuda" and dtype == torch.float32:
        pytest.skip("flash attention takes 16-bit dtypes only")
    name = (workload, dtype, dropout, "padded SDPA")
    case = Case(
        rows=name_rows(name),
        workload=workload,
        peer=name[3],
        dropout=dropout,
        model=size_of(setting),
    )
    if dtype == torch.bfloat16 and not setting.has_bf16:
        skip(benchmark, setting.at(dtype), case, NO_BF16)
    compare(benchmark, setting, name, padded_sdpa)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_varlen(benchmark: BenchmarkFixture, setting: Setting, workload: str) -> None:
    pytest.importorskip("torch.nn.attention.varlen", reason="this PyTorch has no varlen_attn")
    if setting.device.type != "cuda":
        varlen(*boundaries(setting, workload), 0.0)
        pytest.skip("varlen_attn has no CPU kernel; its arguments were checked")
    compare(benchmark, setting, (workload, setting.dtype, 0.0, "varlen_attn"), varlen)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_flex(benchmark: BenchmarkFixture, setting: Setting, workload: str) -> None:
    def peer(cu: Tensor, longest: int, dropout: float) -> Attend:
        return flex(cu, longest, dropout, setting.sizes.compiler)

    if setting.device.type != "cuda":
        cu, longest = boundaries(setting, workload)
        rows = [row.detach().float() for row in make_rows(setting, int(cu[-1]), torch.float32)]
        with torch.no_grad():
            found, expected = peer(cu, longest, 0.0)(*rows), ours(cu, longest, 0.0)(*rows)
        assert relative_error(found, expected) < 1e-5
        pytest.skip("FlexAttention has no backward on a CPU; its forward was checked")
    compare(benchmark, setting, (workload, setting.dtype, 0.0, "FlexAttention"), peer)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_backend_torch(
    benchmark: BenchmarkFixture, setting: Setting, workload: str, dropout: float
) -> None:
    if setting.device.type != "cuda":
        pytest.skip("the Triton kernels are timed on a GPU only; this device is a CPU")

    def peer(cu: Tensor, longest: int, dropout: float) -> Attend:
        return ours(cu, longest, dropout, "torch")

    compare(benchmark, setting, (workload, setting.dtype, dropout, "our torch backend"), peer)
