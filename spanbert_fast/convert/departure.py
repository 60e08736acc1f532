"""What every way out of our folders shares: the model that leaves, its heads, its files."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from spanbert_fast.config import HEADS, Config
from spanbert_fast.convert.folder import HEAD_PREFIXES
from spanbert_fast.model.pretrained import Model

ExportDtype = Literal["float32", "float16"]
# The fields that BERT's own code knows, in TensorFlow and in the original SpanBERT.
_BERT_FIELDS = (
    "attention_probs_dropout_prob",
    "hidden_act",
    "hidden_dropout_prob",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "type_vocab_size",
    "vocab_size",
)
_BERT_LAYER_NORM_EPS = 1e-12


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written for other software."""

    source: Path
    output: Path
    num_parameters: int
    """Of the model, what is tied counted once."""
    dtype: str
    files: tuple[str, ...]
    heads: tuple[str, ...]
    """Heads that were written, of "mlm" and "sbo"."""
    left_out: tuple[str, ...]
    """Heads that were not: on request, for want of training, or because nobody could read them."""

    @property
    def remarks(self) -> tuple[tuple[str, str], ...]:
        """What a reader of the report wants to know, as pairs of a name and a text."""
        return (
            ("precision", self.dtype),
            ("files", ", ".join(self.files)),
            ("heads", ", ".join(self.heads) or "none"),
            ("left out", ", ".join(self.left_out) or "nothing"),
        )


@dataclass(frozen=True)
class Departure:
    """A model on its way out."""

    source: Path
    config: Config
    heads: tuple[str, ...]
    tensors: dict[str, Tensor]
    """By our names, what is tied once: under the word embeddings and the bias of the MLM head."""

    def report(self, output: Path, dtype: torch.dtype) -> Written:
        """The report on the finished folder."""
        return Written(
            source=self.source,
            output=output,
            num_parameters=sum(tensor.numel() for tensor in self.tensors.values()),
            dtype=str(dtype).removeprefix("torch."),
            files=tuple(sorted(path.name for path in output.iterdir())),
            heads=self.heads,
            left_out=tuple(head for head in HEADS if head not in self.heads),
        )


def depart(
    source: Path, *, heads: tuple[str, ...] = HEADS, needs_bert_eps: bool = False
) -> Departure:
    """The encoder of a folder of ours and those of the wanted heads that are trained.

    Args:
        source: one of our folders, or any that `sf.Model.from_pretrained` reads.
        heads: the heads to write if they are trained.
        needs_bert_eps: whether the reader has BERT's `layer_norm_eps` built in.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is damaged, or the reader could not compute its numbers.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no such folder: {source}")
    model = Model.from_pretrained(source)
    eps = model.config.layer_norm_eps
    if needs_bert_eps and eps != _BERT_LAYER_NORM_EPS:
        raise ValueError(
            f"{source}: layer_norm_eps is {eps}, must be {_BERT_LAYER_NORM_EPS}: that format has "
            "no place for it, so its readers would compute other numbers"
        )
    kept = tuple(h for h in HEADS if h in heads and h not in model.config.untrained_heads)
    prefixes = ("bert.", *(HEAD_PREFIXES[head] for head in kept))
    tensors = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name.startswith(prefixes)
    }
    # Which of its two names a tied tensor goes by is the order of the modules; this one is ours.
    if (bias := tensors.pop("cls.predictions.decoder.bias", None)) is not None:
        tensors["cls.predictions.bias"] = bias
    return Departure(source, model.config, kept, tensors)


def bert_config(config: Config) -> dict[str, object]:
    """The configuration as BERT's own code writes it."""
    return {name: getattr(config, name) for name in _BERT_FIELDS}


def smallest_exact_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """float16, as SpanBERT was released, if that changes no value; else float32."""
    exact = all(torch.equal(t.half().to(t.dtype), t) for t in tensors.values())
    return torch.float16 if exact else torch.float32


def cast_all(source: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in another precision.

    Raises:
        ValueError: a value is too large for it.
    """
    cast = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if bool(tensor.isinf().any()) and not bool(tensors[name].isinf().any()):
            raise ValueError(f"{source}: {name} holds values that {dtype} has no room for")
    return cast


def copy_vocabulary(source: Path, target: Path) -> None:
    """Writes `vocab.txt`, as it is or, without one, from the WordPiece in `tokenizer.json`."""
    if (source / "vocab.txt").is_file() or not (source / "tokenizer.json").is_file():
        copy_files(source, target, ("vocab.txt",))
        return
    model = json.loads((source / "tokenizer.json").read_text("utf-8"))["model"]
    if model["type"] == "WordPiece":
        entries = sorted(model["vocab"], key=model["vocab"].__getitem__)
        (target / "vocab.txt").write_text("".join(f"{entry}\n" for entry in entries), "utf-8")


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copies those of the files that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
