"""Write a model as a folder that other runtimes serve: ONNX, or a program of `torch.export`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase

from spanbert_fast.convert.onnx import OPSET, quantize_int8, require_packages, write_onnx
from spanbert_fast.convert.publish import new_folder
from spanbert_fast.model.graph import HEADS_OF_OUTPUTS, OUTPUTS, input_names, trace
from spanbert_fast.model.pretrained import Model

Format = Literal["onnx", "torch"]
Quantization = Literal["int8"]
_FILES = {"onnx": "model.onnx", "torch": "model.pt2"}


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written."""

    output: Path
    file: str
    """Name of the graph's file in the folder."""
    inputs: tuple[str, ...]
    """Names of what the graph takes; all are int64."""
    outputs: tuple[str, ...]
    opset: int | None
    """Of ONNX's operators; None for `torch`."""
    quantization: Quantization | None
    num_bytes: int
    """Size of the graph with its weights."""


def export_model(
    model: Model,
    output: Path | str,
    *,
    to: Format = "onnx",
    outputs: Sequence[str] = ("logits",),
    quantize: Quantization | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_untrained_heads: bool = False,
) -> Export:
    """Write the model's graph, `config.json` and tokenizer; `output` appears whole or not at all.

    The graph takes any number of rows and columns, and computes what the model in evaluation mode
    computes. It skips padding as the model does.

    Args:
        model: in float32 for ONNX; its training mode is left as it was.
        output: the new folder; must not exist or be empty.
        to: `"onnx"` writes `model.onnx`, `"torch"` writes `model.pt2`.
        outputs: what the graph returns, in this order, of `last_hidden_state`, `logits` (MLM) and
            `sbo_logits` (SBO; adds the input `sbo_spans`).
        quantize: `"int8"`: products with 8-bit weights and activations; only for ONNX.
        tokenizer: saved into the folder.
        allow_untrained_heads: export heads listed in `config.untrained_heads`, too.

    Raises:
        ValueError: an argument is none of the allowed ones, a head is untrained, or the model is of
            a precision or an attention that cannot be exported.
        FileExistsError: `output` exists and is not empty.
        RuntimeError: a package is missing.
    """
    output = Path(output)
    _check_choices(to, outputs, quantize)
    _check_model(model, to, outputs, allow_untrained_heads)
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}"
        )
    if to == "onnx":
        require_packages(quantizes=quantize is not None)
    with new_folder(output) as folder:
        program = trace(model, outputs)
        path = folder / _FILES[to]
        if to == "torch":
            torch.export.save(program, path)
        elif quantize is None:
            write_onnx(program, path, outputs)
        else:
            with tempfile.TemporaryDirectory(dir=folder.parent) as exact:
                write_onnx(program, Path(exact) / path.name, outputs)
                quantize_int8(Path(exact) / path.name, path)
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
        model.config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Export(
        output=output,
        file=_FILES[to],
        inputs=tuple(input_names(outputs)),
        outputs=tuple(outputs),
        opset=OPSET if to == "onnx" else None,
        quantization=quantize,
        num_bytes=num_bytes,
    )


def _check_choices(to: object, outputs: Sequence[str], quantize: object) -> None:
    if to not in get_args(Format):
        raise ValueError(f"to must be one of {', '.join(get_args(Format))}, got {to!r}")
    if quantize is not None and quantize not in get_args(Quantization):
        raise ValueError(
            f"quantize must be None or one of {', '.join(get_args(Quantization))}, got {quantize!r}"
        )
    if quantize is not None and to != "onnx":
        raise ValueError(f"quantize={quantize!r} needs to='onnx', got to={to!r}")
    if isinstance(outputs, str) or not outputs or len(set(outputs)) != len(outputs):
        raise ValueError(f"outputs must be one or more different names, got {outputs!r}")
    if unknown := [name for name in outputs if name not in OUTPUTS]:
        raise ValueError(f"outputs may hold {', '.join(OUTPUTS)}, got {unknown[0]!r}")


def _check_model(model: object, to: str, outputs: Sequence[str], allow_untrained: bool) -> None:
    if not isinstance(model, Model):
        raise TypeError(
            "model must be a spanbert_fast Model (Model.from_pretrained reads Hugging Face "
            f"folders too), not {type(model).__name__}"
        )
    for name in outputs:
        head = HEADS_OF_OUTPUTS.get(name)
        if head in model.config.untrained_heads and not allow_untrained:
            trained = [n for n in OUTPUTS if HEADS_OF_OUTPUTS.get(n) not in
                       model.config.untrained_heads]  # fmt: skip
            raise ValueError(
                f"{name} comes from the {str(head).upper()} head, which is untrained: its weights "
                f"are random. Trained are {', '.join(trained)}; allow_untrained_heads=True "
                "(--allow-untrained-heads) exports it nevertheless"
            )
    if to == "onnx" and model.dtype != torch.float32:
        raise ValueError(f"model must be in torch.float32 for ONNX, got {model.dtype}")
    if model.config._attn_implementation != "sdpa":
        raise ValueError(
            'the attention must be "sdpa" (model.set_attn_implementation), got '
            f"{model.config._attn_implementation!r}"
        )
