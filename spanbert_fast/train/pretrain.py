"""The pre-training loop: `_train` is what happens, top to bottom; the rest ends a run."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch
from spanbert_fast.data.loader import Step
from spanbert_fast.train.checkpoint import save_checkpoint
from spanbert_fast.train.evaluate import evaluate_model
from spanbert_fast.train.events import (
    CheckpointSaved,
    Evaluated,
    EvaluationResult,
    Event,
    ExamplesReady,
    PretrainSummary,
    RunFinished,
    SpanExample,
)
from spanbert_fast.train.finiteness import FinitenessGuard, NonFiniteError
from spanbert_fast.train.machine import machine_settings, only_user
from spanbert_fast.train.metrics import read_metrics
from spanbert_fast.train.model_card import save_model
from spanbert_fast.train.optim import (
    forget_gradients,
    learning_rate,
    set_learning_rate,
    step_unless,
)
from spanbert_fast.train.options import PretrainOptions, Settings, resolve
from spanbert_fast.train.report import draw_report, span_examples, write_examples
from spanbert_fast.train.run import Run, build_run

Emit = Callable[[Event], None]


def pretrain(options: PretrainOptions, *, on_event: Emit | None = None) -> PretrainSummary:
    """Pre-train a model, or continue the run that stands in the output folder.

    The folder gets `checkpoints/`, `model/` (loads with `sf.Model.from_pretrained` and in plain
    transformers), `metrics.jsonl`, `tensorboard/`, `report.png`, `examples.json` and `run.json`.
    A run that was killed at any moment and continued ends with the same bits as one that was not,
    on the same machine with the same versions and number of threads.

    Args:
        options: What the user chose.
        on_event: Called in this thread with what happens.

    Raises:
        ValueError: An option is missing or out of range, or the run in the output folder was
            started with other settings, versions or data.
        NonFiniteError: The loss or the gradient of a step is not finite; `failure.json` has all
            example ids.
        OSError: The disk is full or fails; the last checkpoint is intact.
    """
    settings, allow_inexact = resolve(options)
    return train(settings, allow_inexact_resume=allow_inexact, on_event=on_event)


def train(
    settings: Settings, *, allow_inexact_resume: bool, on_event: Emit | None
) -> PretrainSummary:
    """What `pretrain` does, with nothing left open."""
    begun = time.perf_counter()
    emit = on_event or (lambda event: None)
    with only_user(settings.output), machine_settings(settings.threads):
        run = build_run(settings, emit, allow_inexact_resume=allow_inexact_resume)
        with contextlib.closing(run.log):
            try:
                evaluation = _train(run, emit)
            except NonFiniteError as error:
                _write_failure(run, error)
                raise
            summary = _finish(run, emit, evaluation, begun)
    emit(RunFinished(summary=summary))
    return summary


def _train(run: Run, emit: Emit) -> EvaluationResult | None:
    """All steps that are left; the evaluation after the last one."""
    settings, meter, guard = run.settings, run.meter, FinitenessGuard()
    parameters = list(run.model.parameters())
    evaluation = None
    for step in run.steps():
        done = step.step + 1
        rate = learning_rate(
            step.step,
            peak=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            steps=settings.steps,
        )
        set_learning_rate(run.optimizer, rate)
        seed = dropout_seed(settings.seed, step.step).to(run.device)
        losses = [_learn(run, step, batch, seed) for batch in step.micro_batches]
        run.scale.divide(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        guard.check()  # of the step before: the host never waits for the one it has just launched
        skip = guard.judge(
            done,
            losses,
            norm,
            [batch.sequence_ids for batch in step.micro_batches],
            may_overflow=run.scale.may_overflow,
        )
        step_unless(run.optimizer, skip)
        run.scale.update(skip)
        forget_gradients(parameters)
        meter.end_step()

        is_last = done == settings.steps
        saves = is_last or done % settings.save_every == 0
        evaluates = settings.eval_every > 0 and (is_last or done % settings.eval_every == 0)
        if saves or evaluates or done % settings.log_every == 0:
            guard.check()  # nothing that is written may come after a bad step
            progress = meter.read(done, step.epoch, rate, norm)
            run.log.progress(progress)
            emit(progress)
        if evaluates or saves:
            with meter.paused():
                if evaluates:
                    evaluation = _evaluate(run, emit, done)
                    run.log.evaluation(done, evaluation)
                if saves:
                    _save(run, emit, done)
    return evaluation


def _learn(run: Run, step: Step, batch: PackedBatch, seed: Tensor) -> Tensor:
    """The loss of a micro-batch, detached; its gradient is added to the parameters'."""
    with run.autocast:
        output = run.forward(
            batch.to(run.device, non_blocking=True),
            dropout_seed=seed,
            num_sbo_items=sum(len(part.sbo_targets) for part in step.micro_batches),
        )
    assert output.loss is not None
    run.scale.multiply(output.loss).backward()  # type: ignore[no-untyped-call]
    loss = output.loss.detach()
    means = (output.mlm_loss, output.sbo_loss if run.learns_spans else None)
    run.meter.add([loss, *(mean for mean in means if mean is not None)], batch)
    return loss


