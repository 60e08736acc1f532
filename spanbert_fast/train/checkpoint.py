"""Checkpoints that are complete on the disk or not there at all, and that show any damage.

A checkpoint is a folder `step-0001000` of four files:

- `model.safetensors`, `optimizer.safetensors`: every tensor by its name;
- `state.json`: step, settings, state of the random generators, environment;
- `manifest.json`: size and SHA-256 of the other three.

It is written under a temporary name, synchronised file by file, renamed, and the parent folder is
synchronised: after a crash at any moment the name either does not exist or means all of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_log = logging.getLogger(__name__)

_FORMAT = 1
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_PAYLOAD = (_MODEL, _OPTIMIZER, _STATE)
_MANIFEST = "manifest.json"
_PREFIX = "step-"
_LEFTOVER = ".unfinished-"


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, or not usable here."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, in memory."""

    step: int
    """Optimizer steps done."""
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


@dataclass(frozen=True)
class CheckpointFiles:
    """What `verify_checkpoint` found."""

    path: Path
    step: int
    num_bytes: int


def save_checkpoint(
    directory: Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """The folder of a new checkpoint, verified; older ones beyond `keep` are deleted after that.

    Args:
        directory: Parent of the checkpoints; made if needed.
        step: Optimizer steps done.
        weights: By name, each storage once.
        optimizer: By name.
        state: JSON values.
        keep: How many checkpoints may stay, at least 1.

    Raises:
        OSError: The disk is full or fails. Nothing is left of the new checkpoint, and the old ones
            are untouched.
        CheckpointError: What was read back is not what was written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    final = directory / f"{_PREFIX}{step:07d}"
    temporary = directory / f"{_LEFTOVER}{final.name}"
    try:
        temporary.mkdir()
        _write_tensors(temporary / _MODEL, weights)
        _write_tensors(temporary / _OPTIMIZER, optimizer)
        _write_json(temporary / _STATE, {**state, "step": step})
        files = {name: _seal(temporary / name) for name in _PAYLOAD}
        _write_json(temporary / _MANIFEST, {"format": _FORMAT, "files": files})
        _seal(temporary / _MANIFEST)
        _sync_folder(temporary)
        if final.exists():  # a refused one of an earlier run; its name is needed
            _delete(final)
        temporary.rename(final)
        _sync_folder(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    verify_checkpoint(final)
    older = [path for path in list_checkpoints(directory) if _step_of(path) < step]
    for path in older[: max(0, len(older) + 1 - keep)]:
        _delete(path)
    return final


def list_checkpoints(directory: Path) -> list[Path]:
    """Folders that bear the name of a checkpoint, oldest first; they need not verify."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if p.name.startswith(_PREFIX) and p.is_dir()]
    return sorted((p for p in found if p.name[len(_PREFIX) :].isdigit()), key=_step_of)


def verify_checkpoint(path: Path) -> CheckpointFiles:
    """Step and size of a checkpoint whose every byte is as it was written.

    Raises:
        CheckpointError: Something is missing, cut short or changed; the file is named.
    """
    manifest = _read_json(path / _MANIFEST)
    files = manifest.get("files")
    if manifest.get("format") != _FORMAT or not isinstance(files, dict):
        raise CheckpointError(f"{path / _MANIFEST} is not of format {_FORMAT}")
    if set(files) != set(_PAYLOAD):
        raise CheckpointError(f"{path / _MANIFEST} lists {sorted(files)}, not {sorted(_PAYLOAD)}")
    num_bytes = sum(_verify_file(path / name, entry) for name, entry in files.items())
    step = _read_json(path / _STATE).get("step")
    if step != _step_of(path):
        raise CheckpointError(f"{path} holds step {step}")
    return CheckpointFiles(path, step, num_bytes)


def latest_valid_checkpoint(
    directory: Path, *, on_refused: Callable[[Path, str], None] | None = None
) -> Path | None:
    """The newest checkpoint that verifies; None if there is none of any kind.

    Args:
        directory: Parent of the checkpoints.
        on_refused: Called with each newer checkpoint that does not verify, and why; a warning is
            logged unless given.

    Raises:
        CheckpointError: There are checkpoints, but none verifies.
    """
    candidates = list_checkpoints(directory)
    for path in reversed(candidates):
        try:
            return verify_checkpoint(path).path
        except CheckpointError as error:
            if on_refused is None:
                _log.warning("checkpoint %s refused: %s", path, error)
            else:
                on_refused(path, str(error))
    if candidates:
        raise CheckpointError(
            f"no checkpoint in {directory} verifies; remove the folder to start from the beginning"
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, verified first.

    Raises:
        CheckpointError: It does not verify.
    """
    step = verify_checkpoint(path).step
    return Checkpoint(
        step, load_file(path / _MODEL), load_file(path / _OPTIMIZER), _read_json(path / _STATE)
    )


def random_state() -> dict[str, Any]:
    """State of torch's default generators as JSON values."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {
        device: base64.b64encode(bytes(state.tolist())).decode() for device, state in states.items()
    }


def restore_random_state(states: Mapping[str, str]) -> None:
    """Put back what `random_state` gave."""
    for device, text in states.items():
        state = torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed process left half written or half deleted."""
    for path in directory.glob(f"{_LEFTOVER}*"):
        shutil.rmtree(path)


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if digits.isdigit() else -1


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how this library reports a failed write
        raise OSError(f"{path} cannot be written: {error}") from error


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, sort_keys=True), encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no object")
    return values


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify_file(path: Path, entry: Any) -> int:
    """Size of a file that is as its entry in the manifest says."""
    if not isinstance(entry, dict) or not {"size", "sha256"} <= set(entry):
        raise CheckpointError(f"the manifest says nothing of the size and SHA-256 of {path}")
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(f"{path} has {size} bytes instead of {entry['size']}")
        if _digest(path) != entry["sha256"]:
            raise CheckpointError(f"{path} was changed: its SHA-256 is not the written one")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return size


def _seal(path: Path) -> dict[str, Any]:
    """Size and hash of a file whose bytes have reached the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": _digest(path)}


def _sync_folder(path: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and renames are synchronous
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    """Take the name away at once, then the content: a half-deleted folder is no checkpoint."""
    leftover = path.with_name(f"{_LEFTOVER}deleted-{path.name}")
    path.rename(leftover)
    shutil.rmtree(leftover)
