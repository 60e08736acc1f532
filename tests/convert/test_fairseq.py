"""The original checkpoint becomes a folder of ours: its outputs, its names, and what is refused."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForMaskedLM, BertTokenizer

from spanbert_fast.convert import isolated, unpickle
from spanbert_fast.convert.fairseq import convert_fairseq
from spanbert_fast.convert.huggingface import convert_huggingface
from spanbert_fast.convert.unpickle import read_pickled_tensors
from spanbert_fast.model.pretrained import Model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ORIGINAL = GOLDEN / "reference_tiny.fairseq.pt"


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """The sizes, without what the position table tells."""
    config = json.loads((GOLDEN / "reference_tiny.json").read_text())["config"]
    del config["max_span_targets"], config["span_position_embedding_size"]
    return config


@pytest.fixture
def config(tmp_path: Path, values: dict[str, Any]) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


def original() -> dict[str, Tensor]:
    return dict(torch.load(ORIGINAL, weights_only=True)["model"])


def save(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    return path


def test_outputs_are_those_of_the_reference(tmp_path: Path, config: Path) -> None:
    done = convert_fairseq(ORIGINAL, tmp_path / "out", config=config)
    assert done.max_span_targets == 15
    assert done.untrained_heads == done.ignored == ()
    golden = load_file(GOLDEN / "reference_tiny.safetensors")
    model = Model.from_pretrained(tmp_path / "out")
    assert model.config.span_position_embedding_size == 200
    ids, pairs = golden["input_ids"].long(), golden["pairs"].long()
    mask = (ids != 0).long()
    spans = torch.where(pairs[..., 2:3] > 0, pairs[..., :2], -1)
    targets = torch.where(pairs[..., 2:] > 0, pairs[..., 2:], -100)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, sbo_spans=spans, sbo_targets=targets)
    torch.testing.assert_close(
        out.logits[mask == 1], golden["mlm_logits"][mask == 1], atol=1e-5, rtol=0
    )
    expected = golden["sbo_logits"][targets != -100]
    torch.testing.assert_close(out.sbo_logits, expected, atol=1e-5, rtol=0)
    plain = BertForMaskedLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = plain(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask == 1], out.logits[mask == 1], atol=1e-5, rtol=0)


def stripped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix, LayerNorm spelled as today, in half precision."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("decoder.").replace(".gamma", ".weight").replace(".beta", ".bias")
        renamed[name] = tensor.half()
    return renamed


@pytest.mark.usefixtures("in_process")
def test_layouts_give_the_same_folder(tmp_path: Path, config: Path) -> None:
    halved = {name: tensor.half() for name, tensor in original().items()}
    tied_once = {n: t for n, t in stripped(original()).items() if not n.endswith("decoder.weight")}
    layouts = {
        "plain": halved,
        "under model": {"model": tied_once, "args": argparse.Namespace(arch="pair"), "epoch": 3},
    }
    written = {}
    for name, content in layouts.items():
        convert_fairseq(save(tmp_path, content), tmp_path / name, config=config)
        files = ("model.safetensors", "config.json")
        written[name] = [(tmp_path / name / file).read_bytes() for file in files]
    assert written["plain"] == written["under model"]


@pytest.mark.usefixtures("in_process")
def test_missing_heads_are_listed_and_other_entries_named(tmp_path: Path, config: Path) -> None:
    tensors = {n: t for n, t in original().items() if "pair_target" not in n}
    tensors["decoder.bert.pooler.dense.weight"] = torch.zeros(48, 48)
    done = convert_fairseq(
        save(tmp_path, {**tensors, "decoder.version": 3}), tmp_path / "out", config=config
    )
    assert done.untrained_heads == ("sbo",)
    assert done.ignored == ("bert.pooler.dense.weight", "decoder.version")
    assert len(done.missing) == 10
    assert "cls.span_boundary.position_embeddings.weight" in done.missing
    assert Model.from_pretrained(tmp_path / "out").config.untrained_heads == ["sbo"]


class Bomb:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def refusal(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the reading process says to a file that it must refuse."""
    target = path.with_suffix(".safetensors")
    assert unpickle.main(1 << 30, str(path), str(target)) == 3
    assert not target.exists()
    return capsys.readouterr().err


