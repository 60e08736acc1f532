"""What a person looks at after a run: curves, filled spans and the model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spanbert_fast.batch import PackedBatch
from spanbert_fast.model.pretrained import Model
from spanbert_fast.train.events import SpanExample

_TRAIN, _HELD_OUT, _SBO, _GREY = "#4C72B0", "#C44E52", "#DD8452", "#555555"
# Words left and right of a span that an example shows.
_CONTEXT_PIECES = 24

Lines = list[dict[str, Any]]


def draw_report(metrics: Lines, path: Path, title: str) -> None:
    """Write the curves of a run as a picture.

    Args:
        metrics: The lines of `metrics.jsonl`.
        path: A PNG file.
        title: One line above the curves.
    """
    train = [line for line in metrics if line["kind"] == "train"]
    held_out = [line for line in metrics if line["kind"] == "evaluation"]
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(2, 2).flat
    _draw_losses(axes[0], train, held_out)
    _draw_accuracies(axes[1], held_out)
    for axis, key, label in (
        (axes[2], "learning_rate", "learning rate"),
        (axes[3], "tokens_per_second", "tokens per second"),
    ):
        _curve(axis, train, key, _TRAIN, "")
        axis.set(ylabel=label, ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("step")
        axis.set_xlim(0, 1.02 * metrics[-1]["step"] if metrics else None)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _draw_losses(axis: Axes, train: Lines, held_out: Lines) -> None:
    _curve(axis, train, "mlm_loss", _TRAIN, "MLM, training", alpha=0.45)
    _curve(axis, train, "sbo_loss", _SBO, "SBO, training", alpha=0.45)
    _curve(axis, held_out, "mlm_loss", _TRAIN, "MLM, held out", marker="o")
    _curve(axis, held_out, "sbo_loss", _SBO, "SBO, held out", marker="s")
    if held_out:
        level = held_out[-1]["baselines"]["unigram_cross_entropy"]
        axis.axhline(
            level, color=_GREY, linestyle="--", label=f"unigram law, held out: {level:.2f}"
        )
    axis.set(ylabel="cross-entropy, nats per target")
    if axis.lines:
        axis.legend()


def _draw_accuracies(axis: Axes, held_out: Lines) -> None:
    axis.set(ylabel="top-1 accuracy on held-out targets, %")
    if not held_out:
        axis.text(0.5, 0.5, "no held-out blocks", transform=axis.transAxes, ha="center")
        return
    _curve(axis, held_out, "mlm_accuracy", _TRAIN, "MLM", marker="o", scale=100)
    _curve(axis, held_out, "sbo_accuracy", _SBO, "SBO", marker="s", scale=100)
    baselines = held_out[-1]["baselines"]
    level = 100 * baselines["majority_accuracy"]
    label = f"always {baselines['majority_token']!r}: {level:.1f} %"
    axis.axhline(level, color=_GREY, linestyle="--", label=label)
    axis.set_ylim(0, 1.15 * max(axis.get_ylim()[1], level))
    axis.legend(loc="lower right")


def _curve(
    axis: Axes,
    lines: Lines,
    key: str,
    color: str,
    label: str,
    *,
    marker: str = "",
    alpha: float = 1.0,
    scale: float = 1.0,
) -> None:
    points = [(line["step"], line[key] * scale) for line in lines if line[key] is not None]
    if points:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, color=color, label=label, marker=marker, markersize=4, alpha=alpha)


@torch.no_grad()
def span_examples(
    model: Model, tokenizer: Any, batch: PackedBatch, *, limit: int = 12
) -> tuple[SpanExample, ...]:
    """Masked spans of a batch with the truth and what each trained head says, one per sequence.

    Args:
        model: Its mode is left as it was.
        tokenizer: Turns ids into text.
        batch: Masked blocks on the model's device.
        limit: Most examples given.
    """
    was_training = model.training
    model.train(False)
    output = model.forward_packed(batch, return_logits=True)
    model.train(was_training)
    mlm, sbo = (
        None
        if head in model.config.untrained_heads or logits is None
        else logits.argmax(-1).tolist()
        for head, logits in (("mlm", output.logits), ("sbo", output.sbo_logits))
    )
    ids, boundaries = batch.input_ids.tolist(), batch.cu_seqlens.tolist()
    targets, span_rows = batch.sbo_targets.tolist(), batch.sbo_cu.tolist()
    examples: list[SpanExample] = []
    sequence, used = 0, -1
    for span, (left, right) in enumerate(
        zip(batch.sbo_left.tolist(), batch.sbo_right.tolist(), strict=True)
    ):
        while boundaries[sequence + 1] <= left:
            sequence += 1
        first, last = span_rows[span], span_rows[span + 1]
        # Of the ordinary spans only those that are hidden whole: an unmasked one tells nothing.
        hidden = all(token == tokenizer.mask_token_id for token in ids[left + 1 : right])
        if sequence == used or not hidden or right - left - 1 != last - first:
            continue
        used = sequence
        begin = max(boundaries[sequence] + 1, left + 1 - _CONTEXT_PIECES)
        end = min(boundaries[sequence + 1] - 1, right + _CONTEXT_PIECES)
        examples.append(
            SpanExample(
                left=tokenizer.decode(ids[begin : left + 1]),
                right=tokenizer.decode(ids[right:end]),
                truth=tokenizer.decode(targets[first:last]),
                mlm=None if mlm is None else tokenizer.decode(mlm[left + 1 : right]),
                sbo=None if sbo is None else tokenizer.decode(sbo[first:last]),
            )
        )
        if len(examples) == limit:
            break
    return tuple(examples)


def write_examples(examples: Sequence[SpanExample], path: Path) -> None:
    """Write examples as JSON."""
    values = [dataclasses.asdict(example) for example in examples]
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
