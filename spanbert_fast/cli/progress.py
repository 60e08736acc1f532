"""A run as it goes: a live line and lasting notes in a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from spanbert_fast.cli.render import evaluation, facts, new_console, table
from spanbert_fast.train.events import (
    CheckpointRefused,
    CheckpointSaved,
    Evaluated,
    Event,
    ExamplesReady,
    Notice,
    Progress,
    RunFinished,
    RunStarted,
    SpanExample,
)


class PretrainView:
    """Shows the events of a pre-training run: a context manager, called with each event."""

    def __init__(self) -> None:
        self.console = new_console()
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
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

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case RunStarted():
                self._started(event)
            case Progress():
                self._progress(event)
            case Evaluated(step=step, result=result):
                self._line(
                    f"step {step}: held-out MLM loss {_figure(result.mlm_loss)}, accuracy "
                    f"{_figure(result.mlm_accuracy)}; SBO loss {_figure(result.sbo_loss)}, "
                    f"accuracy {_figure(result.sbo_accuracy)}"
                )
            case CheckpointSaved(step=step, path=path, seconds=seconds):
                self._line(f"step {step}: checkpoint {path} ({seconds:.1f} s)")
            case CheckpointRefused(path=path, reason=reason):
                self._line(f"checkpoint refused: {path}: {reason}")
            case Notice(text=text):
                self._line(f"note: {text}")
            case ExamplesReady(examples=examples):
                self._examples(examples)
            case RunFinished():
                self._finished(event)

    def _line(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def _started(self, event: RunStarted) -> None:
        facts(
            self.console,
            [
                ("output", event.output),
                ("model", f"{event.preset}, {event.num_parameters:,} parameters"),
                ("blocks", f"{event.training_blocks:,} and {event.validation_blocks:,} held out"),
                ("steps", f"{event.num_steps:,} of {event.global_batch_tokens:,} tokens"),
                ("device", f"{event.device}, {event.num_threads} threads, {event.precision}"),
                ("matmul", f"{event.matmul_flops_per_second / 1e9:,.1f} GFLOP/s, measured"),
                ("resumed from", event.resumed_from or "nothing, a new run"),
            ],
            title="pre-training",
        )
        self.task = self.bar.add_task(
            "step", total=event.num_steps, completed=event.start_step, figures=""
        )

    def _progress(self, event: Progress) -> None:
        left = timedelta(seconds=round(event.seconds_left))
        figures = (
            f"loss {event.loss:.3f}  mlm {event.mlm_loss:.3f}  sbo {event.sbo_loss:.3f}  "
            f"{event.tokens_per_second:,.0f} tokens/s  mfu {event.flop_utilisation:.0%}  "
            f"left {left}"
        )
        if self.task is not None:
            self.bar.update(self.task, completed=event.step, figures=figures)
        if not self.console.is_terminal:
            self._line(f"step {event.step}/{event.num_steps}  {figures}")
            sys.stdout.flush()

    def _examples(self, examples: tuple[SpanExample, ...]) -> None:
        rows = [
            (f"{e.left[-30:]} ___ {e.right[:30]}", e.truth, e.mlm or "-", e.sbo or "-")
            for e in examples
        ]
        columns = ("masked span", "truth", "MLM head", "SBO head")
        table(self.console, columns, rows, title="held-out spans")

    def _finished(self, event: RunFinished) -> None:
        self.bar.stop()
        summary = event.summary
        if summary.evaluation is not None:
            evaluation(summary.evaluation, as_json=False)
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


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
