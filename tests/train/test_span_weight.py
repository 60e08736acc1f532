"""A run whose span boundary objective weighs nothing: no row is spent on it, and it says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spanbert_fast as sf
from spanbert_fast.model.heads import SpanBoundary
from spanbert_fast.model.targets import without_spans
from spanbert_fast.train.events import CheckpointSaved, Event, Progress
from spanbert_fast.train.machine import machine_settings
from spanbert_fast.train.options import PretrainOptions, resolve
from spanbert_fast.train.pretrain import pretrain
from spanbert_fast.train.run import Run, build_run

MakeOptions = Callable[..., PretrainOptions]


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def unweighted(options: MakeOptions, output: Path, **changes: Any) -> PretrainOptions:
    model = {**(options(output).model or {}), "sbo_weight": 0.0}
    return options(output, **({"model": model, "micro_batches": 2} | changes))


def build(options: PretrainOptions) -> Run:
    settings, _ = resolve(options)
    settings.output.mkdir(parents=True)
    with machine_settings(1):
        return build_run(settings, lambda event: None, allow_inexact_resume=False)


def gradients(run: Run, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    output = run.model.forward_packed(batch, dropout_seed=torch.tensor(5))
    output.loss.backward()
    found = {name: parameter.grad for name, parameter in run.model.named_parameters()}
    run.model.zero_grad()
    return output.loss.detach(), found


def test_the_head_meets_no_row_and_no_figure_is_told(
    options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = SpanBoundary.forward

    def counted(self: SpanBoundary, hidden: torch.Tensor, spans: Any) -> torch.Tensor:
        rows.append(len(spans.targets))
        return forward(self, hidden, spans)

    monkeypatch.setattr(SpanBoundary, "forward", counted)
    events: list[Event] = []
    output = tmp_path / "run"
    summary = pretrain(unweighted(options, output, eval_every=0), on_event=events.append)
    assert rows
    assert set(rows) == {0}
    told = [event for event in events if isinstance(event, Progress)]
    assert [event.sbo_loss for event in told] == [None] * 6
    assert all(event.loss > 0 and event.mlm_loss > 0 for event in told)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["sbo_loss"] for line in lines] == [None] * 6
    assert summary.report.stat().st_size > 0


def test_the_head_stays_listed_as_untrained(options: MakeOptions, tmp_path: Path) -> None:
    summary = pretrain(unweighted(options, tmp_path / "run"))
    assert summary.evaluation is not None
    assert summary.evaluation.mlm_loss is not None
    assert (summary.evaluation.sbo_loss, summary.evaluation.sbo_accuracy) == (None, None)
    assert sf.Config.from_pretrained(summary.model).untrained_heads == ["sbo"]


def test_loss_and_gradients_are_those_with_a_head_that_weighs_nothing(
    options: MakeOptions, tmp_path: Path
) -> None:
    run = build(unweighted(options, tmp_path / "run"))
    step = next(iter(run.steps()))
    run.model.config.sbo_weight = 1.0  # the same loader with spans: what the step would have had
    del run.__dict__["learns_spans"]
    full = next(iter(run.steps()))
    run.model.config.sbo_weight = 0.0
    run.log.close()
    for bare, batch in zip(step.micro_batches, full.micro_batches, strict=True):
        assert len(batch.sbo_targets) > 0
        assert torch.equal(without_spans(batch).sbo_cu, bare.sbo_cu)
        (loss, found), (other, expected) = gradients(run, bare), gradients(run, batch)
        torch.testing.assert_close(loss, other)
        for name, gradient in expected.items():
            # Of zeros, never absent: optimizer and data-parallel wrappers meet every parameter.
            assert found[name] is not None, name
            torch.testing.assert_close(found[name], gradient)
            if "span_boundary" in name:
                assert not found[name].any()


def test_it_resumes_to_the_bit(options: MakeOptions, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(unweighted(options, whole))

    def stop(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        pretrain(unweighted(options, parts), on_event=stop)
    pretrain(unweighted(options, parts))
    first, second = (load_file(path / "model" / "model.safetensors") for path in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    names = load_file(whole / "checkpoints" / "step-0000012" / "optimizer.safetensors")
    assert any("span_boundary" in name for name in names)
    assert sf.Config.from_pretrained(parts / "model").untrained_heads == ["sbo"]


def test_a_model_alone_still_tells_the_loss(options: MakeOptions, tmp_path: Path) -> None:
    run = build(unweighted(options, tmp_path / "run"))
    run.log.close()
    batches = run.source.evaluation_batches("validation", max_span_targets=15)
    run.model.eval()
    output = run.model.forward_packed(next(batches))
    assert output.sbo_loss is not None
    assert output.sbo_loss > 1
    torch.testing.assert_close(output.loss, output.mlm_loss)
