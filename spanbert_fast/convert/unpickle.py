"""Read the tensors of a pickled checkpoint without running what the pickle says.

`torch.load(weights_only=True)` refuses code. On top of that it runs in a process of its own, so
that a file made to crash, hang or exhaust the reader takes nothing with it; only a safetensors file
comes back.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TIMEOUT_SECONDS = 600
_REFUSED = 3  # exit status of the child for a file that it understood and will not load


def read_pickled_tensors(
    path: Path, *, timeout_seconds: float = TIMEOUT_SECONDS
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a pickled state dict, and the names of its entries that are no tensors.

    Args:
        path: a file written by `torch.save`: a state dict, or a dict that holds one under "model".
        timeout_seconds: how long the reading process may take.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, asks for code, holds no tensors, or took too long.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, must be a file that torch.save wrote")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with tempfile.TemporaryDirectory(prefix="spanbert_fast_") as directory:
        target = Path(directory) / "tensors.safetensors"
        command = [sys.executable, "-m", "spanbert_fast.convert.unpickle", str(path), str(target)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{path}: not read within {timeout_seconds:g} s, given up") from None
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode == _REFUSED:
            raise ValueError(f"{path}: {last}")
        if done.returncode != 0:
            raise ValueError(f"{path}: the reading process ended with {done.returncode}: {last}")
        try:
            return load_file(target), json.loads(done.stdout)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: the reading process wrote no tensors: {error}") from error


def _load(path: str) -> Mapping[object, object]:
    """The state dict in the file."""
    try:
        # fairseq keeps its command line beside the weights; a Namespace holds values, no more.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: it loads, or it does not
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Between torch's advice to trust the file and its pointer to the manual.
        paragraphs = str(error).split("\n\n")
        reason = " ".join(paragraphs[min(1, len(paragraphs) - 1)].split())
        raise ValueError(
            f"refused, because it holds more than tensors or is damaged ({reason})"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, AttributeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"damaged or not a torch checkpoint ({first})") from error
    inner = content.get("model") if isinstance(content, dict) else None
    states = inner if isinstance(inner, Mapping) else content
    if not isinstance(states, Mapping):
        raise ValueError(f"holds a {type(states).__name__}, not a state dict")
    if not any(isinstance(value, Tensor) for value in states.values()):
        names = ", ".join(str(name) for name in list(states)[:8]) or "nothing"
        raise ValueError(f"holds no tensors, only {names}")
    return states


def main(source: str, target: str) -> int:
    """Write the tensors of `source` to `target`; the exit status of the reading process."""
    try:
        states = _load(source)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return _REFUSED
    tensors = {
        str(name): value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in states.items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, target)
    json.dump(sorted(str(name) for name in states if str(name) not in tensors), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
