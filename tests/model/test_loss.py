"""The loss: what it divides by, what it leaves alone, and that no split of a batch changes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.model.inputs import pack_inputs
from spanbert_fast.model.pretrained import Model

Gradients = Callable[[Model], dict[str, Tensor]]


@pytest.fixture
def sixteen(padded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sixteen rows with uneven numbers of labels: a mean of means would show."""
    counts = (padded["labels"] != -100).sum(dim=1).tolist()
    assert len(set(counts)) == 4
    return {name: value.repeat(4, *[1] * (value.dim() - 1)) for name, value in padded.items()}


def accumulate(
    model: Model, inputs: dict[str, Tensor], size: int, **shared: Any
) -> tuple[Tensor, int]:
    """Sum of the losses of all micro-batches of `size` rows, after their backward passes."""
    items = int((inputs["labels"] != -100).sum())
    total = torch.zeros((), dtype=torch.float64)
    rows = len(inputs["labels"])
    for start in range(0, rows, size):
        part = {name: value[start : start + size] for name, value in inputs.items()}
        part["sequence_ids"] = torch.arange(start, min(start + size, rows)) + 1000
        loss = model(**part, num_items_in_batch=torch.tensor(items), **shared).loss
        loss.backward()
        total += loss.detach()
    return total, items


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("normalization", ["tokens", "reference"])
def test_no_split_changes_loss_or_gradient(
    config: Config,
    sixteen: dict[str, Tensor],
    gradients: Gradients,
    dropout: float,
    normalization: str,
) -> None:
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    config.loss_normalization = normalization
    model = Model(config).double().train()
    sbo_items = int((sixteen["sbo_targets"] != -100).sum())
    results = []
    for size in (16, 4, 1):
        model.zero_grad()
        total, _ = accumulate(
            model,
            sixteen,
            size,
            dropout_seed=torch.tensor(5),
            num_sbo_items_in_batch=sbo_items,
        )
        results.append((total, gradients(model)))
    loss, grads = results[0]
    for other_loss, other_grads in results[1:]:
        close = {"rtol": 0, "atol": 1e-9}
        # (N_sbo + 1) is that of the whole step in every part, so this split is exact as well.
        torch.testing.assert_close(other_loss, loss, **close)
        for name, grad in grads.items():
            torch.testing.assert_close(other_grads[name], grad, **close)


def test_denominators(model: Model, padded: dict[str, Tensor]) -> None:
    num_mlm = int((padded["labels"] != -100).sum())
    num_sbo = int((padded["sbo_targets"] != -100).sum())
    model.config.sbo_weight = 0.5
    output = model(**padded)
    sums = float(output.mlm_loss) * num_mlm, float(output.sbo_loss) * num_sbo
    assert output.mlm_loss.requires_grad is False
    assert output.sbo_loss.requires_grad is False

    def loss(**arguments: Any) -> float:
        return float(model(**padded, **arguments).loss.detach())

    assert loss() == pytest.approx((sums[0] + 0.5 * sums[1]) / num_mlm)
    assert loss(num_items_in_batch=7) == pytest.approx((sums[0] + 0.5 * sums[1]) / 7)
    model.config.loss_normalization = "reference"
    assert loss() == pytest.approx(sums[0] / num_mlm + 0.5 * sums[1] / (num_sbo + 1))
    both = loss(num_items_in_batch=torch.tensor(7), num_sbo_items_in_batch=torch.tensor(3))
    assert both == pytest.approx(sums[0] / 7 + 0.5 * sums[1] / 4)
    with pytest.raises(ValueError, match="num_sbo_items_in_batch"):
        loss(num_items_in_batch=7)


