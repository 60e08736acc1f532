"""Hostile files are refused by name at every public door: nothing runs, memory stays bounded."""

from __future__ import annotations

import ast
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import spanbert_fast as sf
from spanbert_fast.cli import main
from spanbert_fast.convert.huggingface import convert_huggingface
from spanbert_fast.convert.unpickle import read_pickled_tensors
from spanbert_fast.data.tokenizer import load_tokenizer

PACKAGE = Path(sf.__file__).parent
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "cat"]
MEMORY = 400 << 20  # what a refusal may add to the memory of this process, bytes


@pytest.fixture(scope="module")
def _good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "good"
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    config = sf.Config(vocab_size=64, num_hidden_layers=1, max_position_embeddings=32, **shape)
    sf.Model(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


@pytest.fixture
def folder(_good: Path, tmp_path: Path) -> Path:
    shutil.copytree(_good, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def _bounded() -> Any:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < MEMORY


def refused(folder: Path, capsys: pytest.CaptureFixture[str], match: str, **doors: bool) -> None:
    """`from_pretrained`, `convert` and `verify` name the fault; none of them crashes."""
    output = folder.parent / "out"
    if doors.get("loads", True):
        with pytest.raises((ValueError, OSError), match=match):
            sf.Model.from_pretrained(folder)
        assert main(["verify", str(folder)]) in (1, 2)
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        assert "FAILED" in shown.out or shown.err.startswith("error: ")
    if doors.get("converts", True):
        assert main(["convert", "--from", "hf", str(folder), str(output)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert not output.exists()


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def edited(folder: Path, edit: Callable[[dict[str, Any], list[str]], None]) -> bytes:
    """The weights of the folder with another header."""
    raw = (folder / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:end])
    edit(header, [name for name in header if name != "__metadata__"])
    return framed(json.dumps(header).encode(), raw[end:])


def _overlap(header: dict[str, Any], names: list[str]) -> None:
    twins = [name for name in names if header[name]["shape"] == [32]]
    header[twins[1]]["data_offsets"] = header[twins[0]]["data_offsets"]


SAFETENSORS: dict[str, Callable[[Path], bytes]] = {
    "overlap": lambda f: edited(f, _overlap),
    "past the end": lambda f: edited(f, lambda h, n: h[n[0]].update(data_offsets=[0, 10**12])),
    "wrong size": lambda f: edited(f, lambda h, n: h[n[0]].update(dtype="F64")),
    "unknown dtype": lambda f: edited(f, lambda h, n: h[n[0]].update(dtype="X7")),
    "huge header": lambda f: framed(b"{}", length=2**62),
    "header past the end": lambda f: framed(b"{}" + bytes(200_000), length=90 << 20),
    "header no JSON": lambda f: framed(b"no JSON at all", bytes(200_000)),
    "truncated": lambda f: (f / "model.safetensors").read_bytes()[:-100],
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_safetensors(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").write_bytes(SAFETENSORS[kind](folder))
    refused(folder, capsys, "damaged weights|weights have")


def test_integers_where_floats_belong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = edited(folder, lambda h, n: h[n[0]].update(dtype="I32"))
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, capsys, "holds I32, weights must be floats")


CONFIGS: dict[str, tuple[Any, str]] = {
    "wrong type": ({"hidden_size": "32"}, "hidden_size"),
    "negative": ({"num_hidden_layers": -3}, "num_hidden_layers must be at least 1"),
    "gigantic vocabulary": ({"vocab_size": 10**8}, "vocab_size must be at most"),
    "large vocabulary": ({"vocab_size": 10**7}, "describes an encoder of 320"),
    "gigantic layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers must be at most"),
    "many layers": ({"num_hidden_layers": 100}, "describes an encoder"),
    "gigantic slots": ({"max_span_targets": 10**9}, "max_span_targets must be at most"),
    "beyond int64": ({"vocab_size": 10**30}, "vocab_size must be at most"),
    "other model": ({"model_type": "gpt2"}, "model_type must be 'bert'"),
    "no name": ({"model_type": ["bert"]}, "model_type must be 'bert'"),
    "architectures": ({"architectures": 3}, "architectures must be a list"),
    "dtype": ({"dtype": "os"}, "dtype must be one of"),
    "heads": ({"untrained_heads": 3}, "config.json"),
    "padding": ({"pad_token_id": 10**9}, "pad_token_id must be in"),
    "no object": ("[]", "must be a JSON object|not a JSON object"),
    "no JSON": ("{", "not a valid JSON"),
    "nested": ('{"a":' * 100_000 + "1" + "}" * 100_000, "recursion"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_config(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, match = CONFIGS[kind]
    path = folder / "config.json"
    text = changes if isinstance(changes, str) else None
    path.write_text(text or json.dumps({**json.loads(path.read_text()), **changes}))
    refused(folder, capsys, match, converts=False)
    # A converter sets the precision itself, so only this field does not matter to it.
    status = main(["convert", "--from", "hf", str(folder), str(folder.parent / "out")])
    assert status == 0 if kind == "dtype" else status in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
    if kind not in ("large vocabulary", "many layers"):
        with pytest.raises((ValueError, OSError), match=match):
            sf.Config.from_pretrained(folder)


INDICES = {
    "outside": ('{"metadata": {}, "weight_map": {"x": "../../etc/passwd"}}', "in its own folder"),
    "absolute": ('{"metadata": {}, "weight_map": {"x": "/etc/passwd"}}', "in its own folder"),
    "parent": ('{"metadata": {}, "weight_map": {"x": ".."}}', "in its own folder"),
    "number": ('{"metadata": {}, "weight_map": {"x": 3}}', "in its own folder"),
    "missing": ('{"metadata": {}, "weight_map": {"x": "m.safetensors"}}', "is not there"),
    "no JSON": ("{", "not JSON"),
    "list": ("[]", 'has no "weight_map"'),
    "empty": ('{"metadata": {}, "weight_map": {}}', 'has no "weight_map"'),
    "no metadata": ('{"weight_map": {"x": "vocab.txt"}}', 'has no "metadata"'),
}


@pytest.mark.parametrize("kind", INDICES)
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_index(kind: str, weights: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, match = INDICES[kind]
    (folder / "model.safetensors").unlink()
    (folder / f"{weights}.index.json").write_text(text)
    refused(folder, capsys, match)


class Code:
    """Pickles as a call of `os.mkdir`, the canary."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def raw_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def old_format(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [torch.save, old_format, raw_pickle])
def test_code_in_a_pickle(save: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary = folder.parent / "canary"
    tensors = load_file(folder / "model.safetensors")
    content: dict[str, Any] = {"bert.x": Code(canary), **tensors}
    (folder / "model.safetensors").unlink()
    save(content, folder / "pytorch_model.bin")
    refused(folder, capsys, "a pickle was refused|damaged weights", converts=save is not old_format)
    save(content, folder.parent / "model.pt")
    words = ["convert", "--from", "fairseq", str(folder.parent / "model.pt")]
    words += [str(folder.parent / "out"), "--config", str(folder / "config.json")]
    assert main(words) == 2
    assert "model.pt: " in capsys.readouterr().err
    assert not canary.exists()


def test_a_module_beside_the_file_is_not_imported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reading process takes nothing from the folder that it stands in."""
    canary = folder.parent / "canary"
    for name in ("torch", "numpy", "json", "safetensors", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    monkeypatch.chdir(folder)
    assert "bert.embeddings.LayerNorm.weight" in read_pickled_tensors(Path("pytorch_model.bin"))[0]
    assert not canary.exists()


def test_a_tensor_without_end(folder: Path) -> None:
    """A view that repeats one number ten million million times costs nothing until it is used."""
    path = folder / "pytorch_model.bin"
    torch.save({"x": torch.zeros(1).expand(10**13)}, path)
    with pytest.raises(ValueError, match=r"pytorch_model.bin: needs more than 1,024 MiB of memory"):
        read_pickled_tensors(path)


def test_a_zip_bomb(folder: Path) -> None:
    """Weights that shrink a thousandfold when compressed: torch's own files never are."""
    plain, bomb = folder / "plain.bin", folder / "pytorch_model.bin"
    torch.save({"x": torch.zeros(1 << 20)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w") as target:
        for item in source.infolist():
            content = source.read(item)
            if item.filename.endswith("/data.pkl"):
                content = content.replace(*(struct.pack("<i", n) for n in (1 << 20, 40 << 20)))
            elif item.filename.endswith("/data/0"):
                item.compress_type = zipfile.ZIP_DEFLATED
                with target.open(item, "w") as stream:
                    for _ in range(40):
                        stream.write(content)
                continue
            target.writestr(item, content)
    assert bomb.stat().st_size < 2_000_000
    with pytest.raises(ValueError, match=r"needs more than 64 MiB of memory"):
        read_pickled_tensors(bomb, memory_bytes=64 << 20)


def test_a_pickle_without_end(folder: Path) -> None:
    """A key whose hash takes 2^60 steps: no code, little memory, and no end."""
    path = folder / "pytorch_model.bin"
    # By hand, for hashing the key here would never end either: an empty dictionary, an empty tuple,
    # sixty times the pair of the last one and itself, then dictionary[pair] = 1.
    stream = b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 60
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/data.pkl", stream + b"K\x01s.")
        target.writestr("archive/version", "3\n")
        target.writestr("archive/byteorder", "little")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: not done within 6 s, given up"):
        read_pickled_tensors(path, timeout_seconds=6)


@pytest.mark.parametrize("kind", ["twice", "binary", "gigantic"])
def test_vocabulary(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "vocab.txt"
    if kind == "gigantic":
        with path.open("wb") as file:
            file.truncate(1 << 40)  # a hole: it takes no room on the disk
        match = "vocab.txt has .* bytes, allowed are"
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x00\x81")
        match = "damaged tokenizer"
    else:
        path.write_text("\n".join([*VOCABULARY, "The"]))
        match = "holds 'The' twice"
    with pytest.raises(ValueError, match=match):
        load_tokenizer(folder)
    assert main(["convert", "--from", "hf", str(folder), str(folder.parent / "out")]) == 2
    assert main(["verify", str(folder)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": "1.0"}', '{"a":' * 10_000 + "1" + "}" * 10_000]
)
def test_tokenizer_json(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="holds a damaged tokenizer"):
        load_tokenizer(folder)
    assert main(["verify", str(folder)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


OFFLINE = """
import socket, sys

def blocked(*arguments, **settings):
    raise SystemExit("the network was touched")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = blocked
import spanbert_fast as sf
assert "torch" not in sys.modules and "transformers" not in sys.modules
for name in sf.__all__:
    getattr(sf, name)
import spanbert_fast.cli, spanbert_fast.convert.run, spanbert_fast.diagnose.folders
"""


def test_import_opens_no_connection() -> None:
    subprocess.run([sys.executable, "-c", OFFLINE], check=True)


def test_nothing_in_the_package_speaks_to_the_network() -> None:
    """Downloads go through huggingface_hub, called by transformers for a name of the user's."""
    forbidden = {"urllib", "requests", "socket", "http", "httpx", "aiohttp", "ftplib", "ssl"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            found = forbidden.intersection(name.split(".")[0] for name in names)
            assert not found, f"{path.name} imports {found}"


def test_pickles_are_read_in_one_place_with_weights_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert not called.startswith(("pickle.", "joblib.", "marshal.", "shelve.")), path
            if called == "torch.load":
                settings = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert settings.get("weights_only") == "True", path


def test_good_folders_still_convert(folder: Path, tmp_path: Path) -> None:
    before: dict[str, Tensor] = load_file(folder / "model.safetensors")
    convert_huggingface(folder, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
