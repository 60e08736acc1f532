"""The original SpanBERT checkpoints: `model.pt` with both heads, `pytorch_model.bin` without."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spanbert_fast.config import HEADS
from spanbert_fast.convert.departure import (
    ExportDtype,
    Written,
    bert_config,
    cast_all,
    copy_vocabulary,
    depart,
    smallest_exact_dtype,
)
from spanbert_fast.convert.folder import (
    Conversion,
    plain_names,
    read_config,
    span_head_sizes,
    write_folder,
)
from spanbert_fast.convert.isolated import TIMEOUT_SECONDS
from spanbert_fast.convert.publish import new_folder
from spanbert_fast.convert.unpickle import read_pickled_tensors

_THEIRS, _OURS = "cls.pair_target_predictions.", "cls.span_boundary."
# Applied in this order. The original prefixes everything with `decoder.`, which some copies lack.
_PREFIXES = {
    "decoder.": "",
    f"{_THEIRS}mlp_layer_norm.linear1.": f"{_OURS}transform1.dense.",
    f"{_THEIRS}mlp_layer_norm.layer_norm1.": f"{_OURS}transform1.LayerNorm.",
    f"{_THEIRS}mlp_layer_norm.linear2.": f"{_OURS}transform2.dense.",
    f"{_THEIRS}mlp_layer_norm.layer_norm2.": f"{_OURS}transform2.LayerNorm.",
    _THEIRS: _OURS,
}
_SPAN_POSITION_SIZE = 200  # built into the original head
_TIED = (f"{_OURS}decoder.weight", "bert.embeddings.word_embeddings.weight")


def convert_fairseq(
    source: Path,
    output: Path,
    *,
    config: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Conversion:
    """Write the original `model.pt` as one of our folders, in float32.

    The number of SBO slots and the size of their vectors come from the shape of the position table,
    whatever the configuration says.

    Args:
        source: a state dict, or a dict that holds one under "model"; with or without the
            `decoder.` prefix, LayerNorm as gamma/beta or weight/bias.
        output: the new folder.
        config: a BERT `config.json` with the sizes of the model.
        tokenizer: saved into the folder.
        timeout_seconds: how long the separate reading process may take.

    Raises:
        FileNotFoundError: `source` or `config` does not exist.
        FileExistsError: `output` exists and is not empty.
        ValueError: the file is damaged or asks for code, or does not fit the configuration.
    """
    values = read_config(config)
    read, skipped = read_pickled_tensors(source, timeout_seconds=timeout_seconds)
    tensors = plain_names(read, _PREFIXES)
    decoder = tensors.pop(_TIED[0], None)
    if decoder is not None and not torch.equal(decoder, tensors.get(_TIED[1], decoder)):
        raise ValueError(f"{source}: the SBO decoder is not the word embedding matrix")
    values |= span_head_sizes(source, tensors)
    return write_folder(
        source, output, values, tensors, skipped=tuple(skipped), tokenizer=tokenizer
    )


def write_fairseq(
    source: Path, output: Path, *, encoder_only: bool = False, dtype: ExportDtype | None = None
) -> Written:
    """Write one of our folders as the original SpanBERT was released.

    With a trained head the folder holds `model.pt`: one flat state dict, names with the prefix
    `decoder.`, the tied matrix under each of its names. Without, it holds `pytorch_model.bin`, the
    encoder alone. LayerNorm is spelled gamma and beta. `config.json` and, if the source has it,
    `vocab.txt` stand beside them.

    Args:
        source: a folder that `sf.Model.from_pretrained` reads.
        output: the new folder.
        encoder_only: leave the heads out.
        dtype: of the weights; by default float16, as released, if no value changes by it, else
            float32.

    Raises:
        FileNotFoundError: `source` does not exist.
        FileExistsError: `output` exists and is not empty.
        ValueError: the original code could not compute the model's numbers, or a value is too
            large for `dtype`.
    """
    model = depart(source, heads=() if encoder_only else HEADS, needs_bert_eps=True)
    size = model.config.span_position_embedding_size
    if "sbo" in model.heads and size != _SPAN_POSITION_SIZE:
        raise ValueError(
            f"{source}: span_position_embedding_size is {size}, must be {_SPAN_POSITION_SIZE}: the "
            "original code knows no other; encoder_only leaves the head out"
        )
    number = getattr(torch, dtype) if dtype else smallest_exact_dtype(model.tensors)
    tensors = original_names(cast_all(source, model.tensors, number))
    with new_folder(output) as scratch:
        if model.heads:
            tensors = {f"decoder.{name}": tensor for name, tensor in tensors.items()}
        torch.save(tensors, scratch / ("model.pt" if model.heads else "pytorch_model.bin"))
        values = {**bert_config(model.config), "model_type": "bert"}
        (scratch / "config.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        copy_vocabulary(source, scratch)
    return model.report(output, number)


def original_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of the original code, without `decoder.`; the tied one thrice."""
    renamed = {}
    for name, tensor in tensors.items():
        ours = next((o for o in _PREFIXES.values() if o and name.startswith(o)), "")
        theirs = {value: key for key, value in _PREFIXES.items()}[ours] if ours else ""
        name = theirs + name.removeprefix(ours)
        stem, _, last = name.rpartition(".")
        if stem.rpartition(".")[2] in ("LayerNorm", "layer_norm1", "layer_norm2"):
            name = f"{stem}.{'gamma' if last == 'weight' else 'beta'}"
        renamed[name] = tensor
    for head in ("cls.predictions.", _THEIRS):
        if f"{head}bias" in renamed:
            renamed[f"{head}decoder.weight"] = tensors[_TIED[1]]
    return renamed
