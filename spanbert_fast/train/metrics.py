"""Figures of a run: JSON lines are the truth, TensorBoard stands beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.model.layout import ReadRows
from spanbert_fast.train.events import EvaluationResult, Progress, Segmented

_LONGEST_PROBE_SECONDS = 0.2
# To stack a few scalars costs a short step more than to keep them, but many take room.
_MOST_SCALARS = 256


class MetricsLog:
    """Appends one JSON object per line to `metrics.jsonl` and the same to TensorBoard.

    Lines after `last_step` are cut off first: they come from steps that a resumed run does again.
    """

    def __init__(self, output: Path, *, last_step: int) -> None:
        self._path = output / "metrics.jsonl"
        if self._path.exists():
            _cut(self._path, last_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=last_step + 1)

    def progress(self, progress: Progress) -> None:
        """Write a line of kind "train"."""
        self._write("train", dataclasses.asdict(progress))

    def evaluation(self, step: int, result: EvaluationResult) -> None:
        """Write a line of kind "evaluation"."""
        self._write("evaluation", {"step": step, **dataclasses.asdict(result)})

    def segmentation(self, segmented: Segmented) -> None:
        """Write a line of kind "segmentation"."""
        self._write("segmentation", dataclasses.asdict(segmented))

    def sync(self) -> None:
        """Bring all lines to the disk: before a checkpoint that says they are there."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{kind}/{name}", value, values["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` that are whole; a killed writer may leave half a last one."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _cut(path: Path, last_step: int) -> None:
    kept = [line for line in read_metrics(path) if line["step"] <= last_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


class _Part(NamedTuple):
    """What the figures need of a micro-batch: kept by the hundred, so without its tokens."""

    cu_seqlens: Tensor
    """int32 [B + 1], on the host."""
    num_tokens: int
    num_mlm: int
    num_sbo: int
    num_spans: int
    num_read: int
    """Rows of the last layer."""

    @classmethod
    def of(cls, batch: PackedBatch) -> Self:
        return cls(
            batch.cu_seqlens,
            batch.num_tokens,
            batch.mlm_positions.shape[0],
            batch.sbo_targets.shape[0],
            batch.sbo_left.shape[0],
            ReadRows.count(batch),
        )


class Meter:
    """Sums over the steps between two lines; losses stay on the device until they are read."""

    def __init__(
        self,
        config: Config,
        *,
        frozen_encoder: bool,
        num_steps: int,
        start_step: int,
        start_tokens: int,
        peak: float,
    ) -> None:
        self.tokens = start_tokens
        """Real tokens since the beginning of the run."""
        self._config, self._frozen_encoder = config, frozen_encoder
        self._num_steps = num_steps
        self._start_step = start_step
        self._peak = peak
        self._begun = self._last = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._interval_steps = 0
        self._losses: list[Sequence[Tensor]] = []
        self._folded: list[Tensor] = []
        self._parts: list[_Part] = []

    def add(self, losses: Sequence[Tensor], batch: PackedBatch) -> None:
        """Note one micro-batch; what it comes to is computed when it is read.

        Args:
            losses: Its loss and the means of MLM and, if that is learned, SBO: all detached.
            batch: What went in, on the host.
        """
        self._losses.append(losses)
        if len(self._losses) == _MOST_SCALARS:
            self._fold()
        part = _Part.of(batch)
        self._parts.append(part)
        self.tokens += part.num_tokens

    def end_step(self) -> None:
        """All micro-batches of a step were counted."""
        self._interval_steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside: evaluation and saving are no training speed."""
        begun = time.perf_counter()
        yield
        self._last += time.perf_counter() - begun

    def read(self, step: int, epoch: int, learning_rate: float, norm: Tensor) -> Progress:
        """The means since the last call; `step` steps are done."""
        self._fold()
        losses = torch.cat(self._folded).double()
        counts = torch.tensor([(1, part.num_mlm, part.num_sbo) for part in self._parts])
        weights = counts[:, : losses.shape[1]].to(losses.device)
        loss, mlm_sum, *sbo_sum = (losses * weights).sum(0).tolist()
        _, num_mlm, num_sbo = counts.sum(0).tolist()
        flops = self._interval_flops()
        now = time.perf_counter()
        seconds = now - self._last
        # Evaluation and saving come back at the same rate, so they belong into the time left.
        per_step = (now - self._begun) / (step - self._start_step)
        progress = Progress(
            step=step,
            num_steps=self._num_steps,
            epoch=epoch,
            loss=loss / self._interval_steps,
            mlm_loss=mlm_sum / max(1, num_mlm),
            sbo_loss=sbo_sum[0] / max(1, num_sbo) if sbo_sum else None,
            learning_rate=learning_rate,
            gradient_norm=float(norm),
            tokens=self.tokens,
            tokens_per_second=sum(part.num_tokens for part in self._parts) / seconds,
            flop_utilisation=flops / seconds / self._peak,
            seconds_left=per_step * (self._num_steps - step),
        )
        self._last = now
        self._reset()
        return progress

    def _fold(self) -> None:
        """Put the scalars of many micro-batches into one tensor [micro-batches, 2 or 3]."""
        if self._losses:
            width = len(self._losses[0])
            scalars = [loss for losses in self._losses for loss in losses]
            self._folded.append(torch.stack(scalars).view(-1, width))
            self._losses = []

    def _interval_flops(self) -> float:
        parts = self._parts
        return _flops(
            self._config,
            torch.cat([part.cu_seqlens.diff() for part in parts]),
            num_rows=sum(part.num_mlm + part.num_sbo for part in parts),
            num_spans=sum(part.num_spans for part in parts),
            num_read=sum(part.num_read for part in parts),
            frozen_encoder=self._frozen_encoder,
        )


def model_flops(config: Config, batch: PackedBatch, *, frozen_encoder: bool = False) -> float:
    """Multiply-add work, counted as 2 each, of one forward and backward pass over a batch.

    Matrix products only: four projections and two feed-forward products per token and layer, two
    attention products over the pairs in reach, and both heads on the rows that have a target; of
    the last layer, all behind the attention on the rows that the heads read. The backward pass
    counts twice the forward; recomputed activations do not count.

    Args:
        config: Shape of the model.
        batch: On the host.
        frozen_encoder: The encoder has no backward pass.
    """
    part = _Part.of(batch)
    return _flops(
        config,
        part.cu_seqlens.diff(),
        num_rows=part.num_mlm + part.num_sbo,
        num_spans=part.num_spans,
        num_read=part.num_read,
        frozen_encoder=frozen_encoder,
    )


def _flops(
    config: Config,
    lengths: Tensor,
    *,
    num_rows: int,
    num_spans: int,
    num_read: int,
    frozen_encoder: bool,
) -> float:
    """`model_flops` of sequences of these lengths (int32 [B]), with these numbers of rows."""
    hidden, feed_forward = int(config.hidden_size), int(config.intermediate_size)
    inner, outer = 3 * hidden**2, hidden**2 + 2 * hidden * feed_forward
    lengths = lengths.double()
    reach = lengths - 1
    if config.attention_window is not None:
        reach = reach.clamp(max=config.attention_window)
    # Each token sees itself and up to `reach` on each side; both ends lack a triangle.
    pairs = lengths * (2 * reach + 1) - reach * (reach + 1)
    attention = 2 * hidden * float(pairs.sum())
    layers, tokens = int(config.num_hidden_layers), float(lengths.sum())
    encoder = layers * (inner * tokens + attention)
    encoder += outer * ((layers - 1) * tokens + num_read)
    heads = num_rows * (hidden**2 + hidden * int(config.vocab_size))
    boundaries = 2 * num_spans * hidden**2
    return 2 * ((1 if frozen_encoder else 3) * encoder + 3 * (heads + boundaries))


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """What this machine reaches now on square matrix products in `dtype`: the best of a few."""
    best = 0.0
    for size in (256, 1024) if device.type == "cpu" else (1024, 8192):
        if best and 2 * size**3 / best > _LONGEST_PROBE_SECONDS:
            break  # a dtype that this machine emulates
        left = torch.ones(size, size, device=device, dtype=dtype)
        for _ in range(5):
            begun = time.perf_counter()
            product = left @ left
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - begun))
        del left, product
    return best
