"""The released implementation's numbers, from one forward and backward pass of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spanbert_fast.config import Config
from spanbert_fast.model.pretrained import Model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RENAMED = {
    "gamma": "weight",
    "beta": "bias",
    "cls.pair_target_predictions": "cls.span_boundary",
    "mlp_layer_norm.linear1": "transform1.dense",
    "mlp_layer_norm.layer_norm1": "transform1.LayerNorm",
    "mlp_layer_norm.linear2": "transform2.dense",
    "mlp_layer_norm.layer_norm2": "transform2.LayerNorm",
}


def our_name(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "reference_tiny.safetensors")


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return dict(json.loads((GOLDEN / "reference_tiny.json").read_text()))


@pytest.fixture
def reference(golden: dict[str, Tensor], facts: dict[str, Any]) -> Model:
    config = Config(
        **facts["config"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        loss_normalization="reference",
    )
    model = Model(config)
    weights = {
        our_name(name.removeprefix("weights.")): value
        for name, value in golden.items()
        if name.startswith("weights.")
    }
    copy = weights.pop("cls.span_boundary.decoder.weight")
    assert torch.equal(copy, weights["bert.embeddings.word_embeddings.weight"])
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    model.load_state_dict(weights)
    return model


@pytest.fixture
def inputs(golden: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Tensor]:
    lengths = torch.tensor(facts["lengths"])[:, None]
    labels, pairs = golden["mlm_targets"], golden["pairs"]
    is_target = pairs[..., 2:] != 0
    has_target = is_target.any(dim=2, keepdim=True)
    return {
        "input_ids": golden["input_ids"],
        "attention_mask": (torch.arange(labels.shape[1]) < lengths).long(),
        "labels": torch.where(labels == 0, -100, labels),
        "sbo_spans": torch.where(has_target, pairs[..., :2], -1),
        "sbo_targets": torch.where(is_target, pairs[..., 2:], -100),
    }


def test_states_and_logits(
    reference: Model, inputs: dict[str, Tensor], golden: dict[str, Tensor]
) -> None:
    output = reference.eval()(**inputs, output_hidden_states=True)
    kept = inputs["attention_mask"].bool()
    for ours, theirs in (
        (output.hidden_states[-1], golden["last_hidden_state"]),
        (output.logits, golden["mlm_logits"]),
    ):
        torch.testing.assert_close(ours[kept], theirs[kept], rtol=0, atol=1e-5)
    is_target = inputs["sbo_targets"] != -100
    theirs = golden["sbo_logits"][is_target]
    torch.testing.assert_close(output.sbo_logits, theirs, rtol=0, atol=1e-5)


def test_losses(reference: Model, inputs: dict[str, Tensor], facts: dict[str, Any]) -> None:
    output = reference(**inputs)
    assert int((inputs["labels"] != -100).sum()) == facts["num_mlm"]
    assert float(output.loss.detach()) == pytest.approx(facts["loss"], rel=1e-5)
    mlm_sum = float(output.mlm_loss) * facts["num_mlm"]
    sbo_sum = float(output.sbo_loss) * facts["num_sbo"]
    assert mlm_sum == pytest.approx(facts["mlm_loss_sum"], rel=1e-5)
    assert sbo_sum == pytest.approx(facts["sbo_loss_sum"], rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_gradient(
    attention: str,
    reference: Model,
    inputs: dict[str, Tensor],
    golden: dict[str, Tensor],
    gradients: Callable[[Model], dict[str, Tensor]],
) -> None:
    reference.set_attn_implementation(attention)
    reference.train()(**inputs).loss.backward()
    ours = gradients(reference)
    theirs = {
        our_name(name.removeprefix("grad.")): value
        for name, value in golden.items()
        if name.startswith("grad.")
    }
    theirs = {name: value for name, value in theirs.items() if "decoder" not in name}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm()
        # A key bias moves all scores of a query alike, so its gradient is rounding noise.
        assert error <= 1e-4 * expected.norm() or name.endswith("self.key.bias"), name
