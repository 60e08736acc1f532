"""The commands: each calls the room that does the work, and renders what it returns.

Nothing heavy is imported before a command needs it, so that help and mistakes answer at once.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spanbert_fast.cli.arguments import Command
from spanbert_fast.cli.run_export import run_export

FAILURE = 1
"""Status of a command that ran and found something wrong."""


def _run_prepare(options: Any, _as_json: bool) -> int:
    from spanbert_fast.cli import render
    from spanbert_fast.cli.progress import PrepareView
    from spanbert_fast.data.prepare import prepare

    with PrepareView() as view:
        summary = prepare(options, on_event=view)
    render.prepared(summary)
    return 0


def _run_pretrain(options: Any, _as_json: bool) -> int:
    from spanbert_fast.train.pretrain import pretrain

    return _show_training(pretrain, options)


def _run_fit_heads(options: Any, _as_json: bool) -> int:
    from spanbert_fast.train.fit_heads import fit_heads

    return _show_training(fit_heads, options)


def _show_training(train: Callable[..., object], options: Any) -> int:
    from spanbert_fast.cli.progress import PretrainView

    _hide_progress_bars()
    _check_name(options.init)
    with PretrainView() as view:
        train(options, on_event=view)
    return 0


def _run_evaluate(options: Any, as_json: bool) -> int:
    from spanbert_fast.cli import render
    from spanbert_fast.train.evaluate import evaluate

    _hide_progress_bars()
    _check_name(options.model)
    render.evaluation(evaluate(options), as_json)
    return 0


def _run_fill(options: Any, as_json: bool) -> int:
    from spanbert_fast.cli import render
    from spanbert_fast.data.tokenizer import load_tokenizer
    from spanbert_fast.model.pretrained import Model
    from spanbert_fast.tasks.fill import fill_span
    from spanbert_fast.tasks.options import chosen_windows

    _hide_progress_bars()
    _check_name(options.model)
    texts = list(options.text) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("no text was given, neither as an argument nor on the standard input")
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    found = fill_span(
        Model.from_pretrained(options.model),
        tokenizer,
        texts,
        top_k=options.top_k,
        head=options.head,
        length=options.length,
        allow_untrained_heads=options.allow_untrained_heads,
        windows=chosen_windows(options),
    )
    render.filled(texts, found, as_json)
    return 0


def _run_segment(options: Any, as_json: bool) -> int:
    from spanbert_fast.cli.run_segment import run_segment

    _hide_progress_bars()
    _check_name(options.model)
    return run_segment(options, as_json)


def _run_convert(options: Any, as_json: bool) -> int:
    from spanbert_fast.cli import render
    from spanbert_fast.convert.run import convert

    _hide_progress_bars()
    vocab = options.vocab
    beside = options.source if options.source.is_dir() else options.source.parent
    if vocab is None and options.source_format in ("hf", "tensorflow"):
        vocab = str(beside) if (beside / "vocab.txt").is_file() else None
    tokenizer = None if vocab is None else _load_vocabulary(vocab)
    render.converted(convert(options, tokenizer=tokenizer), as_json)
    return 0


def _load_vocabulary(name: str) -> Any:
    """The tokenizer of a `vocab.txt`, a folder or a hub repository."""
    from spanbert_fast.data.tokenizer import load_tokenizer

    if not Path(name).is_file():
        return load_tokenizer(name)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(name, Path(folder) / "vocab.txt")
        return load_tokenizer(folder)


def _check_name(name: str | None) -> None:
    """Raises FileNotFoundError if `name` can only be a folder, by its form, and there is none."""
    is_path = name is not None and (name.startswith((".", os.sep)) or name.count("/") > 1)
    if is_path and not os.path.isdir(name or ""):
        raise FileNotFoundError(f"no such folder: {name}")


def _hide_progress_bars() -> None:
    """Loading takes moments; bars of it would stand between the lines that matter."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _run_doctor(_options: Any, as_json: bool) -> int:
    from spanbert_fast.cli import render
    from spanbert_fast.diagnose.machine import doctor

    report = doctor()
    render.doctor(report, as_json)
    return 0 if report.is_healthy else FAILURE


def _run_plan(options: Any, as_json: bool) -> int:
    from spanbert_fast.cli.budget_view import planned
    from spanbert_fast.diagnose.budget import plan

    planned(plan(options), as_json)
    return 0


def _run_warmup(options: Any, as_json: bool) -> int:
    from spanbert_fast.cli import render
    from spanbert_fast.diagnose.warmup import warmup

    _hide_progress_bars()
    if not Path(options.model).is_file():
        _check_name(options.model)
    render.warmed(warmup(options), as_json)
    return 0


def _run_verify(options: Any, as_json: bool) -> int:
    from spanbert_fast.cli import render
    from spanbert_fast.diagnose.folders import verify

    _hide_progress_bars()
    report = verify(options.directory)
    render.verified(report, as_json)
    return 0 if report.is_intact else FAILURE


def _run_show(options: Any, as_json: bool) -> int:
    from spanbert_fast.cli import render
    from spanbert_fast.diagnose.folders import show

    render.shown(show(options.directory), as_json)
    return 0


COMMANDS = {
    "prepare": Command(
        "turn text into token shards", "spanbert_fast.data.options:PrepareOptions", _run_prepare
    ),
    "pretrain": Command(
        "pre-train a model on token shards",
        "spanbert_fast.train.options:PretrainOptions",
        _run_pretrain,
    ),
    "fit-heads": Command(
        "train MLM and SBO heads on a frozen encoder",
        "spanbert_fast.train.fit_options:FitHeadsOptions",
        _run_fit_heads,
    ),
    "evaluate": Command(
        "measure a model on held-out blocks",
        "spanbert_fast.train.options:EvaluateOptions",
        _run_evaluate,
        positional=("model",),
        has_json=True,
    ),
    "fill": Command(
        "fill runs of [MASK]",
        "spanbert_fast.tasks.options:FillOptions",
        _run_fill,
        positional=("model", "text"),
        has_json=True,
    ),
    "segment": Command(
        "cut texts into spans by attention",
        "spanbert_fast.tasks.options:SegmentOptions",
        _run_segment,
        positional=("model", "text"),
        has_json=True,
    ),
    "convert": Command(
        "turn a foreign checkpoint into one of our folders, or back",
        "spanbert_fast.convert.options:ConvertOptions",
        _run_convert,
        positional=("source", "output"),
        renamed={"source_format": "from", "target_format": "to"},
        has_json=True,
    ),
    "export": Command(
        "write a model as an ONNX or torch.export graph",
        "spanbert_fast.convert.options:ExportOptions",
        run_export,
        positional=("model",),
        has_json=True,
    ),
    "plan": Command(
        "say what a pre-training run needs",
        "spanbert_fast.diagnose.options:PlanOptions",
        _run_plan,
        has_json=True,
    ),
    "doctor": Command(
        "say what this machine offers and test it",
        "spanbert_fast.diagnose.options:DoctorOptions",
        _run_doctor,
        has_json=True,
    ),
    "warmup": Command(
        "compile a model's GPU kernels ahead of time",
        "spanbert_fast.diagnose.options:WarmupOptions",
        _run_warmup,
        positional=("model",),
        has_json=True,
    ),
    "verify": Command(
        "check shards, checkpoints and models for damage",
        "spanbert_fast.diagnose.options:VerifyOptions",
        _run_verify,
        positional=("directory",),
        has_json=True,
    ),
    "show": Command(
        "say what a folder holds and how it was made",
        "spanbert_fast.diagnose.options:ShowOptions",
        _run_show,
        positional=("directory",),
        has_json=True,
    ),
}
