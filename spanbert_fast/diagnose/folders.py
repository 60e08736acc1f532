"""What a folder is, how it was made, and whether it is damaged."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from spanbert_fast.data.manifest import FORMAT as SHARDS_FORMAT
from spanbert_fast.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    describe_file,
    read_manifest,
)
from spanbert_fast.data.shards import TokenShards
from spanbert_fast.data.tokenizer import load_tokenizer
from spanbert_fast.diagnose.machine import Check, run_check
from spanbert_fast.model.pretrained import Model
from spanbert_fast.train.checkpoint import list_checkpoints, verify_checkpoint

_CONFIG_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "max_span_targets",
    "untrained_heads",
)
Kind = Literal["token shards", "checkpoint", "run", "model"]


@dataclass(frozen=True)
class VerifyReport:
    """What `spanbert-fast verify` found."""

    path: Path
    kind: Kind
    checks: tuple[Check, ...]

    @property
    def is_intact(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class ShowReport:
    """What `spanbert-fast show` tells: sections of names and values."""

    path: Path
    kind: Kind
    sections: dict[str, dict[str, Any]]


def recognise(path: Path) -> Kind:
    """What the folder is, from the names of its files.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is none of ours.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path}")
    manifest = path / MANIFEST_NAME
    if manifest.is_file() and SHARDS_FORMAT.encode() in manifest.read_bytes():
        return "token shards"
    if (path / "state.json").is_file() or (manifest.is_file() and path.name.startswith("step-")):
        return "checkpoint"
    if (path / "checkpoints").is_dir() or (path / "run.json").is_file():
        return "run"
    if (path / "config.json").is_file():
        return "model"
    raise ValueError(
        f"{path} is not a folder of token shards, a checkpoint, a run or a model: it holds "
        f"{', '.join(sorted(child.name for child in path.iterdir())[:8]) or 'nothing'}"
    )


def verify(path: Path) -> VerifyReport:
    """Check every file of a folder of ours.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is none of ours.
    """
    kind = recognise(path)
    checkers = {
        "token shards": _check_shards,
        "checkpoint": _check_checkpoint,
        "run": _check_run,
        "model": _check_model,
    }
    return VerifyReport(path, kind, tuple(checkers[kind](path)))


def show(path: Path) -> ShowReport:
    """What a folder of ours holds and how it was made; nothing is verified.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is none of ours, or what describes it can't be read.
    """
    kind = recognise(path)
    describers = {
        "token shards": _describe_shards,
        "checkpoint": _describe_checkpoint,
        "run": _describe_run,
        "model": _describe_model,
    }
    return ShowReport(path, kind, describers[kind](path))


def _check_shards(path: Path) -> list[Check]:
    def contents() -> str:
        shards = TokenShards.open(path, verify=True)
        blocks = ", ".join(
            f"{getattr(shards.manifest.counts, split).blocks:,} {split} blocks"
            for split in ("train", "validation")
        )
        return f"{len(shards.manifest.all_files())} files, {blocks}"

    whole = run_check("files, ids and lengths", contents)
    if whole.passed:
        return [whole]
    # Opening stops at the first fault; whoever has to repair wants all of them.
    checks = [whole]
    for file in read_manifest(path).all_files() if _is_readable(path) else ():

        def compare(name: str = file.name, digest: str = file.sha256) -> str:
            if describe_file(path, name).sha256 != digest:
                raise ValueError("its sha256 is not the one in the manifest")
            return "ok"

        checks.append(run_check(file.name, compare))
    return [check for check in checks if not check.passed]


def _is_readable(path: Path) -> bool:
    try:
        read_manifest(path)
    except ValueError:
        return False
    return True


def _check_checkpoint(path: Path) -> list[Check]:
    def compare() -> str:
        found = verify_checkpoint(path)
        return f"step {found.step:,}, {found.num_bytes:,} bytes"

    return [run_check(path.name, compare)]


def _check_run(path: Path) -> list[Check]:
    checks = [
        check
        for checkpoint in list_checkpoints(path / "checkpoints")
        for check in _check_checkpoint(checkpoint)
    ]
    if (path / "model").is_dir():
        checks += _check_model(path / "model")
    if not checks:
        raise ValueError(f"{path} holds no checkpoint and no model yet")
    return checks


