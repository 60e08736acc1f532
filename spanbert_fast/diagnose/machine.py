"""What this machine offers, which implementation runs here and why, and a self-test."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import spanbert_fast
from spanbert_fast import _core
from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.data.masking import SpanMasker
from spanbert_fast.model.pretrained import Model
from spanbert_fast.ops import dispatch
from spanbert_fast.ops.dispatch import BackendChoice
from spanbert_fast.ops.random import hidden_keep_mask, hidden_keep_mask_torch
from spanbert_fast.train.machine import choose_device, choose_precision

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "triton")
_INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
# Random123's published answer for key 0 and counter 0.
_PHILOX_ANSWER = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
# Masks of the batch in check_sampler; the same on every system, as its stream holds only integers.
_SAMPLER_POSITIONS = [3, 4, 5, 6, 7, 8, 9, 34, 35]


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class DoctorReport:
    """What `spanbert-fast doctor` tells."""

    versions: dict[str, str]
    machine: dict[str, str]
    backends: tuple[BackendChoice, ...]
    checks: tuple[Check, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether the whole self-test passed."""
        return all(check.passed for check in self.checks)


def doctor() -> DoctorReport:
    """Versions, hardware, backends, and a self-test of about two seconds."""
    return DoctorReport(
        versions=_versions(),
        machine=_machine(),
        backends=_backends(),
        checks=tuple(
            run_check(name, check)
            for name, check in (
                ("random bits: published vector", check_philox),
                ("dropout masks: C++ equals torch", check_dropout_masks),
                ("span sampler: known masks", check_sampler),
                ("tiny model: packed equals padded", check_model),
                ("directory of compiled kernels", check_kernel_cache),
            )
        ),
    )


def run_check(name: str, check: Callable[[], str]) -> Check:
    """The outcome of `check`, which returns a remark or raises."""
    start = time.perf_counter()
    try:
        detail = check()
    except ValueError as error:
        return Check(name, False, str(error))
    except Exception as error:  # noqa: BLE001  (it is what a self-test reports)
        return Check(name, False, f"{type(error).__name__}: {error}")
    return Check(name, True, f"{detail} ({time.perf_counter() - start:.2f} s)")


def check_philox() -> str:
    """The generator gives its published answer."""
    bits = _core.philox4x32(np.zeros((1, 4), np.uint32), 0)[0]
    if tuple(int(word) for word in bits) != _PHILOX_ANSWER:
        raise ValueError(f"got {' '.join(f'{word:08x}' for word in bits)}")
    return " ".join(f"{word:08x}" for word in bits)


def check_dropout_masks() -> str:
    """The two bodies of the dropout masks draw the same bits."""
    positions, ids, seed = torch.arange(64), torch.arange(64) // 9, torch.tensor(2**40 + 5)
    drawn = hidden_keep_mask(positions, ids, 100, 0.25, seed, 3)
    twin = hidden_keep_mask_torch(positions, ids, 100, 2**14, seed, 3)
    if not torch.equal(drawn, twin):
        raise ValueError(f"{int((drawn != twin).sum())} of {drawn.numel()} elements differ")
    return f"{drawn.numel()} elements, {float(drawn.float().mean()):.3f} kept at p = 0.25"


def check_sampler() -> str:
    """The sampler masks a fixed batch as it always has."""
    word_starts = np.ones(200, np.bool_)
    word_starts[150:] = False
    masker = SpanMasker(
        word_starts,
        mask_token_id=4,
        special_token_ids=[0, 2, 3],
        replacement_ids=np.arange(5, 150, dtype=np.int32),
        seed=7,
    )
    ids = np.r_[2, 5 + np.arange(60) * 3, 3].astype(np.int32)
    out = masker(ids, np.array([0, 62], np.int32), np.array([11], np.int64), epoch=1)
    positions = out.mlm_positions.tolist()
    if positions != _SAMPLER_POSITIONS:
        raise ValueError(f"masked positions {positions}, expected {_SAMPLER_POSITIONS}")
    return f"positions {' '.join(map(str, positions))}"


