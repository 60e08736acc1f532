"""What the commands print: tables in a terminal, plain lines in a pipe, JSON where asked for."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from spanbert_fast.convert.departure import Written
    from spanbert_fast.convert.folder import Conversion
    from spanbert_fast.data.options import PrepareSummary
    from spanbert_fast.diagnose.folders import ShowReport, VerifyReport
    from spanbert_fast.diagnose.machine import DoctorReport
    from spanbert_fast.diagnose.warmup import WarmupReport
    from spanbert_fast.tasks.fill import FilledSpan
    from spanbert_fast.train.events import EvaluationResult

_PIPE_WIDTH = 160
_TALLY = ("documents", "sentences", "tokens", "blocks", "cut_sentences")


def new_console() -> Console:
    """A console on the standard output; lines of a pipe are not cut at 80 columns."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def to_json(value: Any) -> Any:
    """Dataclasses, named tuples and paths as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return to_json(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def print_json(value: Any) -> None:
    """One JSON document on the standard output."""
    sys.stdout.write(json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n")


def table(
    console: Console,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    numbers: int = 0,
) -> None:
    """Print a table; its last `numbers` columns are aligned to the right. Cells are no markup."""
    lines = [list(map(str, row)) for row in rows]
    if not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
        sys.stdout.write(f"{title}\n" if title else "")
        for line in (columns, *lines):
            cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
            for index in range(len(columns) - numbers, len(columns)):
                cells[index] = line[index].rjust(widths[index])
            sys.stdout.write("  ".join(cells).rstrip() + "\n")
        return
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    shown = Table(header_style="bold")
    for index, column in enumerate(columns):
        is_number = index >= len(columns) - numbers
        shown.add_column(column, justify="right" if is_number else "left")
    for line in lines:
        shown.add_row(*map(Text, line))
    console.print(shown)


def facts(console: Console, values: Iterable[tuple[str, object]], *, title: str = "") -> None:
    """Print names and values, one per line."""
    lines = [
        (name, json.dumps(to_json(value)) if isinstance(value, list | dict) else str(value))
        for name, value in values
    ]
    width = max((len(name) for name, _ in lines), default=0)
    if title:
        console.print(Text(title, style="bold"))
    for name, value in lines:
        line = Text(f"  {name:<{width}}  ", style="dim").append(value, style="not dim")
        console.print(line, soft_wrap=True)


def filled(texts: Sequence[str], found: Sequence[Sequence[FilledSpan]], as_json: bool) -> None:
    """The candidates of `fill_span`, each in its surroundings."""
    if as_json:
        print_json(found)
        return
    console = new_console()
    for spans in found:
        first = spans[0]
        text = texts[first.text_index]
        where = f"text {first.text_index + 1}, characters {first.start} to {first.end}"
        rows = [
            (
                rank,
                span.text,
                span.head,
                f"{span.log_probability:.3f}",
                " ".join(f"{probability:.3f}" for probability in span.token_probabilities),
            )
            for rank, span in enumerate(spans, 1)
        ]
        context = text[max(0, first.start - 40) : first.end + 40]
        table(
            console,
            ("", "span", "head", "log p", "p of each token"),
            rows,
            title=f"{where}: {context}",
            numbers=2,
        )


def figure(value: float | None, digits: int = 4) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def evaluation(result: EvaluationResult, as_json: bool) -> None:
    """All that an evaluation found."""
    if as_json:
        print_json(result)
        return
    quality(result)
    console = new_console()
    for name, buckets in (
        ("offset in span", result.sbo_by_offset),
        ("span length", result.sbo_by_span_length),
    ):
        rows = [(str(b.value), b.targets, figure(b.loss), figure(b.accuracy)) for b in buckets]
        if rows:
            title = f"SBO by {name}"
            table(console, (name, "targets", "loss", "accuracy"), rows, title=title, numbers=3)


def quality(result: EvaluationResult) -> None:
    """Losses and accuracies beside what needs no model."""
    console, base = new_console(), result.baselines
    rows = [
        ("MLM", result.mlm_targets, figure(result.mlm_loss), figure(result.mlm_accuracy)),
        ("SBO", result.sbo_targets, figure(result.sbo_loss), figure(result.sbo_accuracy)),
        ("unigram law", result.mlm_targets, figure(base.unigram_cross_entropy), ""),
        (
            f"always {base.majority_token!r}",
            result.mlm_targets,
            "",
            figure(base.majority_accuracy),
        ),
    ]
    title = f"{result.blocks:,} blocks, {result.tokens:,} tokens; loss in nats"
    table(console, ("", "targets", "loss", "accuracy"), rows, title=title, numbers=3)


def prepared(summary: PrepareSummary) -> None:
    """The closing line of `prepare`, and where the shards are."""
    console = new_console()
    console.print(Text(summary.closing_line()), soft_wrap=True)
    rows = [
        (name, *(f"{getattr(tally, column):,}" for column in _TALLY))
        for name, tally in vars(summary.counts).items()
    ]
    columns = ("", *(name.replace("_", " ") for name in _TALLY))
    table(console, columns, rows, numbers=len(_TALLY))
    facts(
        console,
        [
            ("shards", summary.output),
            ("tokenized by", summary.engine),
            ("input", f"{summary.input_bytes / 1e6:,.1f} MB"),
            ("time", f"{summary.seconds:.1f} s"),
            ("parts done earlier", summary.resumed_parts),
        ],
    )


def converted(done: Conversion | Written, as_json: bool) -> None:
    """What became of a foreign checkpoint, or of a folder that leaves."""
    if as_json:
        print_json(done)
        return
    facts(
        new_console(),
        [
            ("written", done.output),
            ("parameters", f"{done.num_parameters:,}"),
            *done.remarks,
        ],
        title=f"{done.source}",
    )


def doctor(report: DoctorReport, as_json: bool) -> None:
    """Versions, hardware, backends and the self-test."""
    if as_json:
        print_json(report)
        return
    console = new_console()
    facts(console, report.versions.items(), title="versions")
    facts(console, report.machine.items(), title="machine")
    table(
        console,
        ("op", "backend", "why"),
        [(choice.op, choice.backend, choice.reason) for choice in report.backends],
        title="backends",
    )
    _checks(console, "self-test", report.checks)


def warmed(report: WarmupReport, as_json: bool) -> None:
    """Every kernel with its variants, the totals, and where they are."""
    if as_json:
        print_json(report)
        return
    console = new_console()
    rows = [
        (f"sm_{k.arch}", k.kernel, k.compiled + k.cached, k.compiled, k.cached, f"{k.seconds:.1f}")
        for k in report.kernels
    ]
    columns = ("for", "kernel", "variants", "compiled", "cached", "seconds")
    title = "fp32" if report.precision == "fp32" else f"{report.precision} and fp32"
    table(console, columns, rows, title=title, numbers=4)
    facts(
        console,
        [
            ("compiled", report.compiled),
            ("cached", report.cached),
            ("time", f"{report.seconds:.1f} s"),
            ("directory", report.directory),
        ],
        title="total",
    )


def verified(report: VerifyReport, as_json: bool) -> None:
    """Every check of a folder, and the verdict."""
    if as_json:
        print_json({**to_json(report), "is_intact": report.is_intact})
        return
    console = new_console()
    _checks(console, f"{report.path}: {report.kind}", report.checks)
    console.print("intact" if report.is_intact else "DAMAGED")


def _checks(console: Console, title: str, checks: Iterable[Any]) -> None:
    rows = [("ok" if check.passed else "FAILED", check.name, check.detail) for check in checks]
    table(console, ("", "check", "result"), rows, title=title)


def shown(report: ShowReport, as_json: bool) -> None:
    """What a folder holds and how it was made."""
    if as_json:
        print_json(report)
        return
    console = new_console()
    console.print(Text(f"{report.path}: {report.kind}", style="bold"))
    for title, values in report.sections.items():
        facts(console, values.items(), title=title)
