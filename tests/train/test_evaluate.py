"""Evaluation: the same masks for every model, beside what counting alone reaches."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM

import spanbert_fast as sf
from spanbert_fast.train.evaluate import evaluate, evaluate_model, unigram_baselines
from spanbert_fast.train.options import EvaluateOptions, PretrainOptions
from spanbert_fast.train.pretrain import pretrain
from spanbert_fast.train.source import Source, open_source


@pytest.fixture(scope="module")
def source(shards: Path) -> Source:
    return open_source(shards)


@pytest.fixture(scope="module")
def model(source: Source) -> sf.Model:
    torch.manual_seed(0)
    config = sf.Config.preset(
        "tiny",
        vocab_size=len(source.tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return sf.Model(config)


def test_figures_are_those_of_the_logits(source: Source, model: sf.Model) -> None:
    found = evaluate_model(
        model, source, source.evaluation_batches("validation", max_span_targets=15)
    )
    (batch,) = source.evaluation_batches("validation", max_span_targets=15)
    model.eval()
    with torch.no_grad():
        output = model.forward_packed(batch, return_logits=True)
    model.train()
    rows = output.logits[batch.mlm_positions]
    assert found.mlm_targets == len(rows)
    assert found.mlm_loss == pytest.approx(cross_entropy(rows, batch.mlm_labels).item(), rel=1e-5)
    right = rows.argmax(-1) == batch.mlm_labels
    assert found.mlm_accuracy == pytest.approx(right.float().mean().item())
    assert found.sbo_loss == pytest.approx(
        cross_entropy(output.sbo_logits, batch.sbo_targets).item(), rel=1e-5
    )
    losses = cross_entropy(output.sbo_logits, batch.sbo_targets, reduction="none").tolist()
    by_offset: dict[int, list[float]] = {}
    by_length: dict[int, list[float]] = {}
    for first, last in zip(batch.sbo_cu[:-1].tolist(), batch.sbo_cu[1:].tolist(), strict=True):
        for row in range(first, last):
            by_offset.setdefault(row - first, []).append(losses[row])
            by_length.setdefault(last - first, []).append(losses[row])
    for buckets, expected in (
        (found.sbo_by_offset, by_offset),
        (found.sbo_by_span_length, by_length),
    ):
        assert [bucket.value for bucket in buckets] == sorted(expected)
        assert [bucket.targets for bucket in buckets] == [len(expected[b.value]) for b in buckets]
        assert [bucket.loss for bucket in buckets] == pytest.approx(
            [sum(expected[b.value]) / len(expected[b.value]) for b in buckets], rel=1e-5
        )
    assert found.tokens == batch.num_tokens
    assert found.blocks == source.shards.num_blocks("validation")


def test_evaluation_leaves_mode_and_generator_alone(source: Source, model: sf.Model) -> None:
    model.train()
    before = torch.get_rng_state()
    evaluate_model(model, source, source.evaluation_batches("train", max_span_targets=15))
    assert model.training
    assert torch.get_rng_state().equal(before)


def test_masks_are_the_same_every_time_and_blocks_can_be_limited(source: Source) -> None:
    first, second = (
        list(source.evaluation_batches("validation", max_span_targets=15)) for _ in range(2)
    )
    assert first[0].input_ids.equal(second[0].input_ids)
    assert first[0].mlm_positions.equal(second[0].mlm_positions)
    limited = list(source.evaluation_batches("validation", max_span_targets=15, max_blocks=1))
    assert limited[0].num_sequences >= 1
    with_fewer = list(source.evaluation_batches("validation", max_span_targets=3))
    assert len(with_fewer[0].sbo_targets) < len(first[0].sbo_targets)


def test_baselines_are_those_of_counting(source: Source, shards: Path) -> None:
    ids = [
        piece
        for row in range(source.shards.num_blocks("train"))
        for piece in source.shards.gather("train", torch.tensor([row]).numpy()).values.tolist()
    ]
    size = len(source.tokenizer)
    counts = [ids.count(piece) for piece in range(size)]
    law = [(count + 1) / (len(ids) + size) for count in counts]
    targets = [ids[5], ids[7], ids[5], max(range(size), key=counts.__getitem__)]
    found = unigram_baselines(source, torch.tensor(targets))
    assert found.unigram_entropy == pytest.approx(-sum(p * math.log(p) for p in law))
    assert found.unigram_cross_entropy == pytest.approx(
        -sum(math.log(law[target]) for target in targets) / 4
    )
    assert found.majority_token == source.tokenizer.convert_ids_to_tokens(targets[3])
    assert found.majority_accuracy == targets.count(targets[3]) / 4


def test_saved_model_is_evaluated_as_the_run_did(
    shards: Path, options: Callable[..., PretrainOptions], tmp_path: Path
) -> None:
    summary = pretrain(options(tmp_path))
    found = evaluate(EvaluateOptions(model=str(summary.model), data=shards, threads=1))
    assert found == summary.evaluation


@pytest.fixture
def bert(source: Source, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(source.tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_hugging_face_model_meets_the_same_masks(source: Source, bert: Path, shards: Path) -> None:
    source.tokenizer.save_pretrained(bert)
    with pytest.warns(UserWarning, match="no complete SBO head"):
        found = evaluate(EvaluateOptions(model=str(bert), data=shards, threads=1))
    assert (found.sbo_loss, found.sbo_accuracy) == (None, None)
    assert (found.sbo_by_offset, found.sbo_by_span_length) == ((), ())
    theirs = BertForMaskedLM.from_pretrained(bert).eval()
    (batch,) = source.evaluation_batches("validation", max_span_targets=15)
    starts, positions = batch.cu_seqlens.tolist(), batch.mlm_positions
    rows = []
    with torch.no_grad():
        for first, last in itertools.pairwise(starts):
            inside = positions[(positions >= first) & (positions < last)] - first
            rows.append(theirs(batch.input_ids[None, first:last]).logits[0, inside])
    expected = cross_entropy(torch.cat(rows), batch.mlm_labels).item()
    assert found.mlm_loss == pytest.approx(expected, rel=1e-5)


def test_another_vocabulary_is_refused(source: Source, bert: Path, shards: Path) -> None:
    vocabulary = source.tokenizer.get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    words[-1], words[-2] = words[-2], words[-1]
    (bert / "vocab.txt").write_text("\n".join(words) + "\n")
    with (
        pytest.warns(UserWarning, match="no complete SBO head"),
        pytest.raises(ValueError, match="was trained with another vocabulary"),
    ):
        evaluate(EvaluateOptions(model=str(bert), data=shards, threads=1))


def test_an_empty_split_is_refused(source: Source, model: sf.Model) -> None:
    with pytest.raises(ValueError, match="has no blocks to evaluate on"):
        evaluate_model(model, source, iter(()))


def test_blocks_longer_than_the_model_are_refused(source: Source) -> None:
    with pytest.raises(ValueError, match="sequences of 32 tokens, the model has 31 positions"):
        source.check_positions(31)


def test_result_becomes_json(source: Source, model: sf.Model) -> None:
    found = evaluate_model(
        model, source, source.evaluation_batches("validation", max_span_targets=15)
    )
    assert json.loads(json.dumps(dataclasses.asdict(found)))["mlm_loss"] == found.mlm_loss
