"""The attention twin under Triton's interpreter; `test_attention.py` runs this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention_cases import Case, assert_obeys_rule, run
from spanbert_fast import ops
from spanbert_fast.kernels import common
from spanbert_fast.kernels.attention import operators
from spanbert_fast.kernels.attention.settings import Settings
from spanbert_fast.ops.dispatch import backend_of, use_backend

HALF, SINGLE = torch.float16, torch.float32
CASES = [
    Case((37, 0, 1, 70), 2, 32, SINGLE, 0.1),
    Case((45,), 1, 64, SINGLE, lse_has_gradient=True),
    Case((33, 90), 1, 32, SINGLE, 0.5, window=17, unaligned=True, lse_has_gradient=True),
    Case((1, 0, 4), 2, 128, SINGLE, 0.1),
    Case((), 2, 32, SINGLE, 0.1),
    Case((0,), 1, 32, SINGLE),
    Case((37, 0, 1, 140), 2, 64, HALF, 0.1, lse_has_gradient=True),
    Case((130, 5), 1, 32, HALF, window=0),
    Case((67,), 2, 128, HALF, 0.3, window=40, unaligned=True),
]


@pytest.fixture(autouse=True)
def _fill_empty_tensors_with_nan() -> None:
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_obeys_the_rule(case: Case) -> None:
    assert_obeys_rule(case, run(case, "triton"))


def test_triton_is_what_runs() -> None:
    with use_backend("triton"):
        assert backend_of("varlen_attention", "cpu").backend == "triton"
    case = Case((9,), 1, 32, SINGLE)
    with use_backend("triton"):
        ours = ops.varlen_attention(*case.projections(), case.cu_seqlens, 9, **case.options)
    torch.testing.assert_close(ours, run(case, "torch")[0])


def identity_mask(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The mask that the forward kernel draws, read off: the values are a unit matrix."""
    monkeypatch.setattr(operators, "launch_settings", lambda *_: settings)
    length = 128
    zeros, ones = torch.zeros(length, 1, 128), torch.eye(length)[:, None]
    cu = torch.tensor([0, length], dtype=torch.int32)
    seed, ids = torch.tensor(77), torch.tensor([5])
    options = {"dropout_p": 0.25, "seed": seed, "sequence_ids": ids, "site": 3}
    with use_backend("triton"):
        return ops.varlen_attention(zeros, zeros, ones, cu, length, scale=1.0, **options)[:, 0] > 0


