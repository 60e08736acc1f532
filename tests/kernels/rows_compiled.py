"""Machine code of the kernels that work on rows; `test_compile_elementwise.py` runs this file."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from kernels.compiled import SHARED_MEMORY_LIMIT, TENSOR_CORE, Compiled, compile_for
from kernels.row_cases import OPS, Shape, make_case, run
from kernels.row_launches import Launch, recorded
from spanbert_fast.kernels import common

BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
PRODUCTS = ("score_vocabulary", "slope_of_logits", "gradient_of_rows", "gradient_of_weight")
# Their rows are few, or they stand behind a sort: what bounds them is not memory.
NARROW = ("merge_parts", "_join_windows")


def launches_of(op: str, shape: Shape) -> list[Launch]:
    """One launch of each kernel of the op, forward and backward."""
    case = make_case(op, shape)
    with recorded() as launches:
        run(case, "triton")
    return list({launch.variant: launch for launch in launches}.values())


def compiled(arch: int, launch: Launch) -> Compiled:
    return compile_for(arch, launch.kernel, launch.signature, launch.constants, **launch.options)


def check(arch: int, op: str, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "_ARCHITECTURE_WITHOUT_GPU", arch)
    for launch in launches_of(op, shape):
        name = launch.kernel.__name__
        machine = compiled(arch, launch)
        assert machine.stack == 0, f"{name} has a stack frame of {machine.stack} bytes"
        assert machine.num_spills == 0, f"{name} spills"
        assert machine.shared_memory <= SHARED_MEMORY_LIMIT[arch], name
        if name in PRODUCTS and shape.dtype is not SINGLE:
            assert machine.count(TENSOR_CORE[arch]), f"{name} has no tensor core instruction"
        if name not in NARROW:
            assert machine.count(r"\b(LDG|LDGSTS)\b\S*\.128"), f"{name} has no 16-byte load"
        if name not in NARROW and name != "score_vocabulary":
            assert machine.count(r"\bSTG\b\S*\.128"), f"{name} has no 16-byte store"


# The tables and vectors are float32 and the rows bfloat16, as under autocast.
USUAL = Shape(40, 768, BRAIN, SINGLE, 0.1, classes=28996)


@pytest.mark.parametrize(
    ("arch", "op"),
    [(90, op) for op in OPS] + [(arch, "linear_cross_entropy") for arch in (80, 100)],
)
def test_usual(arch: int, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(arch, op, USUAL, monkeypatch)


@pytest.mark.parametrize("size", [768, 1024])
@pytest.mark.parametrize("dtypes", [(BRAIN, None), (HALF, SINGLE), (SINGLE, None)], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every(
    arch: int,
    op: str,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtype, parameters = dtypes
    options = {"label_smoothing": 0.1, "class_weights": True}
    shape = Shape(40, size, dtype, parameters, 0.1, classes=28996, **options)
    check(arch, op, shape, monkeypatch)


@pytest.mark.parametrize("op", OPS)
def test_number_of_variants_over_1000_batches(op: str) -> None:
    numbers, seen = random.Random(0), Counter()
    for _ in range(1000):
        most = 60 if op == "span_boundary_hidden" else 600
        shape = Shape(numbers.randint(1, most), 16, BRAIN, SINGLE, 0.1, classes=1000)
        with recorded() as launches:
            run(make_case(op, shape), "triton")
        seen.update(launch.variant for launch in launches)
    variants = Counter(name for name, *_ in seen)
    # The first chunk of the vocabulary begins a sum and the others add to it.
    assert all(count <= 1 + (name == "gradient_of_rows") for name, count in variants.items())
    assert variants
