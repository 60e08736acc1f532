"""Our folders in plain transformers and theirs in ours: one file or shards, in any precision."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel
from transformers.utils import hub
from without_package import BLOCKER

from spanbert_fast.config import Config
from spanbert_fast.data.tokenizer import save_tokenizer
from spanbert_fast.data.wordpiece import train_tokenizer
from spanbert_fast.model.pretrained import Model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARD_SIZES = {"one_file": "1GB", "shards": "8KB"}
TEXT = "We must work Together to keep the Peace."
IDS = torch.tensor([[2, *range(5, 15), 3]])

# Runs without this package, proves it, and reads each folder as a user of transformers would.
PLAIN = (
    BLOCKER
    + """
import json, warnings
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

found, text = {}, sys.stdin.read()
ids = torch.tensor(json.loads(sys.argv[2]))
for folder in sys.argv[3:]:
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
        wide = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
        base, base_report = AutoModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        found[folder] = {
            "classes": [type(each).__name__ for each in (model, base)],
            "dtype": model.dtype,
            "weights": model.state_dict(),
            "logits": wide(ids).logits,
            "states": base(ids).last_hidden_state,
            "report": {name: set(keys) for name, keys in report.items()},
            "base_report": {name: set(keys) for name, keys in base_report.items()},
            "tokens": AutoTokenizer.from_pretrained(folder).tokenize(text),
            "warnings": [str(each.message) for each in caught],
        }
assert not [name for name in sys.modules if name.startswith("spanbert_fast")]
torch.save(found, sys.argv[1])
"""
)


@pytest.fixture
def random_model(config: Config) -> Model:
    """Random weights, fp32, evaluation mode; biases and norms are not at their initial 0 and 1."""
    model = Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder, of which none is a pickle."""
    assert not [*folder.glob("*.bin"), *folder.glob("*.pt")]
    return sorted(folder.glob("*.safetensors"))


def assert_sharded(folder: Path, is_sharded: bool) -> None:
    files = weight_files(folder)
    index = folder / "model.safetensors.index.json"
    if not is_sharded:
        assert [file.name for file in files] == ["model.safetensors"]
        assert not index.exists()
        return
    assert len(files) > 3
    named = json.loads(index.read_text())["weight_map"]
    held = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            held |= dict.fromkeys(opened.keys(), file.name)
    assert held == named


