"""What a pre-training run needs, before anything runs: parameters, FLOPs, memory, disk and time.

Parameters and FLOPs follow from the model. Memory is counted by `memory.py`. Time on this CPU is
FLOPs over a rate of matrix products that is measured now; time on a GPU is *modelled* by
`roofline.py`, and nothing of it was measured on one.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from spanbert_fast.config import Config
from spanbert_fast.diagnose.memory import (
    MLM_SHARE,
    SBO_SHARE,
    SPANS_SHARE,
    StepMemory,
    sample_batch,
    step_memory,
)
from spanbert_fast.diagnose.options import PlanOptions
from spanbert_fast.model.pretrained import Model
from spanbert_fast.train.machine import autocast_dtype, choose_precision, machine_settings
from spanbert_fast.train.metrics import matmul_flops_per_second, model_flops
from spanbert_fast.train.options import MICRO_BATCH_TOKENS
from spanbert_fast.train.presets import RECIPES

# Share of the measured rate that a whole training step reaches on a CPU in fp32: row "floor" of
# the benchmarks, about 1 / 1.5.
_CPU_SHARE = 0.65
# Sustained all-reduce per device over NVLink, bytes a second; assumed.
_LINK_BYTES = {"a100": 230e9, "h100": 360e9}
_PROCESS_BYTES = 460 << 20
"""Libraries of one process on a CPU: measured on Linux, taken where it cannot be asked."""
_CONTEXT_BYTES = 800 << 20
"""CUDA context, libraries and kernels of one process; assumed."""
_DEVICE = re.compile(r"(cpu|a100|h100)(?:x([1-9]\d{0,3}))?")


class Device(NamedTuple):
    """What the run is planned for."""

    kind: str
    """cpu, a100 or h100."""
    copies: int


class Speed(NamedTuple):
    """How fast a run would go, and how that is known."""

    tokens_per_second: float
    basis: str
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Needs of a run. Times, rates and bytes are estimates; `basis` says of what kind."""

    preset: str
    device: str
    precision: str
    parameters: int
    tokens: float
    steps: int
    tokens_per_step: int
    micro_batches: int
    """Parts of a step on each device."""
    micro_batch_sequences: int
    flops: float
    """Of the whole run: matrix products, three times the forward."""
    memory: StepMemory
    """Bytes of tensors on each device at the peak of a step."""
    process_bytes: int
    """What a process holds beside them."""
    checkpoint_bytes: int
    """On disk, each."""
    shards_bytes: int
    """Token shards, if every token is read once."""
    tokens_per_second: float
    seconds: float
    basis: str
    """How the time was found."""
    notes: tuple[str, ...]
    attention_window: int | None = None

    @property
    def peak_bytes(self) -> int:
        """Memory of each device."""
        return self.process_bytes + self.memory.total


def plan(options: PlanOptions) -> Budget:
    """The budget of a pre-training run.

    Raises:
        ValueError: The device is unknown.
        RuntimeError: A GPU is asked for and Triton, whose kernels' formulas count, is not there.
    """
    recipe, device = RECIPES[options.preset], parse_device(options.device)
    config = _config(options)
    per_step = options.global_batch_tokens or recipe.global_batch_tokens
    steps = math.ceil(options.tokens / per_step) if options.tokens else recipe.steps
    tokens = options.tokens or float(per_step * steps)
    per_device = math.ceil(per_step / device.copies)
    micro_batches = options.micro_batches or math.ceil(per_device / MICRO_BATCH_TOKENS)
    sequences = max(1, math.ceil(per_device / micro_batches / options.seq_length))
    precision = _precision(options.precision, recipe.precision, device)
    memory = step_memory(
        config,
        num_sequences=sequences,
        length=options.seq_length,
        autocast=None if precision == "fp32" else autocast_dtype(precision),
        accumulates=micro_batches > 1,
        activation_checkpointing=options.activation_checkpointing,
        is_fused=device.kind != "cpu",
    )
    batch = sample_batch(sequences, options.seq_length)
    per_token = model_flops(config, batch) / batch.num_tokens
    parameters = _count_parameters(config)
    if device.kind == "cpu":
        with machine_settings(recipe.threads):
            speed = _cpu_speed(precision, per_token)
    else:
        speed = _gpu_speed(device, config, options.seq_length, sequences, micro_batches)
    return Budget(
        preset=options.preset,
        device=options.device,
        precision=precision,
        parameters=parameters,
        tokens=tokens,
        steps=steps,
        tokens_per_step=per_step,
        micro_batches=micro_batches,
        micro_batch_sequences=sequences,
        flops=per_token * tokens,
        memory=memory,
        process_bytes=_own_bytes() if device.kind == "cpu" else _CONTEXT_BYTES,
        checkpoint_bytes=12 * parameters,
        shards_bytes=round(tokens * (2 if options.vocab_size <= 65_536 else 4)),
        tokens_per_second=speed.tokens_per_second,
        seconds=tokens / speed.tokens_per_second,
        basis=speed.basis,
        notes=speed.notes,
        attention_window=options.attention_window,
    )


