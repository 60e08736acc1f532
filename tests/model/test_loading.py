"""Folders come and go: ours, Hugging Face's, SpanBERT's; heads that were not in them are known."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel
from transformers.utils import logging
from without_package import BLOCKER

from spanbert_fast.config import Config
from spanbert_fast.model.pretrained import Model


@pytest.fixture
def hf_config(config: Config) -> BertConfig:
    return BertConfig(**config.to_dict())


def load(folder: Path, **kwargs: Any) -> Model:
    """Loads without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model: Model = Model.from_pretrained(folder, **kwargs)
    return model


def load_warned(folder: Path, **kwargs: Any) -> tuple[Model, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model: Model = Model.from_pretrained(folder, **kwargs)
    return model, [str(warning.message) for warning in caught]


def assert_same(one: Model, other: Model) -> None:
    """All weights are equal, bit by bit."""
    weights = other.state_dict()
    assert one.state_dict().keys() == weights.keys()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def rewrite(folder: Path, change: Any) -> None:
    """Replaces the weights of a folder."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_round_trip(model: Model, padded: dict[str, Tensor], tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["BertForMaskedLM"]
    assert saved["model_type"] == "bert"
    again = load(tmp_path)
    assert not again.training
    assert again.config.untrained_heads == []
    assert_same(again, model)
    before, after = model(**padded), again(**padded)
    for name in ("loss", "logits", "sbo_logits"):
        assert torch.equal(before[name], after[name])
    assert again.cls.predictions.decoder.weight is again.get_input_embeddings().weight
    assert again.cls.predictions.decoder.bias is again.cls.predictions.bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_round_trip(model: Model, tmp_path: Path, dtype: torch.dtype) -> None:
    model.to(dtype).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == dtype
    wide = load(tmp_path, dtype=torch.float32)
    for name, weight in wide.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].float())


PLAIN = (
    BLOCKER
    + """
import torch
from transformers import AutoModel, AutoModelForMaskedLM, BertForMaskedLM

folder = sys.argv[1]
model, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
assert type(model) is BertForMaskedLM, type(model)
assert not report["missing_keys"], report
base = AutoModel.from_pretrained(folder, add_pooling_layer=False)
ids = torch.arange(5, 15)[None]
torch.save((model.eval()(ids).logits, base.eval()(ids).last_hidden_state), sys.argv[2])
"""
)


def test_plain_transformers_loads_our_folder(model: Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    result = tmp_path / "result.pt"
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "model"), str(result)]
    subprocess.run(command, check=True, capture_output=True)
    logits, states = torch.load(result)
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-9)
    expected = model.bert(ids).last_hidden_state
    torch.testing.assert_close(expected, states, rtol=0, atol=1e-9)


def test_masked_lm_folder(hf_config: BertConfig, padded: dict[str, Tensor], tmp_path: Path) -> None:
    twin = BertForMaskedLM(hf_config).eval()
    twin.save_pretrained(tmp_path)
    model, messages = load_warned(tmp_path)
    assert model.config.untrained_heads == ["sbo"]
    assert len(messages) == 1
    assert "no complete SBO head" in messages[0]
    ids = padded["input_ids"]
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=0, atol=1e-5)


def test_encoder_folder_without_prefix(
    hf_config: BertConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    twin = BertModel(hf_config).eval()
    twin.save_pretrained(tmp_path)
    logging.enable_propagation()
    model, messages = load_warned(tmp_path)
    logging.disable_propagation()
    assert caplog.text == ""
    assert model.config.untrained_heads == ["mlm", "sbo"]
    assert len(messages) == 1
    assert "no complete MLM and SBO head" in messages[0]
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    assert "pooler.dense" in messages[0]
    ids = torch.arange(5, 15)[None]
    states = model.bert(ids).last_hidden_state
    torch.testing.assert_close(states, twin(ids).last_hidden_state, rtol=0, atol=1e-5)


def test_released_spanbert_layout(hf_config: BertConfig, tmp_path: Path) -> None:
    """Encoder alone, with prefix, fp16, gamma and beta, in a pickle; position_ids for luck."""
    twin = BertForMaskedLM(hf_config).eval()
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value.half()
        for name, value in twin.state_dict().items()
        if name.startswith("bert.")
    }
    weights["bert.embeddings.position_ids"] = torch.arange(32)[None]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    hf_config.architectures = None
    hf_config.save_pretrained(tmp_path)
    model, messages = load_warned(tmp_path, dtype=torch.float32)
    assert len(messages) == 2
    assert "pickle" in messages[0]
    assert "spanbert-fast convert" in messages[0]
    assert "MLM and SBO" in messages[1]
    assert "position_ids" not in messages[1]
    ids = torch.arange(5, 15)[None]
    expected = twin.half().float().bert(ids).last_hidden_state
    states = model.bert(ids).last_hidden_state
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
    assert load_warned(tmp_path)[0].dtype == torch.float16
    with pytest.raises(OSError, match="safetensors"):
        Model.from_pretrained(tmp_path, use_safetensors=True)
    with pytest.raises(ValueError, match="weights_only must be True"):
        Model.from_pretrained(tmp_path, weights_only=False)


def test_malicious_pickle_is_refused(
    hf_config: BertConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("it ran",)

    weights = BertForMaskedLM(hf_config).state_dict()
    torch.save({**weights, "bert.x": Malicious()}, tmp_path / "pytorch_model.bin")
    hf_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a pickle was refused, .*print"):
        Model.from_pretrained(tmp_path)
    assert "it ran" not in capfd.readouterr().out


def test_extra_heads_are_named_once(hf_config: BertConfig, tmp_path: Path) -> None:
    BertForPreTraining(hf_config).save_pretrained(tmp_path)
    loaded: Any = load_warned(tmp_path, output_loading_info=True)
    (model, report), messages = loaded
    assert {"bert.pooler.dense.weight", "cls.seq_relationship.bias"} <= report["unexpected_keys"]
    assert "cls.span_boundary.bias" in report["missing_keys"]
    assert model.config.untrained_heads == ["sbo"]
    assert len(messages) == 1
    assert "bert.pooler.dense, cls.seq_relationship" in messages[0]


@pytest.mark.parametrize("stored", ["as they are", "everything twice", "only the decoder"])
def test_tied_tensors_in_any_form(model: Model, tmp_path: Path, stored: str) -> None:
    model.save_pretrained(tmp_path)

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        words = "bert.embeddings.word_embeddings.weight"
        if stored != "as they are":
            weights["cls.predictions.decoder.weight"] = weights[words].clone()
            weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()
        if stored == "only the decoder":
            del weights[words], weights["cls.predictions.bias"]
        return weights

    rewrite(tmp_path, change)
    again = load(tmp_path)
    assert_same(again, model)
    assert again.cls.predictions.decoder.weight is again.get_input_embeddings().weight


def test_incomplete_encoder_is_refused(model: Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    lost = "bert.encoder.layer.1.output.dense.weight"
    rewrite(tmp_path, lambda weights: {n: w for n, w in weights.items() if n != lost})
    with pytest.raises(ValueError, match=f"lacks 1 tensors of the encoder.*{lost}"):
        Model.from_pretrained(tmp_path)


def test_other_vocabulary_is_refused(model: Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ismatch"):
        Model.from_pretrained(tmp_path, vocab_size=70)


def test_untrained_heads_stay_silent_until_trained(
    hf_config: BertConfig, padded: dict[str, Tensor], tmp_path: Path
) -> None:
    BertModel(hf_config).save_pretrained(tmp_path / "encoder")
    model, _ = load_warned(tmp_path / "encoder")
    inputs = {name: padded[name] for name in ("input_ids", "attention_mask", "sbo_spans")}
    labels, targets = {"labels": padded["labels"]}, {"sbo_targets": padded["sbo_targets"]}
    silent = model(**inputs)
    assert silent.logits is None
    assert silent.sbo_logits is None
    with pytest.raises(KeyError, match=r"logits was not computed.*untrained_heads"):
        silent["logits"]
    asked = model(**inputs, return_logits=True)
    assert asked.logits is not None
    assert asked.sbo_logits is not None
    evaluated = model(**inputs, **labels)
    assert evaluated.logits is not None
    assert evaluated.sbo_logits is None
    # The list survives saving, and evaluation changes nothing.
    model.save_pretrained(tmp_path / "ours")
    assert load(tmp_path / "ours").config.untrained_heads == ["mlm", "sbo"]
    model.train()(**inputs, **labels)
    assert model.config.untrained_heads == ["sbo"]
    assert model.eval()(**inputs).logits is not None
    assert model(**inputs).sbo_logits is None
    model.train()(**inputs, **targets)
    assert model.config.untrained_heads == []
    assert model.eval()(**inputs).sbo_logits is not None


def test_models_from_a_configuration_list_nothing(config: Config) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Model(config).eval()
    assert model.config.untrained_heads == []
    assert model(torch.arange(5, 15)[None]).logits is not None


@pytest.mark.parametrize("size", [70, 50])
def test_resize(model: Model, padded: dict[str, Tensor], tmp_path: Path, size: int) -> None:
    inputs = {name: padded[name] % 50 for name in ("input_ids", "token_type_ids")}
    inputs["sbo_spans"] = padded["sbo_spans"]
    with torch.no_grad():
        before = model(**inputs)
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size
    after = model(**inputs)
    kept = min(size, 64)
    torch.testing.assert_close(after.logits[..., :kept], before.logits[..., :kept])
    torch.testing.assert_close(after.sbo_logits[..., :kept], before.sbo_logits[..., :kept])
    assert after.logits.shape[-1] == after.sbo_logits.shape[-1] == size
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)
