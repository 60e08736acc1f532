"""Write a traced model as an ONNX file, and give such a file 8-bit weights."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

OPSET = 23
"""Of the operators in the file: the first with attention and exact GELU as operators of ONNX."""
WEIGHTS_NAME = "model.onnx_data"
"""Where the weights lie if they do not fit in the file, as Hugging Face Optimum calls it."""
# A protobuf message ends at 2 GiB; what is not weights stays far below 128 MiB.
_MAX_INLINE_BYTES = 2**31 - 2**27
_SIZES = {
    "input_ids": ("batch", "length"),
    "sbo_spans": ("batch", "spans"),
    "sbo_logits": ("targets",),
}


def require_packages(*, quantizes: bool) -> None:
    """Raises RuntimeError if a package is missing that the functions below need."""
    for name in ("onnx", "onnxscript", *(["onnxruntime"] if quantizes else [])):
        if importlib.util.find_spec(name) is None:
            raise RuntimeError(
                f"{name} is not installed; `pip install 'spanbert_fast[onnx]'` installs what ONNX "
                "needs"
            )


def write_onnx(program: ExportedProgram, path: Path, outputs: Sequence[str]) -> None:
    """Write the graph and its weights to a new file, and check it.

    Args:
        program: the traced model.
        path: the file; weights that do not fit lie beside it, in `WEIGHTS_NAME`.
        outputs: names of the outputs, in their order.
    """
    with _quiet():
        written = torch.onnx.export(
            program, (), dynamo=True, opset_version=OPSET, output_names=outputs, verbose=False
        )
    assert written is not None
    model = written.model_proto
    _name_sizes(model.graph)
    # Where in which file each node was traced: of no use elsewhere, and larger than the graph.
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer):
        part.ClearField("metadata_props")
    _save(model, path)


def _save(model: Any, path: Path) -> None:
    onnx: Any = importlib.import_module("onnx")
    size = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    onnx.save_model(
        model, path, save_as_external_data=size > _MAX_INLINE_BYTES, location=WEIGHTS_NAME
    )
    onnx.checker.check_model(path, full_check=True)


def quantize_int8(source: Path, target: Path) -> None:
    """Write a file with the same graph, products computed with 8-bit weights and activations.

    A weight is rounded to 7 of the 8 bits by one scale per output column, ahead; an activation by
    the range of its tensor, while the model runs. Embeddings have one scale per table.

    Args:
        source: a file of `write_onnx`.
        target: the new file.
    """
    onnx: Any = importlib.import_module("onnx")
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    shapes: Any = importlib.import_module("onnxruntime.quantization.shape_inference")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        shapes.quant_pre_process(
            source,
            prepared,
            skip_optimization=True,
            skip_symbolic_shape=True,
            save_as_external_data=(source.parent / WEIGHTS_NAME).exists(),
        )
        quantization.quantize_dynamic(
            prepared,
            target,
            # Gather: without it the word vectors, shared with the decoder, would lie there twice.
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            # Signed weights are the fast ones. Without VNNI instructions a processor adds two of
            # their products in 16 bits, which 8 bits overflow and 7 do not.
            weight_type=quantization.QuantType.QInt8,
            reduce_range=True,
        )
    onnx.checker.check_model(target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what other packages say of their own inner affairs; errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _name_sizes(graph: Any) -> None:
    """Call the free sizes what they are; a traced program calls them s18 and the like."""
    names: dict[str, str] = {}
    for value in (*graph.input, *graph.output):
        sizes = value.type.tensor_type.shape.dim
        names |= {
            size.dim_param: name
            for size, name in zip(sizes, _SIZES.get(value.name, ()), strict=False)
        }
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in names:
                size.dim_param = names[size.dim_param]
