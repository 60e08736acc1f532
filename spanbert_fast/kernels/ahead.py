"""Compiles kernels ahead of time, for a GPU that need not be there.

Whatever launches kernels on CPU tensors compiles them instead. A variant is what Triton's own
launcher makes of the arguments, so it is the one that the same launch on a GPU looks for, provided
that tensors are aligned alike (to 16 bytes, as each allocation of torch is) and that every branch
on shapes is walked through; `diagnose.warmup` sees to the latter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import TritonError
from triton.runtime.jit import JITFunction

from spanbert_fast.kernels.common import settings_for

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
"""Compute capabilities that kernels can be compiled for: those with bf16 that Triton knows."""


class Variant(NamedTuple):
    """One compiled variant of a kernel."""

    kernel: str
    """Room and name, such as `norm.forward`."""
    seconds: float
    was_cached: bool
    """Whether it stood in the directory of compiled kernels already."""


class _AbsentGpu:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> _AbsentGpu:
        """Key of what a kernel remembers for a device: one that no GPU has."""
        return self

    def get_current_stream(self, _device: object) -> int:
        return 0


def check_architecture(arch: int) -> None:
    """Raises ValueError if kernels can't be compiled for this compute capability."""
    if arch not in ARCHITECTURES:
        allowed = ", ".join(map(str, ARCHITECTURES))
        raise ValueError(f"arch is {arch}, allowed are {allowed}")


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Variant]]:
    """Kernels launched inside on CPU tensors are compiled, not run: outputs stay unwritten.

    Args:
        arch: Compute capability, one of `ARCHITECTURES`.

    Yields:
        The list that grows by one entry with every variant that is met first.

    Raises:
        ValueError: `arch` is none of them.
        RuntimeError: Triton's interpreter is on, or, inside, a kernel can't be compiled.
    """
    check_architecture(arch)
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    gpu, launched = _AbsentGpu(arch), set()
    variants: list[Variant] = []
    hits: list[bool] = []
    launch, listener = JITFunction.run, knobs.compilation.listener
    # Read from the private name: the public one would look for a GPU.
    active = driver._active

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.add(self)
        name = _name(self)
        begun = time.perf_counter()
        try:
            launch(self, *arguments, grid=grid, warmup=True, **options)
        except TritonError as error:
            raise RuntimeError(f"{name} can't be compiled for sm_{arch}: {error}") from error
        seconds = time.perf_counter() - begun
        # Empty where this process has met the variant before.
        variants.extend(Variant(name, seconds, hit) for hit in hits)
        hits.clear()

    def note(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    driver.set_active(gpu)
    JITFunction.run, knobs.compilation.listener = compile_only, note
    try:
        with settings_for(arch):
            yield variants
    finally:
        JITFunction.run, knobs.compilation.listener = launch, listener
        driver.set_active(active)
        for kernel in launched:
            kernel.device_caches.pop(gpu, None)


def _name(kernel: Any) -> str:
    room = kernel.module.removeprefix("spanbert_fast.kernels.").split(".")[0]
    return f"{room}.{kernel.fn.__name__.removeprefix('_')}"
