"""What can be said against a folder of weights before anything in it is believed."""

from __future__ import annotations

import json
import re
from pathlib import Path

MAX_JSON_BYTES = 64 << 20
_INDEX_PATTERN = "*.index.json"


def shard_names(index: Path) -> dict[str, str]:
    """The file name of each tensor, as an index of shards tells it.

    Raises:
        FileNotFoundError: a shard is not there.
        ValueError: the index is damaged or names a file outside its folder.
    """
    if (size := index.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{index} has {size:,} bytes, allowed are {MAX_JSON_BYTES:,}")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index}: not JSON ({error})") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{index} has no "weight_map" with names of tensors and files')
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f'{index} has no "metadata", which must be an object')
    for name in {str(value): value for value in weight_map.values()}.values():
        if not isinstance(name, str) or name != Path(name).name or "\\" in name or name == "..":
            raise ValueError(f"{index} names {name!r}, must be a file in its own folder")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not there")
    return weight_map


def check_indices(folder: Path) -> None:
    """Raises as `shard_names` does, for every index in a folder."""
    for index in sorted(folder.glob(_INDEX_PATTERN)):
        shard_names(index)


def unpickling_reason(error: Exception) -> str:
    """What torch has against a pickle, without its advice to trust the file."""
    text = str(error)
    if found := re.search(r"WeightsUnpickler error: ([^\n]*)", text):
        return found[1]
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    advice = ("Weights only load failed", "Check the documentation")
    reasons = [part for part in paragraphs if part and not part.startswith(advice)]
    return (reasons or paragraphs)[0][:300]
