"""Compiles the Triton kernels of a configuration ahead of time, on a machine without a GPU.

The steps that a GPU will take are taken here by a one-layer model on a few tokens, on CPU tensors,
with every launch compiled instead of run. What a launch compiles depends on the configuration (its
sizes, and whether it drops anything), on dtypes, on the settings for the GPU, and on only two
things of a batch: whether its longest sequence is in the short bucket of the attention kernels,
and whether it has so many labels that the backward of the loss takes the vocabulary in chunks.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.diagnose.options import WarmupOptions
from spanbert_fast.model.pretrained import Model
from spanbert_fast.ops.cross_entropy import linear_cross_entropy
from spanbert_fast.ops.dispatch import twins_on_cpu, use_backend
from spanbert_fast.train.machine import autocast_dtype

if TYPE_CHECKING:
    from spanbert_fast.kernels.ahead import Variant


@dataclass(frozen=True)
class WarmedKernel:
    """The variants of one kernel for one GPU."""

    arch: int
    kernel: str
    """Room and name, such as `norm.forward`."""
    compiled: int
    cached: int
    """Variants that stood in the directory already."""
    seconds: float


@dataclass(frozen=True)
class WarmupReport:
    """What `spanbert-fast warmup` did."""

    directory: Path
    """Where compiled kernels are kept."""
    precision: str
    kernels: tuple[WarmedKernel, ...]
    compiled: int
    cached: int
    seconds: float
    """Of everything, the model's own steps included."""


class _Step(NamedTuple):
    """One way to call the model."""

    trains: bool
    parameters: torch.dtype
    products: torch.dtype
    """If it is another one, the step runs under autocast."""


def warmup(options: WarmupOptions) -> WarmupReport:
    """Compile what training and evaluation steps of a configuration need, as far as it is missing.

    Raises:
        ValueError: There is no configuration, it has a size that no kernel takes, an architecture
            is unknown, or none is given and there is no GPU.
        RuntimeError: Triton is absent or interprets, or a kernel can't be compiled.
    """
    begun = time.perf_counter()
    config = _one_layer(read_config(options.model))
    max_length = _max_length(options, config)
    archs = options.arch or (_own_architecture(),)
    try:
        from spanbert_fast.kernels import ahead, cache
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError("kernels can't be compiled: triton is not installed") from error
    for arch in archs:
        ahead.check_architecture(arch)
    warmed: list[WarmedKernel] = []
    for arch in dict.fromkeys(archs):
        with ahead.compiling_for(arch) as variants, twins_on_cpu(), use_backend("triton"):
            _take_steps(config, _steps(options), arch, max_length)
        warmed += _tally(arch, variants)
    return WarmupReport(
        directory=cache.directory(),
        precision=options.precision,
        kernels=tuple(warmed),
        compiled=sum(kernel.compiled for kernel in warmed),
        cached=sum(kernel.cached for kernel in warmed),
        seconds=time.perf_counter() - begun,
    )


def read_config(name: str) -> Config:
    """The configuration in a folder, in a file, or of a model on the hub.

    Raises:
        ValueError: There is none.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{name} holds no config.json")
    config: Config = Config.from_pretrained(name)
    return config


def _one_layer(config: Config) -> Config:
    """Every layer launches the same variants."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    return config


def _max_length(options: WarmupOptions, config: Config) -> int:
    longest: int = config.max_position_embeddings
    wanted = longest if options.max_length is None else options.max_length
    if not 1 <= wanted <= longest:
        raise ValueError(
            f"max_length is {wanted}, allowed is 1 to {longest} (max_position_embeddings)"
        )
    return wanted


