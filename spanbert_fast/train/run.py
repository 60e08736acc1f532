"""A run: everything the loop holds, built from settings or restored from a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spanbert_fast.data.loader import Step, StepLoader
from spanbert_fast.data.target_weights import TargetWeights
from spanbert_fast.model.outputs import SpanBertOutput
from spanbert_fast.model.pretrained import Model
from spanbert_fast.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_valid_checkpoint,
    load_checkpoint,
    random_state,
    restore_random_state,
)
from spanbert_fast.train.events import CheckpointRefused, Event, RunStarted
from spanbert_fast.train.exactness import check_exactness
from spanbert_fast.train.finiteness import LossScale
from spanbert_fast.train.initial import build_model
from spanbert_fast.train.machine import (
    autocast_dtype,
    choose_device,
    choose_precision,
    environment,
)
from spanbert_fast.train.metrics import Meter, MetricsLog, matmul_flops_per_second
from spanbert_fast.train.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from spanbert_fast.train.options import Settings
from spanbert_fast.train.segmenting import SpanPeriods
from spanbert_fast.train.source import Source, open_source


@dataclass(kw_only=True)
class Run:
    """State of a run. Its step is the loop's."""

    settings: Settings
    source: Source
    device: torch.device
    precision: str
    model: Model
    forward: Callable[..., SpanBertOutput]
    """`model.forward_packed`, compiled if the user wants that."""
    optimizer: torch.optim.AdamW
    scale: LossScale
    log: MetricsLog
    meter: Meter
    start_step: int
    """Steps that a checkpoint has done."""
    environment: dict[str, Any]
    """What must be equal for a resumed run to be equal bit by bit."""
    row_weights: TargetWeights | None
    """Gives the targets of a batch their weights; None: every target weighs 1."""
    periods: SpanPeriods | None = None
    """Predicted spans, if the scheme is `segments`."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.settings.output / "checkpoints"

    @property
    def has_held_out_blocks(self) -> bool:
        """Whether evaluation is possible and wanted."""
        return self.settings.eval_every > 0

    def steps(self) -> Iterator[Step]:
        """The steps that are left; a function of settings and data alone.

        With the scheme `segments` also of the model as it is whenever a period of steps begins.
        """
        masker = self.source.masker(
            seed=self.settings.seed,
            max_span_targets=self.model.config.max_span_targets,
            settings=self.settings.masking,
        )
        step, stop = self.start_step, self.settings.steps
        while step < stop:
            chooser, end = self.periods.enter(step, masker) if self.periods else (masker, stop)
            with StepLoader(
                self.source.shards,
                "train",
                chooser,
                seed=self.settings.seed,
                global_batch_tokens=self.settings.global_batch_tokens,
                num_micro_batches=self.settings.micro_batches,
                start_step=step,
                stop_step=end,
                pin_memory=self.device.type == "cuda",
                row_weights=self.row_weights,
                with_spans=self.learns_spans,
            ) as loader:
                yield from loader
            step = end

    @functools.cached_property
    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of a forward pass: one context, to be entered again and again."""
        dtype = autocast_dtype(self.precision)
        if dtype == torch.float32 and not torch.is_autocast_enabled(self.device.type):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    @functools.cached_property
    def learns_spans(self) -> bool:
        """Whether the span boundary head is trained. A weight of 0 drops its targets.

        The head meets no row then, and still has a gradient, of zeros, so that optimizer and
        checkpoints hold the same tensors.
        """
        return self.model.config.sbo_weight > 0

    def checkpoint_content(self) -> dict[str, Any]:
        """Arguments of `save_checkpoint` that hold the state of the run."""
        named = list(self.model.named_parameters())
        return {
            "weights": dict(named),
            "optimizer": optimizer_tensors(self.optimizer, named),
            "state": {
                "settings": self.settings.as_json(),
                "environment": self.environment,
                "random": random_state(),
                "scale": self.scale.state(),
                "tokens": self.meter.tokens,
                "untrained_heads": self.model.config.untrained_heads,
                "spans": self.periods.state if self.periods else None,
            },
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put back weights, optimizer, generators and loss scale.

        Raises:
            CheckpointError: The checkpoint is of a model of another shape.
        """
        named = dict(self.model.named_parameters())
        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in named.items()}:
            raise CheckpointError("the checkpoint is of a model of another shape")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(checkpoint.weights[name])
        load_optimizer_tensors(self.optimizer, named.items(), checkpoint.optimizer)
        restore_random_state(checkpoint.state["random"])
        self.scale.restore(checkpoint.state["scale"])
        self.model.config.untrained_heads = checkpoint.state["untrained_heads"]


def build_run(
    settings: Settings, emit: Callable[[Event], None], *, allow_inexact_resume: bool
) -> Run:
    """A run that is ready for its next step.

    Args:
        settings: What the user chose.
        emit: Gets what should be known before the first step.
        allow_inexact_resume: Continue even where that cannot give the same bits.

    Raises:
        ValueError: The settings do not fit the data, or the run in the output folder.
    """
    source = open_source(settings.data)
    _check_held_out_blocks(settings, source)
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    surroundings = environment(device, precision) | {"data": source.shards.manifest_hash}
    found = latest_valid_checkpoint(
        settings.output / "checkpoints",
        on_refused=lambda path, reason: emit(CheckpointRefused(path=path, reason=reason)),
    )
    checkpoint = load_checkpoint(found) if found else None
    weights = source.row_weights(settings.weighting, settings.masking)
    if weights is not None:
        surroundings["mean_loss_weight"] = weights.mean
    if checkpoint:
        check_exactness(settings, surroundings, checkpoint, emit, allow=allow_inexact_resume)
    torch.manual_seed(settings.seed)
    model = build_model(settings, source)
    model.to(device)  # type: ignore[arg-type]
    peak = matmul_flops_per_second(device, autocast_dtype(precision))
    start_step = checkpoint.step if checkpoint else 0
    forward = model.forward_packed
    run = Run(
        settings=settings,
        source=source,
        device=device,
        precision=precision,
        model=model,
        forward=torch.compile(forward, dynamic=True) if settings.compile else forward,
        optimizer=build_optimizer(
            model, weight_decay=settings.weight_decay, reference=settings.reference_optimizer
        ),
        scale=LossScale(device, enabled=precision == "fp16"),
        log=MetricsLog(settings.output, last_step=start_step),
        meter=_meter(settings, model, checkpoint, peak),
        start_step=start_step,
        environment=surroundings,
        row_weights=weights,
    )
    try:
        _take_up(run, checkpoint, emit, allow_inexact=allow_inexact_resume)
    except CheckpointError:
        run.log.close()
        raise
    _write_description(run)
    emit(_started(run, found, peak))
    return run


def _meter(settings: Settings, model: Model, checkpoint: Checkpoint | None, peak: float) -> Meter:
    return Meter(
        model.config,
        frozen_encoder=settings.freeze_encoder,
        num_steps=settings.steps,
        start_step=checkpoint.step if checkpoint else 0,
        start_tokens=checkpoint.state["tokens"] if checkpoint else 0,
        peak=peak,
    )


def _take_up(
    run: Run,
    checkpoint: Checkpoint | None,
    emit: Callable[[Event], None],
    *,
    allow_inexact: bool,
) -> None:
    """Bring a new run to where its next step begins."""
    settings, model = run.settings, run.model
    if checkpoint:
        run.restore(checkpoint)
    if settings.segment_every:
        run.periods = SpanPeriods(settings, run.source, model, lambda: run.autocast, run.log, emit)
        if checkpoint:
            spans = checkpoint.state.get("spans")
            run.periods.restore(checkpoint.step, spans, allow=allow_inexact)
    model.train()
    if settings.freeze_encoder:
        # The hidden states that the heads will meet in use: no dropout.
        model.bert.train(False)


def _check_held_out_blocks(settings: Settings, source: Source) -> None:
    if settings.eval_every and not source.shards.num_blocks("validation"):
        raise ValueError(
            f"{settings.data} has no held-out blocks; prepare it with a larger "
            "--validation-permille, or choose --eval-every 0"
        )


def _write_description(run: Run) -> None:
    values = {
        "settings": run.settings.as_json(),
        "environment": run.environment,
        "model": run.model.config.to_dict(),
    }
    path = run.settings.output / "run.json"
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _started(run: Run, found: Path | None, peak: float) -> RunStarted:
    return RunStarted(
        output=run.settings.output,
        preset=run.settings.preset,
        resumed_from=found,
        start_step=run.start_step,
        num_steps=run.settings.steps,
        num_parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        global_batch_tokens=run.settings.global_batch_tokens,
        training_blocks=run.source.shards.num_blocks("train"),
        validation_blocks=run.source.shards.num_blocks("validation"),
        precision=run.precision,
        device=run.device.type,
        num_threads=torch.get_num_threads(),
        matmul_flops_per_second=peak,
        weighting=str(run.settings.weighting),
    )
