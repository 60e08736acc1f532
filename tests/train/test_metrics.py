"""The lines of a run: once per step, whole, and cut where a resumed run begins."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM

from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.train import metrics
from spanbert_fast.train.events import Progress


def progress(step: int, loss: float = 1.0) -> Progress:
    return Progress(
        step=step,
        num_steps=10,
        epoch=0,
        loss=loss,
        mlm_loss=1.0,
        sbo_loss=1.0,
        learning_rate=0.1,
        gradient_norm=1.0,
        tokens=100 * step,
        tokens_per_second=1.0,
        flop_utilisation=0.5,
        seconds_left=1.0,
    )


def packed(lengths: tuple[int, ...], num_mlm: int, num_sbo: int) -> PackedBatch:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(cu_seqlens[-1])
    return PackedBatch(
        input_ids=torch.ones(total, dtype=torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        token_type_ids=torch.zeros(total, dtype=torch.int64),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        sequence_ids=torch.arange(len(lengths)),
        mlm_positions=torch.arange(1, 1 + num_mlm),
        mlm_labels=torch.ones(num_mlm, dtype=torch.int64),
        sbo_left=torch.zeros(1, dtype=torch.int64),
        sbo_right=torch.tensor([num_sbo + 1]),
        sbo_cu=torch.tensor([0, num_sbo], dtype=torch.int32),
        sbo_targets=torch.ones(num_sbo, dtype=torch.int64),
    )


def test_a_resumed_log_repeats_no_step(tmp_path: Path) -> None:
    log = metrics.MetricsLog(tmp_path, last_step=0)
    for step in (2, 4, 6):
        log.progress(progress(step))
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "st')  # the writer was killed
    log = metrics.MetricsLog(tmp_path, last_step=4)
    log.progress(progress(6, loss=9.0))
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 1.0), (4, 1.0), (6, 9.0)]
    assert metrics.read_metrics(path) == lines
    assert lines[0] == {"kind": "train", **dataclasses.asdict(progress(2))}


def test_tensorboard_holds_the_same_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = metrics.MetricsLog(tmp_path, last_step=0)
    log.progress(progress(2, loss=3.0))
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (scalar,) = board.Scalars("train/loss")
    assert (scalar.step, scalar.value) == (2, 3.0)


SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


def new_meter(config: Config | None = None, *, frozen_encoder: bool = False) -> metrics.Meter:
    return metrics.Meter(
        config or Config(**SHAPE),
        frozen_encoder=frozen_encoder,
        num_steps=10,
        start_step=0,
        start_tokens=1_000,
        peak=1e9,
    )


def test_meter_weighs_means_by_their_targets() -> None:
    meter = new_meter()
    for losses, batch in (
        ((3.0, 2.0, 1.0), packed((8,), 1, 2)),
        ((5.0, 6.0, 0.0), packed((8, 4), 3, 0)),
    ):
        meter.add([torch.tensor(loss) for loss in losses], batch)
    meter.end_step()
    found = meter.read(1, 0, 0.1, torch.tensor(2.0))
    assert found.loss == 8.0  # the parts of one step add up
    assert found.mlm_loss == (2 + 3 * 6) / 4
    assert found.sbo_loss == 1.0
    assert found.tokens == 1_020
    assert found.seconds_left > 0


def test_meter_has_no_span_loss_where_none_is_learned() -> None:
    meter = new_meter()
    meter.add([torch.tensor(3.0), torch.tensor(2.0)], packed((8,), 3, 0))
    meter.end_step()
    found = meter.read(1, 0, 0.1, torch.tensor(2.0))
    assert (found.loss, found.mlm_loss, found.sbo_loss) == (3.0, 2.0, None)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("frozen_encoder", [False, True])
def test_meter_adds_the_work_of_every_micro_batch(
    window: int | None, *, frozen_encoder: bool
) -> None:
    config = Config(**SHAPE, attention_window=window)
    meter = new_meter(config, frozen_encoder=frozen_encoder)
    batches = [packed((8,), 1, 2), packed((9, 4, 12), 3, 0)] * 2
    for batch in batches:
        meter.add([torch.tensor(1.0)] * 3, batch)
        meter.end_step()
    found = meter.read(4, 0, 0.1, torch.tensor(2.0))
    work = sum(
        metrics.model_flops(config, batch, frozen_encoder=frozen_encoder) for batch in batches
    )
    tokens = sum(batch.num_tokens for batch in batches)
    assert found.flop_utilisation == pytest.approx(found.tokens_per_second / tokens * work / 1e9)


def test_meter_keeps_few_scalars_and_every_figure() -> None:
    meter, count = new_meter(), 600
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(count, 3, generator=generator)
    batch = packed((8,), 3, 2)
    for row in losses:
        meter.add(list(row), batch)
        meter.end_step()
        assert len(meter._losses) < 256
    found = meter.read(count, 0, 0.1, torch.tensor(2.0))
    assert (found.loss, found.mlm_loss, found.sbo_loss) == pytest.approx(
        losses.double().mean(0).tolist(), rel=1e-12
    )
    meter.add([torch.tensor(7.0)] * 3, batch)
    meter.end_step()
    assert meter.read(count + 1, 0, 0.1, torch.tensor(2.0)).loss == 7.0  # nothing is left of before


def test_flops_are_those_that_torch_counts_for_hugging_face() -> None:
    none, pieces = torch.zeros(0, dtype=torch.int64), torch.arange(24)
    every_row = dataclasses.replace(
        packed((12, 12), 1, 1),
        mlm_positions=pieces,
        mlm_labels=pieces,
        sbo_left=none,
        sbo_right=none,
        sbo_cu=torch.zeros(1, dtype=torch.int32),
        sbo_targets=none,
    )
    model = BertForMaskedLM(BertConfig(**SHAPE, attn_implementation="eager"))
    counter = FlopCounterMode(display=False)
    with counter:
        model(pieces.view(2, 12)).logits.sum().backward()
    # Torch counts no gradient of the embedding, and neither do we.
    assert metrics.model_flops(Config(**SHAPE), every_row) == counter.get_total_flops()


@pytest.mark.parametrize("window", [1, 5, 11, 40])
def test_pairs_beyond_the_window_cost_nothing(window: int) -> None:
    fields = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2}
    batch = packed((12, 3, 1), 3, 4)
    near, full = (Config(**fields, attention_window=each) for each in (window, None))
    pairs = sum(abs(i - j) > window for n in (12, 3, 1) for i in range(n) for j in range(n))
    # Two products of a forward, four of a backward, a multiply-add counted as 2.
    expected = 6 * 2 * 16 * near.num_hidden_layers * pairs
    found = metrics.model_flops(full, batch) - metrics.model_flops(near, batch)
    assert found == expected


def test_span_targets_cost_what_the_factored_head_does() -> None:
    config = Config(vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    with_spans, without = packed((12,), 3, 4), packed((12,), 3, 0)
    # Two halves once per span in both; second layer and decoder once per target.
    difference = 3 * 2 * 4 * (16 * 16 + 16 * 40)
    found = metrics.model_flops(config, with_spans) - metrics.model_flops(config, without)
    assert found == difference


def test_matmul_peak_is_a_rate_this_machine_can_have() -> None:
    found = metrics.matmul_flops_per_second(torch.device("cpu"), torch.float32)
    assert 1e8 < found < 1e14
