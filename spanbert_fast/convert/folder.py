"""Write tensors under our names as one of our folders, or say exactly why they do not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spanbert_fast.config import HEADS, Config
from spanbert_fast.convert.publish import check_free, new_folder
from spanbert_fast.model.pretrained import Model

_LAYER_NORM_NAMES = {"gamma": "weight", "beta": "bias"}
POSITION_TABLE = "cls.span_boundary.position_embeddings.weight"
HEAD_PREFIXES = {"mlm": "cls.predictions.", "sbo": "cls.span_boundary."}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What became of a foreign checkpoint."""

    source: Path
    output: Path
    num_parameters: int
    max_span_targets: int
    """K of the SBO head."""
    untrained_heads: tuple[str, ...]
    """Heads that the source did not hold or lists as untrained; their weights are random."""
    missing: tuple[str, ...]
    """Tensors of those heads."""
    ignored: tuple[str, ...]
    """Entries of the source that a SpanBERT has no place for."""

    @property
    def remarks(self) -> tuple[tuple[str, str], ...]:
        """What a reader of the report wants to know, as pairs of a name and a text."""
        return (
            ("SBO slots", str(self.max_span_targets)),
            ("untrained heads", ", ".join(self.untrained_heads) or "none"),
            ("missing", ", ".join(self.missing) or "nothing"),
            ("ignored", ", ".join(self.ignored) or "nothing"),
        )


def read_config(path: Path) -> dict[str, Any]:
    """The values of a configuration file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}; give it with --config")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not a JSON object")
    return values


def span_head_sizes(source: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The fields of the configuration that the position table of an SBO head, if any, tells.

    Raises:
        ValueError: the table is no matrix.
    """
    table = tensors.get(POSITION_TABLE)
    if table is None:
        return {}
    if table.dim() != 2:
        raise ValueError(f"{source}: the SBO position table has shape {tuple(table.shape)}")
    slots, size = table.shape
    return {"max_span_targets": slots, "span_position_embedding_size": size}


def plain_names(
    tensors: Mapping[str, Tensor], replacements: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors with their prefixes replaced and LayerNorm's gamma and beta as weight and bias.

    Raises:
        ValueError: two tensors would have the same name.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in replacements.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        stem, _, last = name.rpartition(".")
        plain = f"{stem}.{_LAYER_NORM_NAMES.get(last, last)}" if stem else name
        if plain in renamed:
            raise ValueError(f"two tensors claim the name {plain}")
        renamed[plain] = tensor
    return renamed


def write_folder(
    source: Path,
    output: Path,
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    skipped: tuple[str, ...] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Conversion:
    """Build the model, check every shape, write the folder; `output` appears whole or not at all.

    Args:
        source: where the tensors came from, for messages.
        output: the new folder; must not exist or be empty.
        values: fields of the configuration.
        tensors: by our names; what is tied may stand there once or several times.
        skipped: entries of the source that were no tensors, for the report.
        tokenizer: saved into the folder.

    Raises:
        FileExistsError: `output` exists and is not empty.
        ValueError: a tensor of the encoder or a part of a head is missing, or a shape is wrong.
    """
    check_free(output)
    listed = Config.from_dict({**values, "dtype": "float32"}).untrained_heads
    values = {**values, "untrained_heads": [], "dtype": "float32"}
    _check_size(source, Config.from_dict(values), tensors)
    # Fixed draws for heads the source lacks: the same source gives the same bytes.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(Config.from_dict(values))
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}"
        )
    missing, ignored = _fill(source, model, tensors)
    untrained = _untrained_heads(source, missing, model)
    # A head that the source lists as random is random, even though its tensors are there.
    model.config.untrained_heads = [h for h in HEADS if h in untrained or h in listed]
    with new_folder(output) as scratch:
        model.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
    return Conversion(
        source=source,
        output=output,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_span_targets=model.config.max_span_targets,
        untrained_heads=tuple(model.config.untrained_heads),
        missing=tuple(missing),
        ignored=tuple(sorted([*ignored, *skipped])),
    )


def _check_size(source: Path, config: Config, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, before any memory is taken, if the encoder is out of all proportion."""
    with torch.device("meta"):
        expected = sum(weight.numel() for weight in Model(config).bert.parameters())
    given = sum(tensor.numel() for tensor in tensors.values())
    if expected > 2 * given:
        raise ValueError(
            f"{source}: the configuration describes an encoder of {expected:,} values, the "
            f"checkpoint holds {given:,}"
        )


@torch.no_grad()
def _fill(source: Path, model: Model, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Copy the tensors in; the model's names without a tensor, the tensors' without a place."""
    places: dict[int, list[str]] = {}
    targets = model.state_dict(keep_vars=True)
    for name, target in targets.items():
        places.setdefault(id(target), []).append(name)
    ignored = sorted(set(tensors) - set(targets))
    for name in ignored:
        if name.startswith("bert.encoder."):
            raise ValueError(f"{source}: {name} has no place in a model of this configuration")
    missing: list[str] = []
    for names in places.values():
        given = [name for name in names if name in tensors]
        if not given:
            missing.append(names[0])
            continue
        for name in given:
            value, shape = tensors[name], tuple(targets[name].shape)
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{source}: {name} has shape {tuple(value.shape)}, the configuration says "
                    f"{shape}"
                )
            if not value.is_floating_point():
                raise ValueError(f"{source}: {name} holds {value.dtype}, weights must be floats")
            if not torch.equal(value, tensors[given[0]]):
                raise ValueError(f"{source}: {name} and {given[0]} are one tensor here, but differ")
        targets[names[0]].copy_(tensors[given[0]])
    return missing, ignored


def _untrained_heads(source: Path, missing: list[str], model: Model) -> list[str]:
    """The heads that are missing altogether; anything else that is missing raises."""
    own_names = [name for name, _ in model.named_parameters()]  # what is tied stands here once
    untrained = []
    for head in HEADS:
        prefix = HEAD_PREFIXES[head]
        lost = [name for name in missing if name.startswith(prefix)]
        if lost and len(lost) < sum(name.startswith(prefix) for name in own_names):
            raise ValueError(f"{source}: the {head} head is incomplete, missing {', '.join(lost)}")
        untrained += [head] if lost else []
    if lost := [name for name in missing if not name.startswith(tuple(HEAD_PREFIXES.values()))]:
        raise ValueError(
            f"{source}: the encoder is incomplete, {len(lost)} tensors are missing: "
            f"{', '.join(lost[:5])}"
        )
    return untrained
