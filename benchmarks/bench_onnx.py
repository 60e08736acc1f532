"""Rows 8c and 10: encoding against ONNX Runtime, in float32 and in 8 bits.

The peer is Hugging Face's model at ONNX Runtime's best: exported with written-out attention, which
its optimizer for transformers then fuses (other exports are up to 30 % slower here), all
optimizations of graphs on, and quantized by its own defaults. Our 8 bits are what
`spanbert-fast export --quantize int8` writes, run by ONNX Runtime too, in groups of equal length
or in one call whose padding the graph drops by itself. All have the same threads.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inference_peers import (
    Encode,
    groups_of,
    our_encode,
    packed_rows,
    padded_inputs,
    padding_of_groups,
)
from peers import make_model, make_peer
from pytest_benchmark.fixture import BenchmarkFixture
from timing import NAMES, Case, time_in_turn
from torch import Tensor
from workload import Setting, choose_setting, make_batch, relative_error

from spanbert_fast import Model
from spanbert_fast.batch import PackedBatch
from spanbert_fast.convert.export import export_model

onnxruntime = pytest.importorskip("onnxruntime")
if choose_setting().device.type == "cuda":
    pytest.skip("these rows are about CPUs", allow_module_level=True)

WORKLOAD = "ragged-50"
INT8_ERROR = 0.1
"""Allowed error of 8 bits, by the norm, from float32: each side errs by some percent."""
DEFAULT = NAMES[choose_setting().dtype]


class LastHidden(torch.nn.Module):
    """Hidden states of Hugging Face's encoder, which an export wants as a plain tensor."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, S, D]."""
        hidden: Tensor = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        return hidden


def export_peer(model: Model, path: Path) -> None:
    """Writes Hugging Face's model with the weights of ours, attention and norms fused."""
    from onnxruntime.transformers import optimizer

    plain = path.with_name("plain.onnx")
    ids = torch.ones(2, 16, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    sizes = {0: "batch", 1: "length"}
    torch.onnx.export(
        LastHidden(make_peer(model, "eager").bert).eval(),
        (ids, mask),
        plain,
        dynamo=False,
        opset_version=17,
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state"],
        dynamic_axes={"input_ids": sizes, "attention_mask": sizes},
    )
    config = model.config
    fused = optimizer.optimize_model(
        str(plain),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=1,
    )
    assert fused.get_fused_operator_statistics()["Attention"] == config.num_hidden_layers
    fused.save_model_to_file(str(path))
    plain.unlink()


@pytest.fixture(scope="module")
def files(setting: Setting) -> Iterator[dict[str, Path]]:
    """The peer's two files and ours, of the model that `make_model` gives; gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield write_files(make_model(setting.base(), 0.0).eval(), Path(folder))


def write_files(model: Model, folder: Path) -> dict[str, Path]:
    """`fp32` and `int8` are the peer's, `ours` has 8 bits."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    found = {name: folder / f"{name}.onnx" for name in ("fp32", "int8")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_peer(model, found["fp32"])
        # Fused operators are none of ONNX: without a type for their outputs it would stop.
        extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}
        quantize_dynamic(found["fp32"], found["int8"], extra_options=extra)
        export_model(model, folder / "ours", outputs=["last_hidden_state"], quantize="int8")
    return {**found, "ours": folder / "ours" / "model.onnx"}


def onnx_encode(path: Path, batch: PackedBatch, kind: str) -> Encode:
    """By a file in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    graph = onnxruntime.InferenceSession(path, options)
    names = [item.name for item in graph.get_inputs()]
    lengths = batch.cu_seqlens.diff().tolist()
    groups = groups_of(lengths, kind)
    feeds = []
    for part in padded_inputs(batch, groups):
        values = {**part, "token_type_ids": torch.zeros_like(part["input_ids"])}
        feeds.append({name: values[name].numpy() for name in names})

    def encode() -> Tensor:
        hidden = [torch.from_numpy(graph.run(None, feed)[0]) for feed in feeds]
        return packed_rows(lengths, groups, hidden)

    return encode


@pytest.mark.parametrize("kind", ["padded", "one by one"])
@pytest.mark.parametrize("precision", sorted({DEFAULT, "fp32"}))
def test_float(
    benchmark: BenchmarkFixture,
    setting: Setting,
    files: dict[str, Path],
    precision: str,
    kind: str,
) -> None:
    base = setting.base()
    lengths = base.lengths(WORKLOAD)
    row = "8c" if kind == "padded" else "8c one by one"
    case = Case(
        rows=(row if precision == DEFAULT else f"{row} (fp32)",),
        workload=WORKLOAD,
        peer=f"ONNX Runtime, {kind}",
        dtype=f"{precision} / fp32",
        tokens=sum(lengths),
        padding=padding_of_groups(lengths, kind),
    )
    own = base if precision == DEFAULT else base.at(torch.float32)
    batch = make_batch(base, WORKLOAD)
    ours = our_encode(own, make_model(base, 0.0).eval(), batch)
    peer = onnx_encode(files["fp32"], batch, kind)
    assert relative_error(ours(), peer()) < (3e-2 if precision == "bf16" else 1e-4)
    time_in_turn(benchmark, base, case, ours, peer, is_warm=True)


@pytest.mark.parametrize(
    ("row", "own", "kind"),
    [
        ("10a", "equal lengths", "padded"),
        ("10a in one call", "padded", "padded"),
        ("10b", "equal lengths", "one by one"),
    ],
)
def test_int8(
    benchmark: BenchmarkFixture,
    setting: Setting,
    files: dict[str, Path],
    row: str,
    own: str,
    kind: str,
) -> None:
    base = setting.base()
    lengths = base.lengths(WORKLOAD)
    case = Case(
        rows=(row,),
        workload=WORKLOAD,
        peer=f"ONNX Runtime, {kind}; ours {own}",
        dtype="int8 / int8",
        tokens=sum(lengths),
        padding=padding_of_groups(lengths, kind),
    )
    batch = make_batch(base, WORKLOAD)
    ours, peer = onnx_encode(files["ours"], batch, own), onnx_encode(files["int8"], batch, kind)
    exact = our_encode(base.at(torch.float32), make_model(base, 0.0).eval(), batch)()
    for found in (ours(), peer()):
        assert relative_error(found, exact) < INT8_ERROR
    time_in_turn(benchmark, base, case, ours, peer, is_warm=True)
