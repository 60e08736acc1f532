"""The folder of a run: whose it is, whether it is finished, and what may be continued in it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from spanbert_fast.data.corpus import Source
from spanbert_fast.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    read_manifest,
    write_atomically,
)
from spanbert_fast.data.options import PrepareOptions

WORK_FOLDER: Final = "unfinished"
_RUN_NAME: Final = "run.json"
# On these the time depends, and not the bytes.
_FREE_OPTIONS: Final = ("input", "output", "workers", "part_megabytes")


def run_settings(options: PrepareOptions, sources: list[Source]) -> dict[str, Any]:
    """Everything on which the bytes depend, in JSON's types."""
    chosen = {k: v for k, v in dataclasses.asdict(options).items() if k not in _FREE_OPTIONS}
    inputs = [
        {
            "name": source.name,
            "weight": source.weight,
            "files": len(source.files),
            "bytes": sum(file.stat().st_size for file in source.files),
        }
        for source in sources
    ]
    versions = {name: version(name) for name in ("pyarrow", "sentencex", "tokenizers")}
    return {**chosen, "inputs": inputs, "versions": versions}


def finished_manifest(output: Path, settings: dict[str, Any]) -> Manifest | None:
    """The manifest of a finished run with the same settings; None if there is work to do."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file, must be a folder")
    if not (output / MANIFEST_NAME).exists():
        if output.exists() and any(output.iterdir()) and not (output / WORK_FOLDER).exists():
            raise ValueError(f"output {output} is not empty, must be a new or an unfinished folder")
        return None
    manifest = read_manifest(output)
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)  # Killed just after the manifest.
    difference = _first_difference(manifest.settings, settings)
    if difference:
        raise ValueError(
            f"output {output} was finished with other settings ({difference}); choose another "
            "folder, or delete this one"
        )
    return manifest


def _first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    for key in new:
        if old.get(key) != new[key]:
            return f"{key} was {old.get(key)!r} and is {new[key]!r}"
    return None


def open_work_folder(output: Path, settings: dict[str, Any], sources: list[Source]) -> Path:
    """The folder of the parts, checked to belong to this run."""
    work = output / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    files = [
        [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
        for source in sources
        for file in source.files
    ]
    run = {**settings, "files": files}
    path = work / _RUN_NAME
    if path.exists():
        difference = _first_difference(json.loads(path.read_bytes()), run)
        if difference:
            raise ValueError(
                f"output {output} holds an unfinished run with other settings ({difference}); "
                f"delete {work} to begin anew"
            )
    else:
        write_atomically(path, json.dumps(run, indent=1).encode())
    return work
