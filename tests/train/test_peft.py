"""PEFT's LoRA with its default targets: trains under our Trainer, merges, saves and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from trainer_runs import make_model, make_tokenizer, make_trainer

from spanbert_fast.data.collator import SpanMaskingCollator

# PEFT asks for a property of transformers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One training of the adapters, dropout on, and what stood in the tensors before."""
    tokenizer = make_tokenizer()
    base = make_model(tokenizer, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    # No target_modules: PEFT picks query and value, because the model type is "bert".
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, lora_dropout=0.1))
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    # Each sequence repeats one word, which what is not masked of it tells.
    ends = ([tokenizer.cls_token_id], [tokenizer.sep_token_id])
    rows = [{"input_ids": [*ends[0], *[5 + n % 10] * (6 + n), *ends[1]]} for n in range(16)]
    trainer = make_trainer(
        model,
        SpanMaskingCollator(tokenizer),
        rows,
        tmp_path_factory.mktemp("lora"),
        max_steps=40,
        learning_rate=0.05,
        per_device_train_batch_size=16,
    )
    trainer.train()
    return {
        "model": model.eval(),
        "start": start,
        "before": before,
        "log": trainer.state.log_history,
        "batch": SpanMaskingCollator(tokenizer, seed=5)(rows),
    }


@torch.no_grad()
def outputs_of(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    output = model(**batch)
    return [output.loss, output.logits, output.sbo_logits]


def test_only_the_adapters_of_query_and_value_learn(run: dict[str, Any]) -> None:
    parameters = dict(run["model"].named_parameters())
    trained = {name for name, value in parameters.items() if value.requires_grad}
    expected = {
        f"base_model.model.bert.encoder.layer.{layer}.attention.self.{target}.lora_{part}.default"
        ".weight"
        for layer in range(2)
        for target in ("query", "value")
        for part in "AB"
    }
    assert trained == expected
    for name, value in parameters.items():
        assert torch.equal(value, run["start"][name]) == (name not in trained), name
    assert not any(run["start"][name].any() for name in trained if "lora_B" in name)


def test_both_losses_fall(run: dict[str, Any]) -> None:
    for name in ("loss", "mlm_loss", "sbo_loss"):
        found = [entry[name] for entry in run["log"] if name in entry]
        assert len(found) == 40
        assert sum(found[-10:]) < 0.9 * sum(found[:10]), name


def test_a_saved_adapter_loads_and_merges(run: dict[str, Any], tmp_path: Path) -> None:
    expected = outputs_of(run["model"], run["batch"])
    run["model"].save_pretrained(tmp_path)
    base = make_model(make_tokenizer())
    base.load_state_dict(run["before"])
    plain = outputs_of(base.eval(), run["batch"])
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert all(map(torch.equal, outputs_of(loaded, run["batch"]), expected))
    merged = loaded.merge_and_unload()
    assert merged is base
    assert merged.state_dict().keys() == run["before"].keys()
    for found, value, without in zip(
        outputs_of(merged, run["batch"]), expected, plain, strict=True
    ):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-5)
        assert float((value - without).abs().max()) > 1e-3