def _own_architecture() -> int:
    if not torch.cuda.is_available():
        raise ValueError(
            "arch must be given where torch sees no CUDA device, for example --arch 90"
        )
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _steps(options: WarmupOptions) -> list[_Step]:
    """Training and evaluation in mixed precision, evaluation as `evaluate` does it, and inference
    with parameters loaded in 16 bits.
    """
    wide, narrow = torch.float32, autocast_dtype(options.precision)
    steps = [] if options.eval_only else [_Step(True, wide, narrow)]
    steps += [_Step(False, wide, narrow), _Step(False, wide, wide), _Step(False, narrow, narrow)]
    return list(dict.fromkeys(steps))


def _take_steps(config: Config, steps: list[_Step], arch: int, max_length: int) -> None:
    from spanbert_fast.kernels.attention.settings import SHORT

    lengths = (SHORT, max_length) if max_length > SHORT else (max_length,)
    for step in steps:
        model = _model(config, step)
        for _ in _product_precisions(step):
            for length in lengths:
                _take_step(model, step, _batch(length))
            if step.trains:
                _learn_in_chunks(model, step, arch)


def _take_step(model: Model, step: _Step, batch: PackedBatch) -> None:
    """Forward and, in training, backward; both heads have targets."""
    with torch.set_grad_enabled(step.trains), _autocast(step):
        loss = model.forward_packed(batch, dropout_seed=torch.tensor(0)).loss
    if step.trains:
        assert loss is not None
        loss.backward()  # type: ignore[no-untyped-call]


def _learn_in_chunks(model: Model, step: _Step, arch: int) -> None:
    """The loss of so many rows that its backward takes the vocabulary in chunks."""
    from spanbert_fast.kernels.cross_entropy import least_rows_of_two_chunks

    config, decoder = model.config, model.get_output_embeddings()
    num_rows = least_rows_of_two_chunks(config.vocab_size, step.products, arch)
    if num_rows is None:
        return
    rows = torch.zeros(num_rows, config.hidden_size, dtype=step.products, requires_grad=True)
    with _autocast(step):
        losses = linear_cross_entropy(
            rows,
            decoder.weight,
            decoder.bias,
            model.cls.span_boundary.bias,
            num_rows,
            torch.zeros(num_rows, dtype=torch.int64),
        ).loss
    losses.sum().backward()  # type: ignore[no-untyped-call]


def _model(config: Config, step: _Step) -> Model:
    with torch.random.fork_rng(devices=[]):
        model = Model(copy.deepcopy(config))
    nn.Module.to(model, step.parameters)
    nn.Module.train(model, step.trains)
    return model


def _batch(max_seqlen: int) -> PackedBatch:
    """One sequence of a few tokens; only the bound on its length is that of a real batch."""
    num_tokens = min(max_seqlen, 4)
    ids, one = torch.zeros(num_tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(num_tokens),
        token_type_ids=ids.clone(),
        cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
        max_seqlen=max_seqlen,
        sequence_ids=one,
        mlm_positions=one.clone(),
        mlm_labels=one.clone(),
        sbo_left=one.clone(),
        sbo_right=torch.full((1,), num_tokens - 1),
        sbo_cu=torch.tensor([0, 1], dtype=torch.int32),
        sbo_targets=one.clone(),
    )


def _autocast(step: _Step) -> contextlib.AbstractContextManager[object]:
    is_mixed = step.products != step.parameters
    return torch.autocast("cpu", dtype=step.products, enabled=is_mixed)


def _product_precisions(step: _Step) -> Iterator[str]:
    """Both settings of float32 products, set in turn, if the step has any: a variant for each."""
    if step.products != torch.float32:
        yield ""
        return
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            yield precision
    finally:
        torch.set_float32_matmul_precision(before)


def _tally(arch: int, variants: list[Variant]) -> list[WarmedKernel]:
    """One row per kernel, in the order of their names."""
    rows = []
    for name in sorted({variant.kernel for variant in variants}):
        own = [variant for variant in variants if variant.kernel == name]
        cached = sum(variant.was_cached for variant in own)
        seconds = sum(variant.seconds for variant in own)
        rows.append(WarmedKernel(arch, name, len(own) - cached, cached, seconds))
    return rows