def load(folder: Path, **kwargs: Any) -> tuple[Model, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model: Model = Model.from_pretrained(folder, **kwargs)
    return model, [str(warning.message) for warning in caught]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert weight.dtype == other[name].dtype
        assert torch.equal(weight, other[name]), name


def test_ours_in_plain_transformers(random_model: Model, tmp_path: Path) -> None:
    """All forms at once, because a process that imports transformers takes seconds."""
    tokenizer = train_tokenizer([TEXT], 64)
    folders: dict[str, tuple[torch.dtype, Model]] = {}
    for dtype in DTYPES:
        model = Model(random_model.config).to(dtype).eval()
        model.load_state_dict(random_model.state_dict())
        for form, size in SHARD_SIZES.items():
            folder = tmp_path / f"{dtype}_{form}"
            model.save_pretrained(folder, max_shard_size=size)
            save_tokenizer(tokenizer, folder)
            assert_sharded(folder, form == "shards")
            folders[str(folder)] = (dtype, model)
    result = tmp_path / "result.pt"
    command = [sys.executable, "-c", PLAIN, str(result), json.dumps(IDS.tolist()), *folders]
    subprocess.run(command, check=True, capture_output=True, input=TEXT, text=True)
    span_names = {n for n in random_model.state_dict() if n.startswith("cls.span_boundary.")}
    all_heads = {n for n in random_model.state_dict() if n.startswith("cls.")}
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    pooler = {"pooler.dense.weight", "pooler.dense.bias"}
    for folder_name, found in torch.load(result).items():
        dtype, model = folders[folder_name]
        assert found["classes"] == ["BertForMaskedLM", "BertModel"]
        assert found["dtype"] == dtype
        ours = model.state_dict()
        assert_same(found["weights"], {name: ours[name] for name in found["weights"]})
        # What it is told: the SBO head has no place there, and a BertModel wants a pooler.
        assert found["report"]["missing_keys"] == set()
        assert found["report"]["unexpected_keys"] == span_names
        assert found["base_report"]["missing_keys"] == pooler
        assert found["base_report"]["unexpected_keys"] == all_heads - tied
        assert found["warnings"] == []
        assert found["tokens"] == tokenizer.tokenize(TEXT)
        wide, _ = load(Path(folder_name), dtype=torch.float32)
        with torch.no_grad():
            close = {"rtol": 0, "atol": 1e-5}
            torch.testing.assert_close(wide(IDS).logits, found["logits"], **close)
            states = wide.bert(IDS).last_hidden_state
            torch.testing.assert_close(states, found["states"], **close)


@pytest.mark.parametrize("form", SHARD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_theirs_in_ours(config: Config, tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    """A BERT of plain transformers, loaded, saved again in their code, and read by ours."""
    plain = BertConfig(**{k: v for k, v in config.to_dict().items() if k != "untrained_heads"})
    BertForPreTraining(plain).to(dtype).save_pretrained(tmp_path / "first")
    twin = BertForMaskedLM.from_pretrained(tmp_path / "first")
    twin.save_pretrained(tmp_path / "second", max_shard_size=SHARD_SIZES[form])
    assert_sharded(tmp_path / "second", form == "shards")
    model, messages = load(tmp_path / "second")
    assert model.dtype == dtype
    assert model.config.untrained_heads == ["sbo"]
    assert len(messages) == 1
    assert "no complete SBO head" in messages[0]
    theirs = twin.state_dict()
    assert_same({name: model.state_dict()[name] for name in theirs}, theirs)
    with torch.no_grad():
        logits = load(tmp_path / "second", dtype=torch.float32)[0](IDS).logits
        torch.testing.assert_close(logits, twin.float()(IDS).logits, rtol=0, atol=1e-5)


def test_through_their_hands_and_back(random_model: Model, tmp_path: Path) -> None:
    """What plain transformers saves of ours keeps MLM head and settings, and lacks the SBO head."""
    random_model.config.sbo_weight = 0.5
    random_model.save_pretrained(tmp_path / "ours", max_shard_size="8KB")
    twin = BertForMaskedLM.from_pretrained(tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    model, messages = load(tmp_path / "theirs")
    assert model.config.untrained_heads == ["sbo"]
    assert len(messages) == 1
    for field in ("max_span_targets", "span_position_embedding_size", "sbo_weight"):
        assert getattr(model.config, field) == getattr(random_model.config, field)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, random_model(IDS).logits)


@pytest.mark.parametrize("form", SHARD_SIZES)
def test_precision_that_is_asked_for(random_model: Model, tmp_path: Path, form: str) -> None:
    random_model.bfloat16().save_pretrained(tmp_path, max_shard_size=SHARD_SIZES[form])
    weights = random_model.state_dict()
    for asked, got in (
        ("auto", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        ("float16", torch.float16),
        (torch.float32, torch.float32),
    ):
        model, messages = load(tmp_path, dtype=asked)
        assert messages == []
        assert_same(model.state_dict(), {name: value.to(got) for name, value in weights.items()})
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_shards_of_an_encoder(config: Config, tmp_path: Path) -> None:
    twin = BertModel(BertConfig(**config.to_dict())).eval()
    twin.save_pretrained(tmp_path, max_shard_size="8KB")
    assert_sharded(tmp_path, is_sharded=True)
    model, messages = load(tmp_path)
    assert model.config.untrained_heads == ["mlm", "sbo"]
    assert len(messages) == 1
    with torch.no_grad():
        states = model.bert(IDS).last_hidden_state
        torch.testing.assert_close(states, twin(IDS).last_hidden_state, rtol=0, atol=1e-5)


def test_a_lost_shard_is_an_error(random_model: Model, tmp_path: Path) -> None:
    random_model.save_pretrained(tmp_path, max_shard_size="8KB")
    lost = weight_files(tmp_path)[1]
    lost.unlink()
    with pytest.raises(OSError, match=lost.name):
        Model.from_pretrained(tmp_path)


def test_saved_again_in_another_form(random_model: Model, tmp_path: Path) -> None:
    """One file over shards, and back: what is read is what was saved last."""
    random_model.save_pretrained(tmp_path, max_shard_size="8KB")
    with torch.no_grad():
        random_model.cls.span_boundary.bias.add_(1.0)
    random_model.save_pretrained(tmp_path)
    assert_sharded(tmp_path, is_sharded=False)
    assert_same(load(tmp_path)[0].state_dict(), random_model.state_dict())
    with torch.no_grad():
        random_model.cls.span_boundary.bias.add_(1.0)
    random_model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert_sharded(tmp_path, is_sharded=True)
    assert_same(load(tmp_path)[0].state_dict(), random_model.state_dict())


class FakeHub(HfApi):
    """A hub that is a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(token=False)
        self.folder = folder
        self.calls: list[tuple[str, Any]] = []

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        self.calls.append(("create_repo", repo_id))
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: Any, **kwargs: Any) -> Any:
        self.calls.append(("create_commit", kwargs["commit_message"]))
        for operation in operations:
            target = self.folder / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, target)
        return SimpleNamespace(oid="0" * 40)


@pytest.mark.parametrize("form", SHARD_SIZES)
def test_push_to_hub(
    random_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(hub, "_hf_api", fake)
    random_model.push_to_hub("someone/spanbert", max_shard_size=SHARD_SIZES[form])
    assert fake.calls == [("create_repo", "someone/spanbert"), ("create_commit", "Upload model")]
    folder = tmp_path / "someone" / "spanbert"
    assert_sharded(folder, form == "shards")
    others = {file.name for file in folder.iterdir() if "model" not in file.name}
    assert others == {"README.md", "config.json"}
    assert_same(load(folder)[0].state_dict(), random_model.state_dict())
    plain = BertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        expected = random_model(IDS).logits
        torch.testing.assert_close(plain(IDS).logits, expected, rtol=0, atol=1e-5)
