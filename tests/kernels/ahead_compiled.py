"""What steps look for in the directory that a warm-up filled; `test_ahead.py` runs this file.

The warm-up ran in another process. Launches are compiled instead of run here too, so each of them
says whether a GPU would have found its variant.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.whole_model import make_batch
from spanbert_fast import Config, Model, ops, use_backend
from spanbert_fast.batch import PackedBatch
from spanbert_fast.cli import main
from spanbert_fast.kernels import cache
from spanbert_fast.kernels.ahead import Variant, compiling_for
from spanbert_fast.kernels.common import architecture
from spanbert_fast.kernels.cross_entropy import least_rows_of_two_chunks
from spanbert_fast.model.targets import without_spans
from spanbert_fast.ops.dispatch import twins_on_cpu

CACHE = Path(os.environ[cache.VARIABLE])
CONFIG = Config.from_pretrained(CACHE.parent / "model")
ARCH = 90
# Lengths of the sequences of a batch: both buckets, fewer tokens than columns and more.
LENGTHS = [(1,), (3,), (5, 2, 7), (128,), (129,), (17, 256, 1, 40), (90,) * 8, (256, 255) * 2]


def batch_of(lengths: tuple[int, ...]) -> PackedBatch:
    """A masked batch of random tokens."""
    return make_batch(lengths, CONFIG.vocab_size)


def found(work: Callable[[], None]) -> list[Variant]:
    """The variants that `work` meets."""
    with compiling_for(ARCH) as variants, twins_on_cpu(), use_backend("triton"):
        work()
    assert variants
    return variants


def assert_all_cached(variants: list[Variant]) -> None:
    """Nothing was compiled."""
    assert not [variant.kernel for variant in variants if not variant.was_cached]


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Torch's setting of the precision of float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model(Config.from_dict({**CONFIG.to_dict(), "num_hidden_layers": 2})).to(dtype)


def learn(model: Model, batch: PackedBatch) -> None:
    """A training step as `pretrain` takes it: the backward runs outside of autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.forward_packed(batch).loss
    assert loss is not None
    (1024.0 * loss).backward()


def test_the_named_directory_is_used() -> None:
    assert cache.directory() == CACHE
    assert "TRITON_CACHE_DIR" not in os.environ
    assert knobs.cache.dir == str(CACHE)


def test_training_compiles_nothing() -> None:
    model = make_model().train()
    names = set()
    for lengths in LENGTHS:
        variants = found(lambda: learn(model, batch_of(lengths)))  # noqa: B023
        assert_all_cached(variants)
        names |= {variant.kernel for variant in variants}
    assert {name.split(".")[0] for name in names} == {
        "activation",
        "attention",
        "embedding",
        "norm",
        "segments",
        "span_boundary",
        "vocabulary",
    }
    assert len(names) == 20


def test_a_step_without_targets_compiles_nothing() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    batch = without_spans(batch_of((9, 30)))
    batch = dataclasses.replace(batch, mlm_positions=none, mlm_labels=none)
    assert_all_cached(found(lambda: learn(make_model().train(), batch)))


def test_a_step_with_very_many_labels_compiles_nothing() -> None:
    """So many that the slopes of the loss are taken in chunks, which compiles another variant."""
    num_rows = least_rows_of_two_chunks(CONFIG.vocab_size, torch.bfloat16, ARCH)
    assert num_rows is not None
    batch = batch_of((100, 100))
    rows = torch.zeros(num_rows, dtype=torch.int64)
    batch = dataclasses.replace(batch, mlm_positions=rows, mlm_labels=rows)
    # A setting that is for float32 alone.
    with products("high"):
        variants = found(lambda: learn(make_model().train(), batch))
    assert_all_cached(variants)
    assert sum(variant.kernel == "vocabulary.gradient_of_rows" for variant in variants) == 2


@pytest.mark.parametrize(
    ("dtype", "is_mixed", "precision"),
    [
        (torch.float32, True, "highest"),
        (torch.float32, True, "high"),
        (torch.float32, False, "highest"),
        (torch.float32, False, "high"),
        (torch.bfloat16, False, "highest"),
    ],
)
def test_evaluation_compiles_nothing(dtype: torch.dtype, is_mixed: bool, precision: str) -> None:
    model = make_model(dtype).eval()

    @torch.no_grad()
    def work() -> None:
        for batch in map(batch_of, LENGTHS):
            model.score_packed(batch)
        model.forward_packed(batch, return_logits=True)

    with products(precision), torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
        assert_all_cached(found(work))


def test_hugging_face_shapes_compile_nothing() -> None:
    model = make_model()
    ids = torch.randint(5, CONFIG.vocab_size, (3, 140))
    mask = (torch.arange(140) < torch.tensor([140, 31, 2])[:, None]).long()
    labels = torch.where((torch.arange(140) % 7 == 1) & (mask > 0), ids, -100)
    spans = torch.tensor([[[0, 3]], [[4, 6]], [[-1, -1]]])
    targets = torch.tensor([[[5, 6]], [[7, -100]], [[-100, -100]]])

    def call(**arguments: Any) -> Tensor | None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss: Tensor | None = model(ids, attention_mask=mask, **arguments).loss
        return loss

    def work() -> None:
        model.train()
        for arguments in ({}, {"sbo_spans": spans, "sbo_targets": targets}):
            loss = call(labels=labels, **arguments)
            assert loss is not None
            loss.backward()
        model.eval()
        with torch.no_grad():
            call(labels=labels)
            call()

    assert_all_cached(found(work))


def test_a_second_warm_up_compiles_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["warmup", str(CACHE.parent / "model" / "config.json"), "--arch", "90", "--eval-only"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["sm_90", "attention.attention_forward", "3", "0", "3"] in [line[:5] for line in lines]
    assert ["compiled", "0"] in lines
    assert ["directory", str(CACHE)] in lines
    assert "backward" not in shown


def test_everything_is_put_back() -> None:
    before = (driver._active, JITFunction.run, knobs.compilation.listener)

    def fail() -> None:
        assert architecture(torch.device("cpu")) == ARCH
        assert JITFunction.run is not before[1]
        raise KeyError

    with pytest.raises(KeyError):
        found(fail)
    assert (driver._active, JITFunction.run, knobs.compilation.listener) == before
    assert architecture(torch.device("cpu")) == 80


def test_another_dtype_is_noticed() -> None:
    """The judge can say no: nobody warmed fp16 up."""
    rows = torch.zeros(4, 64, dtype=torch.float16)
    [variant] = found(lambda: ops.bias_gelu(rows, torch.zeros(64)))
    assert variant.kernel == "activation.gelu_forward"
    assert not variant.was_cached
