"""What the user may choose, and what is said to what he may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, BertConfig

import spanbert_fast as sf


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("tiny", (2, 128, 2, 512)),
        ("small", (4, 512, 8, 2048)),
        ("base", (12, 768, 12, 3072)),
        ("large", (24, 1024, 16, 4096)),
    ],
)
def test_presets(name: str, shape: tuple[int, ...]) -> None:
    config = sf.Config.preset(name)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    assert (layers, hidden, config.num_attention_heads, config.intermediate_size) == shape
    assert config.vocab_size == 28996
    assert config.max_position_embeddings == 512
    assert config.layer_norm_eps == 1e-12
    assert sf.Config.preset(name, vocab_size=99, num_hidden_layers=1).vocab_size == 99


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="preset must be one of tiny, small, base, large, got 'x'"):
        sf.Config.preset("x")


def test_round_trip_through_plain_bert(tmp_path: Path) -> None:
    config = sf.Config.preset("tiny", sbo_weight=0.5, untrained_heads=["sbo"], max_span_targets=9)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "bert"
    assert saved["architectures"] == ["BertForMaskedLM"]
    assert sf.Config.from_pretrained(tmp_path).to_dict() == config.to_dict()
    plain = AutoConfig.from_pretrained(tmp_path)
    assert type(plain) is BertConfig
    plain.save_pretrained(tmp_path / "plain")
    again = sf.Config.from_pretrained(tmp_path / "plain")
    assert (again.sbo_weight, again.untrained_heads, again.max_span_targets) == (0.5, ["sbo"], 9)


def test_reads_old_bert_configurations(tmp_path: Path) -> None:
    old = {"model_type": "bert", "vocab_size": 28996, "position_embedding_type": "absolute"}
    old |= {"directionality": "bidi", "gradient_checkpointing": False}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = sf.Config.from_pretrained(tmp_path)
    assert config.vocab_size == 28996
    assert config.max_span_targets == 15
    assert config.untrained_heads == []


def test_defaults_are_not_shared() -> None:
    sf.Config().untrained_heads.append("mlm")
    assert sf.Config().untrained_heads == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"max_span_targets": -1}, "max_span_targets must be at least 1, got -1"),
        ({"hidden_size": 100}, r"multiple of num_attention_heads \(12\), got 100"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must be in \[0, 1\), got 1.0"),
        ({"attention_probs_dropout_prob": -0.1}, r"must be in \[0, 1\), got -0.1"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be positive, got 0.0"),
        ({"sbo_weight": -1.0}, "sbo_weight must be finite and not negative, got -1.0"),
        ({"sbo_weight": float("nan")}, "sbo_weight must be finite and not negative, got nan"),
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
        ({"is_decoder": True}, "is_decoder must be False, got True"),
        ({"add_cross_attention": True}, "add_cross_attention must be False, got True"),
        ({"position_embedding_type": "relative_key"}, "must be 'absolute', got 'relative_key'"),
        ({"loss_normalization": "mean"}, "must be 'tokens' or 'reference', got 'mean'"),
        ({"untrained_heads": ["nsp"]}, "untrained_heads may hold .*, got 'nsp'"),
    ],
)
def test_refused_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.Config(**change)


def test_refused_types() -> None:
    with pytest.raises(TypeError, match="sbo_weight must be a number, got 'much'"):
        sf.Config(sbo_weight="much")
