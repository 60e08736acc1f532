"""Hugging Face BERT folders in all their historical forms, in; plain ones of today, out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerBase

from spanbert_fast.config import Config
from spanbert_fast.convert.departure import ExportDtype, Written, cast_all, copy_files, depart
from spanbert_fast.convert.folder import Conversion, plain_names, read_config, write_folder
from spanbert_fast.convert.isolated import TIMEOUT_SECONDS
from spanbert_fast.convert.publish import new_folder
from spanbert_fast.convert.weights import read_weights

_TOKENIZER_FILES = (
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def convert_huggingface(
    source: Path,
    output: Path,
    *,
    config: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Conversion:
    """Write the weights of a BERT folder as one of our folders, in float32.

    Read are `model.safetensors` or, without it, `pytorch_model.bin`, each in one piece or in shards
    with an index; names with or without `bert.`, after `module.` of a parallel run; LayerNorm as
    weight/bias or gamma/beta; the MLM decoder with or without matrix and bias of its own.

    Args:
        source: the folder.
        output: the new folder.
        config: a BERT `config.json`; the folder's own unless given.
        tokenizer: saved into the folder.
        timeout_seconds: how long the separate process that reads a pickle may take.

    Raises:
        FileNotFoundError: weights or configuration do not exist.
        FileExistsError: `output` exists and is not empty.
        ValueError: a file is damaged or asks for code, or does not fit the configuration.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no such folder: {source}")
    config_path = config or source / "config.json"
    if config is None and not config_path.is_file() and (source / "bert_config.json").is_file():
        config_path = source / "bert_config.json"  # pytorch-pretrained-bert's name
    values = read_config(config_path)
    read, skipped = read_weights(source, timeout_seconds=timeout_seconds)
    tensors = plain_names(read, _prefixes(read))
    return write_folder(
        source, output, values, tensors, skipped=tuple(skipped), tokenizer=tokenizer
    )


def _prefixes(tensors: dict[str, Tensor]) -> dict[str, str]:
    """What to replace at the beginning of the names, in this order."""
    parallel = "module." if tensors and all(n.startswith("module.") for n in tensors) else ""
    replaced = {parallel: ""} if parallel else {}
    # A bare `BertModel` was saved without its `bert.` prefix.
    if not any(name.startswith(f"{parallel}bert.") for name in tensors):
        bare = ("embeddings.", "encoder.", "pooler.")
        replaced |= {prefix: f"bert.{prefix}" for prefix in bare}
    return replaced


def write_huggingface(
    source: Path, output: Path, *, encoder_only: bool = False, dtype: ExportDtype | None = None
) -> Written:
    """Write one of our folders as a plain Hugging Face BERT, without the span boundary head.

    It is a `BertForMaskedLM`; with `encoder_only`, or if the MLM head is untrained, a `BertModel`
    without pooler. The source's tokenizer files are copied.

    Args:
        source: a folder that `sf.Model.from_pretrained` reads.
        output: the new folder.
        encoder_only: leave the MLM head out too.
        dtype: of the weights; as stored, unless given.

    Raises:
        FileNotFoundError: `source` does not exist.
        FileExistsError: `output` exists and is not empty.
        ValueError: the folder is damaged, or a value is too large for `dtype`.
    """
    model = depart(source, heads=() if encoder_only else ("mlm",))
    stored = model.tensors["bert.embeddings.word_embeddings.weight"].dtype
    number = getattr(torch, dtype) if dtype else stored
    tensors = cast_all(source, model.tensors, number)
    known, extended = BertConfig().to_dict(), model.config.to_dict()
    own = set(Config().to_dict()) - set(known)
    names = ("architectures", "dtype", "transformers_version")
    plain = BertConfig.from_dict(
        {key: value for key, value in extended.items() if key not in own.union(names)}
    )
    # Weights come in whole, so nothing is drawn and nothing is allocated twice.
    with torch.device("meta"):
        bert = BertForMaskedLM(plain) if model.heads else BertModel(plain, add_pooling_layer=False)
    if not model.heads:
        tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    missing, unexpected = bert.load_state_dict(tensors, strict=False, assign=True)
    bert.tie_weights()
    assert not unexpected, unexpected
    assert all(".decoder." in name for name in missing), missing
    with new_folder(output) as scratch:
        bert.save_pretrained(scratch)
        copy_files(source, scratch, _TOKENIZER_FILES)
    return model.report(output, number)
