"""A run as it goes: a live line and lasting notes in a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from spanbert_fast.cli.render import facts, figure, new_console, quality, table
from spanbert_fast.data import options as preparing
from spanbert_fast.train import events as training

_SECONDS_BETWEEN_LINES = 10.0


class _View:
    """A bar at the bottom of the terminal and lines above it; in a pipe, lines alone."""

    def __init__(self) -> None:
        self.console = new_console()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def line(self, text: str) -> None:
        """One lasting line."""
        self.console.print(Text(text), soft_wrap=True)
        sys.stdout.flush()


class PrepareView(_View):
    """Shows the events of `prepare`: a context manager, called with each event."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = ""
        self.last_line = 0.0

    def __call__(self, event: preparing.Event) -> None:
        """Show one event."""
        if isinstance(event, preparing.Note):
            self.line(f"note: {event.text}")
            return
        if event.stage == "write":
            figures = f"{event.done:,} of {event.total:,} blocks"
        else:
            figures = f"{event.done / 1e6:,.1f} of {event.total / 1e6:,.1f} MB"
        if event.stage != self.stage or self.task is None:
            self.stage = event.stage
            self.task = self.bar.add_task(event.stage, total=event.total, figures=figures)
        self.bar.update(self.task, completed=event.done, figures=figures)
        is_due = time.monotonic() - self.last_line > _SECONDS_BETWEEN_LINES
        if not self.console.is_terminal and (is_due or event.done == event.total):
            self.last_line = time.monotonic()
            self.line(f"{event.stage}: {figures}")


class PretrainView(_View):
    """Shows the events of a pre-training run: a context manager, called with each event."""

    def __call__(self, event: training.Event) -> None:
        """Show one event."""
        match event:
            case training.RunStarted():
                self._started(event)
            case training.Progress():
                self._progress(event)
            case training.Evaluated(step=step, result=result):
                self.line(
                    f"step {step}: held-out MLM loss {figure(result.mlm_loss)}, accuracy "
                    f"{figure(result.mlm_accuracy)}; SBO loss {figure(result.sbo_loss)}, "
                    f"accuracy {figure(result.sbo_accuracy)}"
                )
            case training.Segmented():
                self.line(
                    f"step {event.step}: {event.blocks:,} blocks segmented up to step "
                    f"{event.last_step}: {event.spans_per_block:.1f} spans in each, "
                    f"{event.words_per_span:.2f} words in a span ({event.seconds:.1f} s)"
                )
            case training.CheckpointSaved(step=step, path=path, seconds=seconds):
                self.line(f"step {step}: checkpoint {path} ({seconds:.1f} s)")
            case training.CheckpointRefused(path=path, reason=reason):
                self.line(f"checkpoint refused: {path}: {reason}")
            case training.Notice(text=text):
                self.line(f"note: {text}")
            case training.ExamplesReady(examples=examples):
                self._examples(examples)
            case training.RunFinished():
                self._finished(event)

    def _started(self, event: training.RunStarted) -> None:
        facts(
            self.console,
            [
                ("output", event.output),
                ("model", f"{event.preset}, {event.num_parameters:,} parameters"),
                ("blocks", f"{event.training_blocks:,} and {event.validation_blocks:,} held out"),
                ("steps", f"{event.num_steps:,} of {event.global_batch_tokens:,} tokens"),
                ("device", f"{event.device}, {event.num_threads} threads, {event.precision}"),
                ("matmul", f"{event.matmul_flops_per_second / 1e9:,.1f} GFLOP/s, measured"),
                ("loss weights", event.weighting),
                ("resumed from", event.resumed_from or "nothing, a new run"),
            ],
            title="heads on a frozen encoder" if event.preset == "heads" else "pre-training",
        )
        self.task = self.bar.add_task(
            "", total=event.num_steps, completed=event.start_step, figures=""
        )

    def _progress(self, event: training.Progress) -> None:
        left = timedelta(seconds=round(event.seconds_left))
        place = (
            f"step {event.step}/{event.num_steps}",
            f"left {left}",
            f"{event.tokens_per_second:,.0f} tokens/s",
            f"mfu {event.flop_utilisation:.0%}",
        )
        spans = () if event.sbo_loss is None else (f"sbo {event.sbo_loss:.3f}",)
        losses = (
            f"loss {event.loss:.3f}",
            f"mlm {event.mlm_loss:.3f}",
            *spans,
            f"lr {event.learning_rate:.1e}",
        )
        if self.task is not None:
            figures = "\n".join(("  ".join(place), "  ".join(losses)))
            self.bar.update(self.task, completed=event.step, figures=figures)
        if not self.console.is_terminal:
            self.line("  ".join((place[0], *losses, *place[1:])))

    def _examples(self, examples: tuple[training.SpanExample, ...]) -> None:
        rows = [
            (f"{e.left[-30:]} ___ {e.right[:30]}", e.truth, e.mlm or "-", e.sbo or "-")
            for e in examples
        ]
        columns = ("masked span", "truth", "MLM head", "SBO head")
        table(self.console, columns, rows, title="held-out spans")

    def _finished(self, event: training.RunFinished) -> None:
        self.bar.stop()
        summary = event.summary
        if summary.evaluation is not None:
            quality(summary.evaluation)
        facts(
            self.console,
            [
                ("steps", f"{summary.steps:,}"),
                ("tokens", f"{summary.tokens:,}"),
                ("time", timedelta(seconds=round(summary.seconds))),
                ("model", summary.model),
                ("report", summary.report),
            ],
            title="finished",
        )
