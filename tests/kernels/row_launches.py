"""Launches of the kernels that work on rows, recorded instead of run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    """One call of a kernel."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments that Triton compiles in."""
        constants = {p.name: self.arguments[p.name] for p in self.kernel.params if p.is_constexpr}
        absent = {name: None for name, value in self.arguments.items() if value is None}
        return constants | absent

    @property
    def variant(self) -> tuple[Any, ...]:
        """What Triton's launcher compiles a variant for."""
        specialised = (
            native_specialize_impl(
                CUDABackend,
                self.arguments[p.name],
                p.is_const,
                not p.do_not_specialize,
                not p.do_not_specialize_on_alignment,
            )
            for p in self.kernel.params
            if p.name not in self.constants
        )
        options = tuple(sorted(self.options.items()))
        return self.kernel.__name__, *specialised, *self.constants.items(), options

    @property
    def signature(self) -> dict[str, str]:
        """Triton's name of the type of each other argument."""
        names = (name for name in self.kernel.arg_names if name not in self.constants)
        return {
            name: native_specialize_impl(CUDABackend, self.arguments[name], False, False, False)[0]
            for name in names
        }


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernels are not run inside, their launches are listed; outputs keep what memory held."""
    launches: list[Launch] = []
    original = JITFunction.run

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        known = dict(zip(self.arg_names, arguments, strict=False))
        known |= {key: value for key, value in options.items() if key in self.arg_names}
        rest = {key: value for key, value in options.items() if key not in self.arg_names}
        launches.append(Launch(self, known, rest))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original
