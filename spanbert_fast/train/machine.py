"""Device, precision, threads, determinism and folder of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(wanted: str) -> torch.device:
    """The device called "cpu" or "cuda"; with "auto", CUDA if there is one.

    Raises:
        ValueError: CUDA is wanted and not there.
    """
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ValueError("device must be cpu or auto where torch sees no CUDA device, got cuda")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and has_cuda) else "cpu")


def choose_precision(wanted: str, device: torch.device) -> str:
    """One of "fp32", "bf16" and "fp16"; with "auto", bf16 where the hardware multiplies in it.

    Else fp16 on a GPU (with loss scaling) and fp32 on a CPU: there the other two would be slower.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products under a precision."""
    return _DTYPES[precision]


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence the bars that transformers draws when it loads or saves: events tell enough."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def machine_settings(threads: int | None) -> Iterator[None]:
    """Set threads (None: leave them) and deterministic algorithms; put back what was there."""
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    torch.set_num_threads(threads or before[0])
    torch.use_deterministic_algorithms(True)
    # cuBLAS reads this when it starts; without it torch refuses deterministic matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # A guard against reading what was never written; it costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        torch.utils.deterministic.fill_uninitialized_memory = before[3]  # type: ignore[attr-defined]


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """What must be equal for two runs to be equal bit by bit."""
    values: dict[str, Any] = {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "precision": precision,
    }
    if device.type == "cuda":
        values["gpu"] = torch.cuda.get_device_name(device)
    return values


@contextlib.contextmanager
def only_user(output: Path) -> Iterator[None]:
    """Make the folder of a run and keep other processes out of it until the end.

    Raises:
        ValueError: Another process is running there.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as file:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"output {output} is in use by another process") from error
        yield
