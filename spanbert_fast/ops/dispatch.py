"""Which body of an op runs: its PyTorch reference or its Triton twin. The whole policy.

`auto` runs the twin on CUDA tensors and the reference elsewhere and while exporting. `torch` and
`triton` are orders: `triton` runs the twin, and raises where it cannot run. A twin runs on CUDA
tensors, and on CPU tensors under Triton's interpreter (`TRITON_INTERPRET=1`) or a simulator.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, cast, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
P = ParamSpec("P")
R = TypeVar("R")

_backend: Backend = "auto"
# Triton reads the variable when it is imported, so a later change would not be obeyed either.
_twins_run_on_cpu = os.environ.get("TRITON_INTERPRET") == "1"


class _Twin(NamedTuple):
    function: Callable[..., Any] | None
    absence: str
    """Why there is none; empty if there is one."""


class BackendChoice(NamedTuple):
    """What a call of an op would run on a device, under the present setting."""

    op: str
    backend: Literal["torch", "triton", "none"]
    """`none`: the call would raise."""
    reason: str


_rooms: dict[str, str] = {}
"""Op -> name of the module that it, and its twin, stand in."""
_twins: dict[str, _Twin] = {}


def set_backend(name: Backend) -> None:
    """Sets the backend of all ops, for the whole process.

    Args:
        name: `"auto"`, `"torch"` or `"triton"`.

    Raises:
        ValueError: `name` is none of these.
    """
    global _backend
    if name not in get_args(Backend):
        raise ValueError(f"backend is {name!r}, allowed are {', '.join(get_args(Backend))}")
    if name == "triton":
        for op in _rooms:
            _twin_of(op)
    _backend = name


def get_backend() -> Backend:
    """The present setting: `"auto"`, `"torch"` or `"triton"`."""
    return _backend


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Sets the backend of all ops inside a `with` block; see `set_backend`."""
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


@contextmanager
def twins_on_cpu() -> Iterator[None]:
    """Lets the order `triton` reach CPU tensors: in a simulator, or to compile kernels ahead."""
    global _twins_run_on_cpu
    before = _twins_run_on_cpu
    _twins_run_on_cpu = True
    try:
        yield
    finally:
        _twins_run_on_cpu = before


def accelerated(reference: Callable[P, R]) -> Callable[P, R]:
    """The op whose body is `reference` and whose Triton twin is found by name.

    The twin of `ops.norm.f` is the function `kernels.norm.f`, with the same signature. Where
    twins can run it is looked up here, once: an import inside a call could not be traced by
    `torch.compile`. Elsewhere nobody waits for Triton to load before somebody orders it.
    """
    name = reference.__name__
    _rooms[name] = reference.__module__.rpartition(".")[2]
    if torch.version.cuda is not None or _twins_run_on_cpu:
        _twin_of(name)

    @functools.wraps(reference)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        device = _device_of(*args, **kwargs)
        backend, reason = _choose(name, device.type)
        if backend == "triton":
            function = _twin_of(name).function
            assert function is not None
            return cast(R, function(*args, **kwargs))
        if backend == "none":
            raise RuntimeError(f"{name}: backend 'triton' was ordered, but {reason}")
        return reference(*args, **kwargs)

    return op


def backend_of(op: str, device: torch.device | str) -> BackendChoice:
    """What a call of `op` with tensors on `device` would run now, and why.

    Args:
        op: Name of a public op, such as `"bias_gelu"`; `op_names()` lists them.
        device: Where the tensors would be.

    Raises:
        ValueError: There is no such op.
    """
    if op not in _rooms:
        raise ValueError(f"op is {op!r}, allowed are {', '.join(op_names())}")
    backend, reason = _choose(op, torch.device(device).type)
    return BackendChoice(op, backend, reason)


def op_names() -> list[str]:
    """Names of all ops that were defined."""
    return sorted(_rooms)


def _twin_of(name: str) -> _Twin:
    if name not in _twins:
        _twins[name] = _find_twin(_rooms[name], name)
    return _twins[name]


def _find_twin(room: str, name: str) -> _Twin:
    module_name = f"spanbert_fast.kernels.{room}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return _Twin(None, "triton is not installed")
        if error.name not in (module_name, "spanbert_fast.kernels"):
            raise
        return _Twin(None, "it has no Triton twin")
    function = getattr(module, name, None)
    return _Twin(function, "" if function else "it has no Triton twin")


def _device_of(*args: object, **kwargs: object) -> torch.device:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device
    raise TypeError("an op was called without a tensor")


def _choose(name: str, device_type: str) -> tuple[Literal["torch", "triton", "none"], str]:
    """The backend and its reason; `none` if an order cannot be obeyed."""
    if _backend == "torch":
        return "torch", "backend 'torch' is set"
    if _backend == "auto" and device_type != "cuda":
        return "torch", f"tensors on {device_type!r}"
    twin = _twin_of(name)
    if _backend == "triton":
        if twin.function is None:
            return "none", twin.absence
        if device_type == "cuda" or (device_type == "cpu" and _twins_run_on_cpu):
            return "triton", "backend 'triton' is set"
        return "none", f"its tensors are on {device_type!r} and Triton runs on CUDA"
    if twin.function is None:
        return "torch", twin.absence
    if torch.compiler.is_exporting():
        return "torch", "exporting"
    return "triton", "tensors on CUDA"