@pytest.mark.parametrize("block_q", [32, 64, 128])
@pytest.mark.parametrize("block_k", [32, 64, 128])
def test_mask_is_the_documented_one_at_any_tile_size(
    block_q: int, block_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = identity_mask(Settings(block_q, block_k, 4, 1), monkeypatch)
    expected = ops.attention_keep_mask(1, 128, 128, 5, 0.25, torch.tensor(77), 3)[0]
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("settings", [(64, 32), (32, 64), (128, 64), (64, 128)])
def test_gradients_do_not_depend_on_the_tile_size(
    settings: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were a mask drawn otherwise in one kernel, gradients would be off by whole numbers."""
    case = Case((100, 9), 1, 32, SINGLE, 0.5)
    expected = run(case, "triton")
    monkeypatch.setattr(operators, "launch_settings", lambda *_: Settings(*settings, 4, 1))
    for result, other in zip(run(case, "triton"), expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-5)


def test_scores_of_any_size_stay_finite() -> None:
    case = Case((40,), 1, 32, SINGLE, window=3)
    leaves = [rows * 1000 for rows in case.projections()]
    options = case.options | {"scale": 1.0}
    with use_backend("triton"):
        ours = ops.varlen_attention_with_lse(*leaves, case.cu_seqlens, 40, **options)
    expected = ops.varlen_attention_with_lse(*leaves, case.cu_seqlens, 40, **options)
    for result, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-4, atol=1e-2)


def test_offsets_beyond_31_bits() -> None:
    """Three tokens 2^30 elements apart; the pages between them are never touched."""
    torch.use_deterministic_algorithms(False)
    storage, names = torch.empty(2**31 + 8 * 32, dtype=HALF), range(8)
    near = [torch.zeros(3, 1, 32, dtype=HALF) for _ in names]
    far = [storage.as_strided((3, 1, 32), (2**30, 32, 1), 32 * name) for name in names]
    for name in (0, 1, 2, 4):
        near[name].copy_(torch.randn(3, 1, 32))
        far[name].copy_(near[name])
    results = [_all_kernels(tensors) for tensors in (near, far)]
    for result, other in zip(*results, strict=True):
        assert torch.equal(result, other)
    for name in (3, 5, 6, 7):
        assert near[name].count_nonzero()
        assert torch.equal(near[name], far[name])


def _all_kernels(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Log-sum-exp and delta; writes output 3 and the gradients 5, 6, 7 of query, key, value."""
    query, key, value, output, above, *grads = rows
    lse, delta = torch.zeros(1, 3), torch.zeros(1, 3)
    shared: dict[str, Any] = {
        "query": query,
        "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32),
        "max_seqlen": 3,
        "scale": 0.2,
        "window": None,
        "threshold": 6554,
        "seed": torch.tensor(1),
        "sequence_ids": torch.tensor([0]),
        "site": 1,
        "key_ptr": key,
        "value_ptr": value,
        "lse_ptr": lse,
    }
    strides = operators._strides(query=query, key=key, value=value, output=output)
    kernels = operators
    kernels._launch(kernels.attention_forward, "forward", output_ptr=output, **shared, **strides)
    strides |= operators._strides(grad_output=above)
    shared |= {"grad_output_ptr": above, "delta_ptr": delta, **strides}
    kernels._launch(
        kernels.attention_backward_query,
        "backward_query",
        output_ptr=output,
        grad_lse_ptr=lse,
        grad_query_ptr=grads[0],
        HAS_GRAD_LSE=False,
        **shared,
    )
    kernels._launch(
        kernels.attention_backward_key_value,
        "backward_key_value",
        grad_key_ptr=grads[1],
        grad_value_ptr=grads[2],
        **shared,
    )
    return [lse, delta]


def _arguments(case: Case, *, needs_gradient: bool) -> tuple[Any, ...]:
    options = case.options
    leaves = [rows.requires_grad_(needs_gradient) for rows in case.projections()]
    settings = (max(case.lengths), options["scale"], case.window, 6554)
    tail = (options["seed"], options["sequence_ids"], options["site"])
    return (*leaves, case.cu_seqlens, *settings, *tail)


def test_operators_pass_opcheck() -> None:
    case = Case((20, 0, 3), 2, 32, SINGLE, 0.1)
    arguments = _arguments(case, needs_gradient=True)
    opcheck(operators._forward_op, arguments)
    plain = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
    output, lse = operators._forward_op(*plain)
    above, lse_above = case.gradients()
    for grad_lse in (None, lse_above.t()):
        backward = (above, grad_lse, *plain[:3], output, lse, *plain[3:])
        # A backward has no backward, so there is no graph of both to trace.
        opcheck(operators._backward_op, backward, test_utils=("test_schema", "test_faketensor"))


def test_flops_are_those_of_the_products() -> None:
    case = Case((20, 0, 3), 2, 32, SINGLE)
    with FlopCounterMode(display=False) as counter:
        run(case, "triton")
    counts = counter.get_flop_counts()["Global"]
    products = 2 * 2 * 32 * (20 * 20 + 3 * 3)
    assert {str(name).split(".")[-1]: count for name, count in counts.items()} == {
        "triton_varlen_attention": 2 * products,
        "triton_varlen_attention_backward": 5 * products,
    }


@pytest.mark.parametrize("window", [0, 2, 19, 40])
def test_flops_of_a_window_count_what_is_seen(window: int) -> None:
    places = torch.arange(20)
    seen = int(((places[:, None] - places).abs() <= window).sum())
    counted = operators.forward_flops(
        *[torch.empty(20, 1, 32)] * 3, torch.tensor([0, 20]), 20, 1.0, window
    )
    assert counted == 4 * 32 * seen


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": torch.float64}, TypeError, "float64.*allowed"),
        ({"head_size": 40}, ValueError, r"head size is 40, allowed are \(32, 64, 128\)"),
        ({"dropout": 1.0}, ValueError, r"dropout_p is 1\.0, allowed"),
        ({"window": -1}, ValueError, "window is -1, allowed"),
    ],
)
def test_wrong_inputs_raise(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = Case((5,), 1, 32, SINGLE)._replace(**change)
    with pytest.raises(error, match=message):
        run(case, "triton")


@pytest.mark.parametrize("name", ["seed", "sequence_ids"])
def test_dropout_without_its_arguments_raises(name: str) -> None:
    case = Case((5,), 1, 32, SINGLE, 0.1)
    with use_backend("triton"), pytest.raises(ValueError, match="seed and sequence_ids have to be"):
        ops.varlen_attention(
            *case.projections(), case.cu_seqlens, 5, **(case.options | {name: None})
        )


class _Recorder:
    """Stands for a kernel and notes which variant Triton would compile for each launch."""

    def __init__(self, kernel: Any, variants: set[Any]) -> None:
        self.kernel, self.variants = kernel, variants

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, **arguments: Any) -> None:
        counted = {name for name in self.kernel.arg_names if name in common.COUNTS}
        self.variants.add(
            (
                self.kernel.__name__,
                *(
                    (name, _specialised(name, value))
                    for name, value in sorted(arguments.items())
                    if name not in counted
                ),
            )
        )


def _specialised(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if name.islower() and isinstance(value, float):
        return "float"
    if name.endswith("_stride"):
        return value == 1, value % 16 == 0
    return value


def test_a_run_compiles_few_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand batches of all sizes: two buckets of lengths of three kernels."""
    variants: set[Any] = set()
    for name in ("attention_forward", "attention_backward_query", "attention_backward_key_value"):
        monkeypatch.setattr(operators, name, _Recorder(getattr(operators, name), variants))
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        count = int(torch.randint(1, 9, (1,), generator=generator))
        lengths = torch.randint(1, 513, (count,), generator=generator).tolist()
        run(Case(tuple(lengths), 1, 32, HALF, 0.1), "triton")
    assert 3 <= len(variants) <= 6, variants