def dropout_seed(seed: int, step: int) -> Tensor:
    """Key of the dropout masks of a step: 0-dim int64, a hash of (seed, step).

    The same for all micro-batches: sequences are told apart by their ids, so that the way a step
    is split does not change a mask.
    """
    word = (seed * 0x9E3779B97F4A7C15 + step) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = ((word ^ (word >> shift)) * factor) & (2**64 - 1)
    return torch.full((), (word ^ (word >> 31)) >> 1)


def _evaluate(run: Run, emit: Emit, step: int) -> EvaluationResult:
    result = evaluate_model(
        run.model,
        run.source,
        run.source.evaluation_batches(
            "validation",
            max_span_targets=run.model.config.max_span_targets,
            max_blocks=run.settings.eval_blocks,
        ),
    )
    emit(Evaluated(step=step, num_steps=run.settings.steps, result=result))
    return result


def _save(run: Run, emit: Emit, step: int) -> None:
    begun = time.perf_counter()
    run.log.sync()
    path = save_checkpoint(
        run.checkpoints, step, keep=run.settings.keep_checkpoints, **run.checkpoint_content()
    )
    emit(CheckpointSaved(step=step, path=path, seconds=time.perf_counter() - begun))


def _write_failure(run: Run, error: NonFiniteError) -> None:
    values = {"step": error.step, "what": error.what, "example_ids": error.example_ids}
    path = run.settings.output / "failure.json"
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")


def _finish(
    run: Run, emit: Emit, evaluation: EvaluationResult | None, begun: float
) -> PretrainSummary:
    """Write what is looked at after a run: model with card, examples and report."""
    settings, output = run.settings, run.settings.output
    metrics = read_metrics(output / "metrics.jsonl")
    if evaluation is None and settings.eval_every:  # a finished run was started once more
        evaluation = _evaluate(run, emit, settings.steps)
    examples: tuple[SpanExample, ...] = ()
    if evaluation is not None:
        batches = run.source.evaluation_batches(
            "validation", max_span_targets=run.model.config.max_span_targets
        )
        batch = next(batches).to(run.device)
        examples = span_examples(run.model, run.source.tokenizer, batch)
        emit(ExamplesReady(examples=examples))
    write_examples(examples, output / "examples.json")
    title = f"{settings.preset} on {settings.data.name}"
    if not settings.weighting.is_uniform:
        title += f"; loss weights: {settings.weighting}"
    draw_report(metrics, output / "report.png", title)
    model = save_model(run, evaluation)
    return PretrainSummary(
        output=output,
        model=model,
        report=output / "report.png",
        steps=settings.steps,
        tokens=run.meter.tokens,
        seconds=time.perf_counter() - begun,
        evaluation=evaluation,
    )