@pytest.mark.parametrize("missing", ["both", "mlm", "sbo"])
@pytest.mark.parametrize("normalization", ["tokens", "reference"])
def test_without_labels_the_loss_is_zero_and_attached(
    model: Model,
    padded: dict[str, Tensor],
    gradients: Gradients,
    missing: str,
    normalization: str,
) -> None:
    model.config.loss_normalization = normalization
    if missing != "sbo":
        padded["labels"] = torch.full_like(padded["labels"], -100)
    if missing != "mlm":
        padded["sbo_spans"] = torch.full_like(padded["sbo_spans"], -1)
        padded["sbo_targets"] = torch.full_like(padded["sbo_targets"], -100)
    output = model.train()(**padded)
    output.loss.backward()
    grads = gradients(model)
    heads = {"both": ("cls",), "mlm": ("cls.predictions",), "sbo": ("cls.span_boundary",)}
    for name, grad in grads.items():
        is_idle = any(part in name for part in heads[missing])
        assert bool(grad.any()) is not (is_idle or missing == "both"), name
    assert (float(output.loss.detach()) == 0.0) is (missing == "both")
    assert output.logits is None


def test_labels_beside_spans_that_ask_for_predictions(
    model: Model, padded: dict[str, Tensor], gradients: Gradients
) -> None:
    del padded["sbo_targets"]
    output = model.train()(**padded, return_logits=True)
    assert output.sbo_logits.shape == (14, 64)
    assert float(output.sbo_loss) == 0.0
    output.loss.backward()
    assert not gradients(model)["cls.span_boundary.bias"].any()


def test_packed_batch_without_labels(model: Model, padded: dict[str, Tensor]) -> None:
    ids = {name: padded[name] for name in ("input_ids", "attention_mask")}
    batch = pack_inputs(model.config, **ids).batch
    output = model.train().forward_packed(batch)
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0
    assert output.logits is None
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model(**ids).loss is None
    assert model(**ids).logits is not None


def test_scores_explain_the_losses(model: Model, padded: dict[str, Tensor]) -> None:
    batch: PackedBatch = pack_inputs(model.config, **padded).batch
    output = model.forward_packed(batch)
    scores = model.score_packed(batch)
    torch.testing.assert_close(scores.mlm_loss.mean(), output.mlm_loss, check_dtype=False)
    torch.testing.assert_close(scores.sbo_loss.mean(), output.sbo_loss, check_dtype=False)
    guesses = output.logits.index_select(0, batch.mlm_positions).argmax(-1)
    assert torch.equal(scores.mlm_correct, guesses == batch.mlm_labels)
    assert torch.equal(scores.sbo_correct, output.sbo_logits.argmax(-1) == batch.sbo_targets)
    assert model.forward_packed(batch, return_logits=False).logits is None


def test_dropout_follows_seed_and_names(config: Config, padded: dict[str, Tensor]) -> None:
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.3
    model = Model(config).train()

    def loss(**arguments: Any) -> float:
        return float(model(**padded, **arguments).loss.detach())

    seed = torch.tensor(3)
    assert loss(dropout_seed=seed) == loss(dropout_seed=seed)
    assert loss(dropout_seed=seed) != loss(dropout_seed=torch.tensor(4))
    assert loss(dropout_seed=seed) == loss(dropout_seed=seed, sequence_ids=torch.arange(4))
    assert loss(dropout_seed=seed) != loss(dropout_seed=seed, sequence_ids=torch.arange(4) + 1)
    torch.manual_seed(0)
    first, second = loss(), loss()
    torch.manual_seed(0)
    assert (first, second) == (loss(), loss())
    assert first != second
    model.eval()
    assert loss(dropout_seed=seed) == loss()


def test_both_attentions_drop_the_same(
    config: Config, padded: dict[str, Tensor], gradients: Gradients
) -> None:
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.3
    model = Model(config).double().train()
    results = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        model(**padded, dropout_seed=torch.tensor(3)).loss.backward()
        results.append(gradients(model))
    for name, grad in results[0].items():
        torch.testing.assert_close(grad, results[1][name], rtol=0, atol=1e-9)
