"""The guides are true: their Python runs, block after block, and so do the examples they name."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from spanbert_fast.cli import main
from spanbert_fast.config import Config
from spanbert_fast.convert.fairseq import write_fairseq
from spanbert_fast.data.tokenizer import save_tokenizer
from spanbert_fast.data.wordpiece import train_tokenizer
from spanbert_fast.model.pretrained import Model

ROOT = Path(__file__).resolve().parents[1]
TEXT = "We must work together to keep the peace. I am happy to report to the Congress."


@pytest.fixture
def demo_model(tmp_path: Path) -> Iterator[Path]:
    """A folder in which `demo_output/run/model` is, as after `make demo`, a small SpanBERT."""
    logging.disable_progress_bar()
    disable_progress_bars()
    folder = tmp_path / "demo_output" / "run" / "model"
    tokenizer = train_tokenizer([TEXT], 100)
    save_tokenizer(tokenizer, folder)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    Model(Config(vocab_size=len(tokenizer), num_hidden_layers=1, **shape)).save_pretrained(folder)
    yield tmp_path
    enable_progress_bars()


def provide_text_and_tokenizer() -> None:
    """`corpus.txt` and `tokenizer`, in the folder of `demo_model`."""
    sentences = [f"We must work together to keep the peace of {number}.\n" for number in range(9)]
    Path("corpus.txt").write_text("\n".join(sentences[i % 9] + sentences[i % 7] for i in range(90)))
    Path("demo_output/run/model").rename("tokenizer")


def run_blocks(name: str, at_least: int) -> tuple[str, dict[str, object]]:
    """Runs the Python blocks of a guide, one after the other; its text and their variables."""
    text = (ROOT / "docs" / name).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= at_least
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    return text, names


def run_page(name: str, printed: pytest.CaptureFixture[str]) -> None:
    """Runs a page: Python blocks and command lines in order; checks the remark after a `print`."""
    text = (ROOT / "docs" / name).read_text()
    names: dict[str, object] = {}
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL):
        printed.readouterr()
        if language == "python":
            exec(compile(block, name, "exec"), names)
            shown = printed.readouterr().out.splitlines()
            for expected in re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE):
                assert expected in shown
            continue
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            assert words[0] == "spanbert-fast"
            assert main(words[1:]) == 0, line


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_export_guide(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_model)
    run_blocks("export.md", 3)
    written = {path.name for path in (demo_model / "demo_output" / "served").iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json"} <= written


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_python_blocks_run_in_order(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_model)
    _, names = run_blocks("huggingface.md", 5)
    assert "'mlm_loss', 'sbo_loss'" in capsys.readouterr().out
    assert isinstance(names["sbo"].loss, torch.Tensor)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_patching(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_model)
    run_blocks("patching.md", 4)
    printed = capsys.readouterr().out
    assert printed.count("BertSelfAttention  varlen_attention") == 2
    assert "called: query (peft.Linear), value (peft.Linear)" in printed


def test_python_blocks_of_the_converters_run_in_order(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_model)
    text, _ = run_blocks("converters.md", 2)
    # Every remark after a print is what it printed.
    expected = re.findall(r"^print\(.*\)  # (.*)$", text, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == expected
    shapes = [Model.from_pretrained(f"demo_output/{name}") for name in ("back", "run/model")]
    for name, weight in shapes[0].state_dict().items():
        assert torch.equal(weight, shapes[1].state_dict()[name])


def test_segmentation_blocks_run_in_order(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_model)
    sentences = [f"We must work together to keep the peace of {number}." for number in range(9)]
    texts = (json.dumps({"text": f"{text} {number}."}) for number in range(9) for text in sentences)
    Path("corpus.jsonl").write_text("\n".join(texts))
    prepare = "prepare --input corpus.jsonl --output shards --tokenizer demo_output/run/model"
    assert main([*prepare.split(), "--validation-permille", "200", "--workers", "1"]) == 0
    (command,) = re.findall(
        r"^spanbert-fast (pretrain .*)$",
        (ROOT / "docs" / "segmentation.md").read_text(),
        re.MULTILINE,
    )
    assert main(shlex.split(command)) == 0
    capsys.readouterr()
    run_blocks("segmentation.md", 3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines if line.startswith("steps")] == [
        ["steps", first, "to", last] for first, last in (("1", "5"), ("6", "10"), ("11", "12"))
    ]
    losses = [float(line) for line in lines if line[:1].isdigit()]
    assert losses[-1] < 0.5 * losses[0]


def test_vectors_of_spans(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_model)
    run_page("span_embeddings.md", capsys)


def test_attention_window(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_model)
    Path("corpus.txt").write_text("\n\n".join([f"{TEXT}\n" * 60] * 40))
    run_page("attention_window.md", capsys)


def test_long_texts(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_model)
    run_page("long_text.md", capsys)


def test_span_boundaries_train_an_encoder_that_is_no_bert(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--epochs", "3", "--paragraphs", "96"])
    runpy.run_path(str(ROOT / "examples" / "sbo_on_any_encoder.py"), run_name="__main__")
    lines = re.findall(r"mlm_loss ([\d.]+), sbo_loss ([\d.]+)", capsys.readouterr().out)
    assert len(lines) == 3
    for first, last in zip(lines[0], lines[-1], strict=True):
        assert float(last) < float(first) - 0.1


def test_coming_from_the_original(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both kinds of archive that were released, in small."""
    monkeypatch.chdir(demo_model)
    source = Path("demo_output/run/model")
    write_fairseq(source, Path("with_heads"))
    write_fairseq(source, Path("spanbert_hf_base"), encoder_only=True)
    assert {path.name for path in Path("spanbert_hf_base").iterdir()} >= {"pytorch_model.bin"}
    for name in ("model.pt", "config.json", "vocab.txt"):
        Path("with_heads", name).rename(name)
    Path("spanbert_hf_base/vocab.txt").unlink()  # neither archive has one
    run_page("migration/spanbert.md", capsys)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_coming_from_hugging_face(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_model)
    run_page("migration/huggingface.md", capsys)


def test_coming_from_fairseq(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_model)
    provide_text_and_tokenizer()
    run_page("migration/fairseq.md", capsys)


def test_loss_weighting(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_model)
    provide_text_and_tokenizer()
    run_page("loss_weighting.md", capsys)
    settings = json.loads(Path("run/run.json").read_text())["settings"]
    assert settings["weighting"]["sequence_length"] == 0.5
