"""Rewrite a Hugging Face BERT folder with `pytorch_model.bin` as one of our folders."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from spanbert_fast.convert.folder import Conversion, plain_names, read_config, write_folder
from spanbert_fast.convert.unpickle import TIMEOUT_SECONDS, read_pickled_tensors


def convert_huggingface(
    source: Path,
    output: Path,
    *,
    config: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Conversion:
    """Write `source/pytorch_model.bin` as one of our folders, in float32.

    Args:
        source: the folder.
        output: the new folder.
        config: a BERT `config.json`; the folder's own unless given.
        tokenizer: saved into the folder.
        timeout_seconds: how long the separate reading process may take.

    Raises:
        FileNotFoundError: weights or configuration do not exist.
        FileExistsError: `output` exists and is not empty.
        ValueError: the file is damaged or asks for code, or does not fit the configuration.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no such folder: {source}")
    values = read_config(config or source / "config.json")
    read, skipped = read_pickled_tensors(
        source / "pytorch_model.bin", timeout_seconds=timeout_seconds
    )
    # A bare `BertModel` was saved without its `bert.` prefix.
    bare = not any(name.startswith("bert.") for name in read)
    prefixes = {"embeddings.": "bert.embeddings.", "encoder.": "bert.encoder."} if bare else {}
    tensors = plain_names(read, prefixes)
    return write_folder(
        source, output, values, tensors, skipped=tuple(skipped), tokenizer=tokenizer
    )