def check_model() -> str:
    """A random model gives the same loss and gradients packed and padded."""
    config = Config.preset(
        "tiny",
        vocab_size=200,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=64,
    )
    lengths = (24, 9, 17)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(config).train()
        ids = [torch.randint(5, 200, (length,)) for length in lengths]
    packed = model.forward_packed(_packed(ids)).loss
    padded = model(
        torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        attention_mask=torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths]),
        labels=torch.nn.utils.rnn.pad_sequence(
            [_labels(row) for row in ids], batch_first=True, padding_value=-100
        ),
    ).loss
    assert packed is not None
    assert padded is not None
    parameters = [p for name, p in model.named_parameters() if "span_boundary" not in name]
    gradients = [torch.autograd.grad(loss, parameters) for loss in (packed, padded)]
    worst = max(
        float((a - b).abs().max() / a.abs().max().clamp(min=1e-3))
        for a, b in zip(*gradients, strict=True)
    )
    one, other = packed.item(), padded.item()
    if not (abs(one - other) < 1e-4 and worst < 1e-3):
        raise ValueError(f"loss {one} and {other}, gradients differ by {worst:.1e}")
    return f"loss {one:.5f}, gradients differ by {worst:.0e} of the largest"


def check_kernel_cache() -> str:
    """Triton, if there is one, keeps compiled kernels in a directory that can be written."""
    try:
        from spanbert_fast.kernels import cache
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return "none, triton is not installed"
    return f"{cache.directory()}, {cache.VARIABLE} {'is' if cache.is_named() else 'is not'} set"


def _labels(row: torch.Tensor) -> torch.Tensor:
    """Every fourth token has a label."""
    return torch.where(torch.arange(len(row)) % 4 == 1, row, -100)


def _packed(ids: list[torch.Tensor]) -> PackedBatch:
    lengths = torch.tensor([len(row) for row in ids])
    tokens, labels = torch.cat(ids), torch.cat([_labels(row) for row in ids])
    positions = (labels != -100).nonzero()[:, 0]
    none = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        input_ids=tokens,
        position_ids=torch.cat([torch.arange(len(row)) for row in ids]),
        token_type_ids=torch.zeros_like(tokens),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        max_seqlen=int(lengths.max()),
        sequence_ids=torch.arange(len(ids)),
        mlm_positions=positions,
        mlm_labels=labels[positions],
        sbo_left=none,
        sbo_right=none,
        sbo_cu=torch.zeros(1, dtype=torch.int32),
        sbo_targets=none,
    )


def _backends() -> tuple[BackendChoice, ...]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tuple(dispatch.backend_of(name, device) for name in dispatch.op_names())


def _versions() -> dict[str, str]:
    found = {"spanbert_fast": spanbert_fast.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> dict[str, str]:
    flags, model = _cpu_info()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    sets = " ".join(name for name in _INSTRUCTION_SETS if name in flags)
    capability = torch.backends.cpu.get_cpu_capability()
    device = choose_device("auto")
    found = {
        "system": platform.platform(),
        "processor": model,
        "cores": f"{usable} usable of {os.cpu_count()}",
        "torch threads": f"{torch.get_num_threads()}, inter-op {torch.get_num_interop_threads()}",
        "instruction sets": sets or "unknown on this system",
        "torch kernels": capability,
        "bf16": "in hardware" if torch.cpu._is_avx512_bf16_supported() else "emulated on this CPU",
        "pre-training": f"{choose_precision('auto', device)} on {device.type}",
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = f"{gpu.total_memory / 2**30:.0f} GiB"
            found[f"cuda:{index}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}"
    else:
        found["cuda"] = "no device" if torch.version.cuda else "this torch was built without CUDA"
    return found


def _cpu_info() -> tuple[set[str], str]:
    """Instruction sets and name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set(), platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in info.read_text().split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = fields.get("flags") or fields.get("Features") or ""
    return set(flags.split()), fields.get("model name", platform.machine())