def _config(options: PlanOptions) -> Config:
    return Config.preset(
        options.preset,
        vocab_size=options.vocab_size,
        max_position_embeddings=max(512, options.seq_length),
        attention_window=options.attention_window,
        **RECIPES[options.preset].model,
    )


def parse_device(text: str) -> Device:
    """`cpu`, `a100`, `h100`, or several as `h100x8`.

    Raises:
        ValueError: It is none of these.
    """
    found = _DEVICE.fullmatch(text)
    if found is None or (found[1] == "cpu" and found[2]):
        raise ValueError(f"device must be cpu, a100 or h100, or several as h100x8, got {text!r}")
    return Device(found[1], int(found[2] or 1))


def _precision(wanted: str, of_recipe: str, device: Device) -> str:
    chosen = of_recipe if wanted == "auto" else wanted
    if chosen != "auto":
        return chosen
    return choose_precision("auto", torch.device("cpu")) if device.kind == "cpu" else "bf16"


def _count_parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Model(config).parameters())


def _own_bytes() -> int:
    """Resident memory of this process, which has loaded what a run loads."""
    pages = Path("/proc/self/statm")
    if not pages.is_file():
        return _PROCESS_BYTES
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cpu_speed(precision: str, flops_per_token: float) -> Speed:
    reached = matmul_flops_per_second(torch.device("cpu"), autocast_dtype(precision))
    basis = (
        f"measured now: {reached / 1e9:.0f} GFLOP/s in {precision} products, threads: "
        f"{torch.get_num_threads()}, of which a step reaches about {_CPU_SHARE:.0%}"
    )
    return Speed(reached * _CPU_SHARE / flops_per_token, basis, ())


def _gpu_speed(
    device: Device, config: Config, length: int, sequences: int, micro_batches: int
) -> Speed:
    try:
        from spanbert_fast.diagnose import roofline
    except ImportError as error:
        raise RuntimeError(
            f"the time on a GPU is modelled from the kernels, which need Triton ({error}); "
            "pip install 'spanbert_fast[triton]'"
        ) from error
    gpu = next(gpu for gpu in roofline.GPUS if gpu.name.lower().startswith(device.kind))
    spans = max(1, round(SPANS_SHARE * length))
    shape = roofline.Model(
        "planned",
        int(config.hidden_size),
        int(config.num_hidden_layers),
        int(config.num_attention_heads),
        sequences,
        length,
        int(config.vocab_size),
        round(MLM_SHARE * length),
        round(SBO_SHARE * length),
        spans,
        config.attention_window,
    )
    times = roofline.step_times(gpu, shape)
    update = sum(time.seconds for time in times if time.kernel.name == "AdamW")
    step = (sum(time.seconds for time in times) - update) * micro_batches + update
    basis, notes = f"modelled for {gpu.name}: nothing here was measured on a GPU", []
    if device.copies > 1:
        step += _exchange_seconds(device, shape.parameters)
        basis += f", with an exchange of gradients over {device.copies}"
        notes.append("the training loop of this version runs on one device")
    return Speed(device.copies * micro_batches * shape.tokens / step, basis, tuple(notes))


def _exchange_seconds(device: Device, parameters: int) -> float:
    """A ring all-reduce of fp32 gradients that hides behind nothing."""
    share = 2 * (device.copies - 1) / device.copies
    return 4 * parameters * share / _LINK_BYTES[device.kind]
