"""Read the tensors of a pickled checkpoint without running what the pickle says.

`torch.load(weights_only=True)` refuses code. On top of that it runs in a process of its own with
limits; only a safetensors file comes back.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spanbert_fast.convert.isolated import (
    TIMEOUT_SECONDS,
    Refusal,
    limit_memory,
    memory_budget,
    refuse,
    run_isolated,
)
from spanbert_fast.model.files import unpickling_reason


def read_pickled_tensors(
    path: Path, *, timeout_seconds: float = TIMEOUT_SECONDS, memory_bytes: int | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a pickled state dict, and the names of its entries that are no tensors.

    Args:
        path: a file written by `torch.save`: a state dict, or a dict that holds one under "model".
        timeout_seconds: how long the reading process may take.
        memory_bytes: what it may take beyond its imports; by default 1 GiB and four times the
            size of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, asks for code, holds no tensors, or took too much memory
            or time.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, must be a file that torch.save wrote")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with tempfile.TemporaryDirectory(prefix="spanbert_fast_") as directory:
        target = Path(directory) / "tensors.safetensors"
        printed = run_isolated(
            __name__,
            path,
            [str(path.resolve()), str(target)],
            memory_bytes=memory_bytes or memory_budget(path.stat().st_size),
            timeout_seconds=timeout_seconds,
        )
        try:
            return load_file(target), json.loads(printed)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path}: the reading process wrote no tensors: {error}") from error


def _load(path: str) -> Mapping[object, object]:
    """The state dict in the file."""
    try:
        # fairseq keeps its command line beside the weights; a Namespace holds values, no more.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: it loads, or it does not
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Refusal(
            "refused, because it holds more than tensors or is damaged "
            f"({unpickling_reason(error)})"
        ) from error
    except MemoryError:
        raise
    # What a damaged stream of instructions does to the reader's stack can be any error.
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise Refusal(f"damaged or not a torch checkpoint ({first})") from error
    inner = content.get("model") if isinstance(content, dict) else None
    states = inner if isinstance(inner, Mapping) else content
    if not isinstance(states, Mapping):
        raise Refusal(f"holds a {type(states).__name__}, not a state dict")
    if not any(isinstance(value, Tensor) for value in states.values()):
        names = ", ".join(_name(name) for name in list(states)[:8]) or "nothing"
        raise Refusal(f"holds no tensors, only {names}")
    return states


def _name(key: object) -> str:
    """A key for people; what is no string may take for ever to print."""
    return key[:200] if isinstance(key, str) else f"a key of type {type(key).__name__}"


def _dense(states: Mapping[object, object]) -> dict[str, Tensor]:
    """The named tensors, each with memory of its own."""
    tensors = {}
    for name, value in states.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            continue
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise Refusal(f"{_name(name)} is not a plain tensor: {value.layout}, {value.device}")
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
    return tensors


def main(memory_bytes: int, source: str, target: str) -> int:
    """Write the tensors of `source` to `target`; the exit status of the reading process."""
    limit_memory(memory_bytes)
    try:
        states = _load(source)
        tensors = _dense(states)
        save_file(tensors, target)
    except (Refusal, MemoryError, RuntimeError) as error:
        return refuse(error, memory_bytes)
    json.dump(sorted({_name(name) for name in states if name not in tensors}), sys.stdout)
    return 0
