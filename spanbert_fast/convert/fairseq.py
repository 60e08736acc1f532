"""Read the original SpanBERT checkpoint with its two heads, as fairseq wrote it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from spanbert_fast.convert.folder import Conversion, plain_names, read_config, write_folder
from spanbert_fast.convert.unpickle import TIMEOUT_SECONDS, read_pickled_tensors

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
_TIED = (f"{_OURS}decoder.weight", "bert.embeddings.word_embeddings.weight")
_POSITION_TABLE = f"{_OURS}position_embeddings.weight"


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
    table = tensors.get(_POSITION_TABLE)
    if table is not None:
        if table.dim() != 2:
            raise ValueError(f"{source}: the SBO position table has shape {tuple(table.shape)}")
        slots, size = table.shape
        values |= {"max_span_targets": slots, "span_position_embedding_size": size}
    return write_folder(
        source, output, values, tensors, skipped=tuple(skipped), tokenizer=tokenizer
    )
