"""Machine code of the kernels of the banded op; `test_banded_attention.py` runs this file."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from kernels.banded_cases import Case, run
from kernels.compiled import SHARED_MEMORY_LIMIT, TENSOR_CORE, Compiled, compile_for
from kernels.row_launches import Launch, recorded
from spanbert_fast.kernels import common
from spanbert_fast.kernels.banded_attention import HEAD_SIZES

BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
KERNELS = ("forward", "backward_query", "backward_key")


class Variant(NamedTuple):
    """One compiled kernel."""

    arch: int
    op: str
    dtype: torch.dtype
    head_size: int


VARIANTS = [
    Variant(arch, f"banded_{kernel}", dtype, head_size)
    for arch in (80, 90, 100)
    for kernel in KERNELS
    for dtype in (BRAIN, HALF, SINGLE)
    for head_size in HEAD_SIZES
]


def launches_of(case: Case) -> dict[str, Launch]:
    """The launches of a forward and a backward pass, by the names of `KERNELS`."""
    with recorded() as launches:
        run(case, "triton")
    return dict(zip((f"banded_{kernel}" for kernel in KERNELS), launches, strict=True))


def compiled(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    case = Case((70, 31), 12, variant.head_size, variant.dtype, 24)
    monkeypatch.setattr(common, "_ARCHITECTURE_WITHOUT_GPU", variant.arch)
    launch = launches_of(case)[variant.op]
    return compile_for(
        variant.arch, launch.kernel, launch.signature, launch.constants, **launch.options
    )


def assert_fits(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compiled(variant, monkeypatch)
    assert code.stack == 0, f"stack frame of {code.stack} bytes"
    assert code.num_spills == 0, "registers are spilled"
    assert code.shared_memory <= SHARED_MEMORY_LIMIT[variant.arch]
    if variant.dtype is not SINGLE:
        assert code.count(TENSOR_CORE[variant.arch]) > 0, "no tensor core is used"
    assert code.count(r"\bLDG\S*128|\bLDGSTS\S*128") > 0, "no load of 16 bytes"
    if variant.op != "banded_forward":
        # Rows of the band begin anywhere, those of a gradient do not.
        assert code.count(r"\bSTG\S*128") > 0, "no store of 16 bytes"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_every_variant_fits(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_fits(variant, monkeypatch)


def test_a_run_compiles_each_kernel_once() -> None:
    """Of 200 batches of all sizes, with bands of all sizes."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        count = int(torch.randint(1, 9, (1,), generator=generator))
        lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
        band = int(torch.randint(0, 60, (1,), generator=generator))
        launches = launches_of(Case(tuple(lengths), 2, 32, BRAIN, band))
        seen |= {launch.variant for launch in launches.values()}
    assert len(seen) == len(KERNELS)