def test_code_in_a_pickle_is_refused(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crater = tmp_path / "crater"
    content = {**original(), "bomb": Bomb(crater)}
    path = save(tmp_path, content)
    with pytest.raises(ValueError, match=r"model.pt: refused, .*mkdir"):
        convert_fairseq(path, tmp_path / "out", config=config)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert "mkdir" in refusal(path, capsys)
    path.write_bytes(pickle.dumps(content))
    assert refusal(path, capsys).startswith("refused")
    assert not crater.exists()
    assert not (tmp_path / "out").exists()


def test_truncated_files_are_refused(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    for size in (0, 1, 100, 50_000, 300_000):
        path.write_bytes(ORIGINAL.read_bytes()[:size])
        assert refusal(path, capsys).startswith(("refused", "damaged"))
    with pytest.raises(ValueError, match=r"model.pt: damaged or not a torch checkpoint"):
        convert_fairseq(path, tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()


def test_a_reader_that_hangs_or_dies_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, original())
    with pytest.raises(ValueError, match=r"not done within 0.01 s"):
        read_pickled_tensors(path, timeout_seconds=0.01)
    monkeypatch.setattr(isolated.sys, "executable", shutil.which("false"))
    with pytest.raises(ValueError, match=r"the separate process ended with 1: no message"):
        read_pickled_tensors(path)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 60}, r"has shape \(160, 48\), the configuration says \(160, 60\)"),
        ({"num_hidden_layers": 1}, "layer.1.* has no place"),
        ({"num_hidden_layers": 3}, "16 tensors are missing: bert.encoder.layer.2"),
        ({"vocab_size": 161}, r"has shape \(160, 48\), the configuration says \(161, 48\)"),
        ({"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_configuration_must_fit(
    tmp_path: Path, values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(values | changes))
    with pytest.raises(ValueError, match=message):
        convert_fairseq(save(tmp_path, original()), tmp_path / "out", config=path)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("cls.predictions.transform.dense.bias"), "the mlm head is incomplete"),
        (lambda t: t.pop("cls.pair_target_predictions.bias"), "the sbo head is incomplete"),
        (lambda t: t.pop("bert.embeddings.LayerNorm.bias"), "the encoder is incomplete, 1 tensors"),
        (lambda t: t["cls.predictions.decoder.weight"].add_(1), "are one tensor here, but differ"),
        (
            lambda t: t["cls.pair_target_predictions.decoder.weight"].add_(1),
            "the SBO decoder is not the word embedding matrix",
        ),
        (
            lambda t: t.update({"decoder.cls.predictions.bias": torch.zeros(160)}),
            "two tensors claim the name cls.predictions.bias",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, config: Path, edit: Any, message: str) -> None:
    tensors = stripped(original())
    edit(tensors)
    with pytest.raises(ValueError, match=message):
        convert_fairseq(save(tmp_path, tensors), tmp_path / "out", config=config)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "holds a list"), ({"epoch": 3}, "no tensors, only epoch"), ({}, "only nothing")],
)
def test_files_without_weights(
    tmp_path: Path, content: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(save(tmp_path, content), capsys)


def test_files_that_are_not_there_or_in_the_way(tmp_path: Path, config: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent.pt"):
        convert_fairseq(tmp_path / "absent.pt", tmp_path / "out", config=config)
    with pytest.raises(ValueError, match="is a folder, must be a file"):
        convert_fairseq(tmp_path, tmp_path / "out", config=config)
    with pytest.raises(FileNotFoundError, match="no configuration"):
        convert_fairseq(ORIGINAL, tmp_path / "out", config=tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json: not JSON"):
        convert_fairseq(ORIGINAL, tmp_path / "out", config=tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list.json: holds a list"):
        convert_fairseq(ORIGINAL, tmp_path / "out", config=tmp_path / "list.json")


@pytest.mark.usefixtures("in_process")
def test_output_in_use_is_refused_and_an_empty_one_is_filled(tmp_path: Path, config: Path) -> None:
    source = save(tmp_path, original())
    with pytest.raises(FileExistsError, match="not empty"):
        convert_fairseq(source, tmp_path, config=config)
    (tmp_path / "out").mkdir()
    convert_fairseq(source, tmp_path / "out", config=config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.pt", "out"]


@pytest.mark.usefixtures("in_process")
def test_tokenizer_is_saved_and_keeps_case(tmp_path: Path, config: Path) -> None:
    source = save(tmp_path, original())
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "Cat": 5}
    tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=False)
    convert_fairseq(source, tmp_path / "out", config=config, tokenizer=tokenizer)
    assert BertTokenizer.from_pretrained(tmp_path / "out").tokenize("Cat cat") == ["Cat", "[UNK]"]
    big = BertTokenizer(vocab={**vocabulary, **{f"w{i}": 6 + i for i in range(200)}})
    with pytest.raises(ValueError, match="the tokenizer has 206 entries, the model 160"):
        convert_fairseq(source, tmp_path / "other", config=config, tokenizer=big)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("bare", [False, True])
def test_hugging_face_folder(tmp_path: Path, values: dict[str, Any], bare: bool) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(values))
    tensors = {n: t for n, t in stripped(original()).items() if "pair_target" not in n}
    if bare:
        tensors = {n.removeprefix("bert."): t for n, t in tensors.items() if "cls" not in n}
    torch.save(tensors, source / "pytorch_model.bin")
    done = convert_huggingface(source, tmp_path / "out")
    assert done.untrained_heads == (("mlm", "sbo") if bare else ("sbo",))
    ids = torch.tensor([[2, 10, 11, 12, 3]])
    plain = BertForMaskedLM.from_pretrained(tmp_path / "out").bert
    with torch.no_grad():
        ours = Model.from_pretrained(tmp_path / "out").bert(ids).last_hidden_state
        torch.testing.assert_close(plain(ids).last_hidden_state, ours, atol=1e-5, rtol=0)
    word = tensors[
        "embeddings.word_embeddings.weight" if bare else "cls.predictions.decoder.weight"
    ]
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(saved["bert.embeddings.word_embeddings.weight"], word.float())


@pytest.mark.usefixtures("in_process")
def test_a_head_listed_as_untrained_stays_so(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values | {"untrained_heads": ["mlm"]}))
    torch.save(stripped(original()), tmp_path / "pytorch_model.bin")
    done = convert_huggingface(tmp_path, tmp_path / "out")
    assert done.untrained_heads == ("mlm", "sbo")


def test_hugging_face_folder_without_weights(tmp_path: Path, config: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin"):
        convert_huggingface(config.parent, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        convert_huggingface(tmp_path / "absent", tmp_path / "out")
