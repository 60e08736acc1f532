"""Row 16: share of a pre-training step spent outside forward, backward and optimizer.

The demo's text, prepared and pre-trained as a user would. A step lasts from one setting of the
learning rate to the next, so that waiting for data is in it; clipping belongs to the optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_prepare import DEMO
from pytest_benchmark.fixture import BenchmarkFixture
from records import Record
from timing import NAMES, command_of, name_of
from workload import Setting

from spanbert_fast import Model
from spanbert_fast.data.prepare import PrepareOptions, prepare
from spanbert_fast.train import pretrain as loop
from spanbert_fast.train.options import PretrainOptions

WARMUP = 5


def test_pretraining(
    benchmark: BenchmarkFixture,
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_steps = WARMUP + 3 if setting.is_smoke else 200
    data = tmp_path / "data"
    prepare(
        PrepareOptions(
            input=(str(DEMO),), output=data, train_tokenizer=True, vocab_size=2000, workers=1
        )
    )
    marks: list[tuple[float, float]] = []
    inside = 0.0

    def timed(function: Callable) -> Callable:
        def call(*arguments, **named):
            nonlocal inside
            begun = time.perf_counter()
            value = function(*arguments, **named)
            inside += time.perf_counter() - begun
            return value

        return call

    def mark(*arguments) -> None:
        marks.append((time.perf_counter(), inside))
        set_rate(*arguments)

    set_rate = loop.set_learning_rate
    monkeypatch.setattr(loop, "set_learning_rate", mark)
    monkeypatch.setattr(loop, "step_unless", timed(loop.step_unless))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", timed(torch.nn.utils.clip_grad_norm_))
    monkeypatch.setattr(torch.Tensor, "backward", timed(torch.Tensor.backward))
    monkeypatch.setattr(Model, "forward_packed", timed(Model.forward_packed))
    options = PretrainOptions(
        data=data,
        output=tmp_path / "run",
        preset="tiny",
        steps=num_steps,
        warmup_steps=WARMUP,
        eval_every=0,
    )
    benchmark.pedantic(lambda: loop.pretrain(options), rounds=1)
    wall, worked = np.diff(np.array(marks), axis=0)[WARMUP:].T
    assert len(wall) == num_steps - 1 - WARMUP
    assert (worked > 0).all()
    assert (worked <= wall).all()
    share = 100 * (1 - worked / wall)
    low, middle, high = np.percentile(share, [20, 50, 80])
    setting.records.append(
        Record(
            case=name_of(benchmark),
            rows=("16",),
            workload="the demo's text",
            peer="share outside forward, backward, optimizer, %",
            dtype=NAMES[torch.float32],
            model="preset tiny",
            unit="s a step",
            command=command_of(benchmark),
            threads=torch.get_num_threads(),
            ratio=float(100 * (1 - worked.sum() / wall.sum())),
            ratio_20=float(low),
            ratio_80=float(high),
            ours_seconds=float(np.median(wall)),
            peer_seconds=float(np.median(worked)),
        )
    )
    assert 0 <= middle < 100