def _check_model(path: Path) -> list[Check]:
    """Nothing beside a model tells what its bytes were, so this finds faults that show."""

    def weights() -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = Model.from_pretrained(path)
        for name, tensor in model.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} holds values that are not finite")
        remarks = [str(warning.message) for warning in caught]
        count = sum(parameter.numel() for parameter in model.parameters())
        return "; ".join([f"{count:,} parameters, all finite", *remarks])

    def tokenizer() -> str:
        size = len(load_tokenizer(path))
        limit = json.loads((path / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        if size > limit:
            raise ValueError(f"{size} entries, the model has {limit}")
        return f"{size:,} entries"

    checks: dict[str, Callable[[], str]] = {"weights and configuration": weights}
    if (path / "tokenizer.json").is_file() or (path / "vocab.txt").is_file():
        checks["tokenizer"] = tokenizer
    return [run_check(name, check) for name, check in checks.items()]


def _describe_shards(path: Path) -> dict[str, dict[str, Any]]:
    manifest = read_manifest(path)
    files = [*manifest.train, *manifest.validation]
    sections: dict[str, dict[str, Any]] = {
        "shards": {
            "sequence length": manifest.seq_length,
            "vocabulary": manifest.vocab_size,
            "ids stored as": manifest.dtype,
            "files": f"{len(files)}, {sum(file.bytes for file in files):,} bytes",
            "tokenizer": path / TOKENIZER_FOLDER,
            "content sha256": manifest.content_hash(),
        }
    }
    for name in ("train", "validation"):
        tally = getattr(manifest.counts, name)
        sections[name] = {key: f"{value:,}" for key, value in vars(tally).items()}
    return {**sections, "settings": dict(manifest.settings)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values


def _describe_checkpoint(path: Path) -> dict[str, dict[str, Any]]:
    state = _read_json(path / "state.json")
    sections: dict[str, dict[str, Any]] = {
        "checkpoint": {"step": state.get("step"), "bytes": f"{_size(path):,}"}
    }
    # Whatever the training room wrote in tables; generator states are of no use to a reader.
    for name, value in state.items():
        if isinstance(value, dict) and name != "random":
            sections[name] = value
    return sections


def _describe_run(path: Path) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    if (path / "run.json").is_file():
        for name, value in _read_json(path / "run.json").items():
            values = value if isinstance(value, dict) else {name: value}
            sections[name] = _configuration(values) if name == "model" else values
    metrics = path / "metrics.jsonl"
    if metrics.is_file() and (lines := metrics.read_text(encoding="utf-8").splitlines()):
        last = json.loads(lines[-1])
        sections["last metrics"] = {k: v for k, v in last.items() if not isinstance(v, list)}
    checkpoints = list_checkpoints(path / "checkpoints")
    sections["checkpoints"] = {c.name: f"{_size(c):,} bytes" for c in checkpoints}
    return {name: section for name, section in sections.items() if section}


def _configuration(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model's configuration that say what model it is."""
    return {name: values[name] for name in _CONFIG_FIELDS if name in values}


def _describe_model(path: Path) -> dict[str, dict[str, Any]]:
    config = _read_json(path / "config.json")
    sections: dict[str, dict[str, Any]] = {"configuration": _configuration(config)}
    weights: dict[str, Any] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            count = sum(_numel(view.get_shape()) for view in shapes.values())
            kinds = sorted({view.get_dtype() for view in shapes.values()})
        weights[file.name] = f"{len(shapes)} tensors, {count:,} values, {', '.join(kinds)}"
    for file in sorted(path.glob("*.bin")):
        weights[file.name] = "a pickle; `spanbert-fast convert --from hf` makes it safetensors"
    sections["weights"] = weights or {"files": "none"}
    files = [f.name for f in sorted(path.iterdir()) if f.suffix in (".json", ".txt", ".md")]
    sections["other files"] = {"names": ", ".join(files)}
    return sections


def _numel(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
