"""Read the tensors of a Hugging Face folder, whatever kind of file they are in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spanbert_fast.convert.unpickle import read_pickled_tensors
from spanbert_fast.model.files import shard_names

_FOREIGN = {
    "tf_model.h5": "TensorFlow 2",
    "flax_model.msgpack": "Flax",
    "rust_model.ot": "Rust",
}
Reader = Callable[[Path], tuple[dict[str, Tensor], list[str]]]


def read_weights(folder: Path, *, timeout_seconds: float) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a folder, and the names of entries that are no tensors.

    Safetensors are preferred to pickles, one file to shards. Pickles are read in a process of
    their own.

    Raises:
        FileNotFoundError: the folder holds no weights, or lacks a shard.
        ValueError: a file is damaged, asks for code, or holds no weights that can be read here.
    """

    def pickled(path: Path) -> tuple[dict[str, Tensor], list[str]]:
        return read_pickled_tensors(path, timeout_seconds=timeout_seconds)

    readers: tuple[tuple[str, Reader], ...] = (
        ("model.safetensors", _safetensors),
        ("pytorch_model.bin", pickled),
    )
    for name, read in readers:
        if (folder / name).is_file():
            return read(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            return _read_shards(index, read)
    for name, kind in _FOREIGN.items():
        if (folder / name).is_file():
            raise ValueError(
                f"{folder} holds {name} of Hugging Face's {kind} classes and nothing else; save it "
                "once with a release of transformers that has them, as safetensors"
            )
    raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def _safetensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    try:
        return load_file(path), []
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or no safetensors file ({error})") from error


def _read_shards(index: Path, read: Reader) -> tuple[dict[str, Tensor], list[str]]:
    """All shards that an index names, which must hold what it says and nothing twice."""
    tensors: dict[str, Tensor] = {}
    skipped: list[str] = []
    weight_map = shard_names(index)
    for name in sorted(set(weight_map.values())):
        found, others = read(index.parent / name)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ValueError(f"{index.parent / name}: {twice[0]} is in another shard as well")
        tensors |= found
        skipped += others
    if lost := sorted(weight_map.keys() - tensors.keys()):
        raise ValueError(f"{index}: no shard holds {lost[0]} ({len(lost)} such names)")
    return tensors, skipped
