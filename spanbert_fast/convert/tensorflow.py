"""Google BERT's TensorFlow checkpoints: read into our folders, and written from them."""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spanbert_fast.config import HEADS
from spanbert_fast.convert.departure import Written, bert_config, cast_all, copy_vocabulary, depart
from spanbert_fast.convert.folder import (
    Conversion,
    read_config,
    span_head_sizes,
    write_folder,
)
from spanbert_fast.convert.isolated import TIMEOUT_SECONDS, memory_budget, run_isolated
from spanbert_fast.convert.publish import new_folder

CHECKPOINT_NAME = "bert_model.ckpt"
_PROCESS = "spanbert_fast.convert.tensorflow_process"
_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_LAST = {"kernel": "weight", "gamma": "weight", "beta": "bias", "output_bias": "bias"}


def our_name(variable: str) -> str:
    """The name of a variable here: `bert/encoder/layer_0/...` is `bert.encoder.layer.0. ...`."""
    stem, _, last = re.sub(r"/layer_(\d+)/", r"/layer/\1/", variable).rpartition("/")
    last = f"{last}.weight" if last in _TABLES else _LAST.get(last, last)
    return f"{stem}/{last}".replace("/", ".")


def their_name(name: str) -> str:
    """The name of a tensor of ours in TensorFlow; the inverse of `our_name`."""
    stem, _, last = re.sub(r"\.layer\.(\d+)\.", r".layer_\1.", name).rpartition(".")
    stem = stem.replace(".", "/")
    if stem.endswith(_TABLES):
        return stem
    if stem.endswith("LayerNorm"):
        return f"{stem}/{'gamma' if last == 'weight' else 'beta'}"
    if stem in ("cls/predictions", "cls/span_boundary"):
        return f"{stem}/output_bias"
    return f"{stem}/{'kernel' if last == 'weight' else last}"


def convert_tensorflow(
    source: Path,
    output: Path,
    *,
    config: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Conversion:
    """Write a TensorFlow checkpoint of BERT as one of our folders, in float32.

    Pooler, next-sentence head, optimizer slots and `global_step` are ignored, and named so.

    Args:
        source: the folder with `bert_model.ckpt.index`, or the path of a checkpoint with or without
            `.index`.
        output: the new folder.
        config: the `bert_config.json`; the one beside the checkpoint unless given.
        tokenizer: saved into the folder.
        timeout_seconds: how long the reading process may take.

    Raises:
        FileNotFoundError: checkpoint or configuration do not exist.
        FileExistsError: `output` exists and is not empty.
        ValueError: the checkpoint is damaged or does not fit the configuration.
        RuntimeError: TensorFlow is not installed.
    """
    prefix = checkpoint_prefix(source)
    values = read_config(config or prefix.parent / "bert_config.json")
    require_tensorflow()
    sizes = [path.stat().st_size for path in prefix.parent.glob(f"{prefix.name}.*")]
    with tempfile.TemporaryDirectory(prefix="spanbert_fast_") as directory:
        exchange = Path(directory) / "tensors.safetensors"
        printed = run_isolated(
            _PROCESS,
            prefix,
            ["read", str(prefix.resolve()), str(exchange)],
            memory_bytes=memory_budget(sum(sizes)),
            timeout_seconds=timeout_seconds,
        )
        variables, ignored = load_file(exchange), json.loads(printed)
    tensors = {
        our_name(name): value.T.contiguous() if name.endswith("/kernel") else value
        for name, value in variables.items()
    }
    values |= span_head_sizes(prefix, tensors)
    return write_folder(
        prefix, output, values, tensors, skipped=tuple(ignored), tokenizer=tokenizer
    )


def write_tensorflow(
    source: Path,
    output: Path,
    *,
    encoder_only: bool = False,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Written:
    """Write one of our folders as Google released BERT: checkpoint, configuration, vocabulary.

    Variables are float32 and named as in Google's code; the SBO head stands under
    `cls/span_boundary/`. There is no pooler and no next-sentence head.

    Args:
        source: a folder that `sf.Model.from_pretrained` reads.
        output: the new folder.
        encoder_only: leave the heads out.
        timeout_seconds: how long the writing process may take.

    Raises:
        FileNotFoundError: `source` does not exist.
        FileExistsError: `output` exists and is not empty.
        ValueError: Google's code could not compute the model's numbers.
        RuntimeError: TensorFlow is not installed.
    """
    require_tensorflow()
    model = depart(source, heads=() if encoder_only else HEADS, needs_bert_eps=True)
    tensors = cast_all(source, model.tensors, torch.float32)
    variables: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        theirs = their_name(name)
        variables[theirs] = tensor.T.contiguous() if theirs.endswith("/kernel") else tensor
    with new_folder(output) as scratch, tempfile.TemporaryDirectory() as directory:
        exchange = Path(directory) / "tensors.safetensors"
        save_file(variables, exchange)
        run_isolated(
            _PROCESS,
            output / CHECKPOINT_NAME,
            ["write", str((scratch / CHECKPOINT_NAME).resolve()), str(exchange)],
            memory_bytes=memory_budget(exchange.stat().st_size),
            timeout_seconds=timeout_seconds,
        )
        # What `tf.train.latest_checkpoint` reads.
        (scratch / "checkpoint").write_text(f'model_checkpoint_path: "{CHECKPOINT_NAME}"\n')
        values = json.dumps(bert_config(model.config), indent=2, sort_keys=True)
        (scratch / "bert_config.json").write_text(values + "\n", "utf-8")
        copy_vocabulary(source, scratch)
    return model.report(output, torch.float32)


def checkpoint_prefix(source: Path) -> Path:
    """The path of a checkpoint without its endings.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a folder holds several.
    """
    if source.is_dir():
        found = sorted(source.glob("*.index"))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{source} holds several checkpoints, name one of {names}")
        if not found:
            raise FileNotFoundError(f"{source} holds no TensorFlow checkpoint (*.index)")
        return found[0].with_suffix("")
    prefix = source.with_suffix("") if source.suffix == ".index" else source
    if not prefix.with_name(f"{prefix.name}.index").is_file():
        raise FileNotFoundError(f"no TensorFlow checkpoint at {prefix}: there is no .index")
    return prefix


def require_tensorflow() -> None:
    """Raises RuntimeError, with what to install, if TensorFlow is not there."""
    if importlib.util.find_spec("tensorflow") is None:
        raise RuntimeError(
            "TensorFlow checkpoints need TensorFlow: pip install 'spanbert_fast[tensorflow]' (or "
            "tensorflow-cpu)"
        )
