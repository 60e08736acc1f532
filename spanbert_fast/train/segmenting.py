"""The masking scheme `segments`: every so many steps the model says which spans are masked.

At the begin of a period of `segment_every` steps the model as it is cuts the blocks that these
steps will draw: they are known before, because the order of the blocks is a function of seed and
data. The spans lie in the run's folder, and a checkpoint names the file in use with its checksum,
so that a run that continues in the middle of a period masks as one that was never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from spanbert_fast.data.masking import SpanMasker
from spanbert_fast.data.plan import StepPlan
from spanbert_fast.data.segments import BlockSpans, SegmentMasker, WordBatch
from spanbert_fast.model.pretrained import Model
from spanbert_fast.model.segmentation import best_segmentation
from spanbert_fast.model.span_scores import (
    SpanScoring,
    Words,
    attention_of_words,
    attention_span_scores,
)
from spanbert_fast.tasks.inference import inference
from spanbert_fast.train.checkpoint import CheckpointError, list_checkpoints
from spanbert_fast.train.events import Event, Notice, Segmented
from spanbert_fast.train.metrics import MetricsLog
from spanbert_fast.train.options import Settings
from spanbert_fast.train.scheme import SEGMENTS
from spanbert_fast.train.source import Source

# Fixed, so that the spans do not depend on how a step is split.
_SEGMENTATION_TOKENS = 8_192
# As `SpanMasker` has them.
_MAX_SPAN_WORDS = 10
_GEOMETRIC_P = 0.2


class SpanPeriods:
    """The spans that the steps of a run mask, period by period."""

    def __init__(
        self,
        settings: Settings,
        source: Source,
        model: Model,
        autocast: Callable[[], AbstractContextManager[Any]],
        log: MetricsLog,
        emit: Callable[[Event], None],
    ) -> None:
        """Predicts nothing yet.

        Args:
            settings: Of the run; their scheme is `segments`.
            source: The shards.
            model: What segments.
            autocast: The precision of its forward passes.
            log: Gets a line for each segmentation.
            emit: Gets an event for each.
        """
        assert settings.segment_every is not None
        self._settings, self._source, self._model = settings, source, model
        self._every = settings.segment_every
        self._autocast, self._log, self._emit = autocast, log, emit
        self._scoring = scoring_of(settings.masking)
        self._plan = StepPlan(
            source.shards.lengths("train"),
            seed=settings.seed,
            global_batch_tokens=settings.global_batch_tokens,
            manifest_hash=source.shards.manifest_hash,
        )
        self._stored: BlockSpans | None = None
        self.state: dict[str, Any] | None = None
        """JSON values for a checkpoint: steps and checksum of the spans in use."""

    def restore(self, step: int, state: dict[str, Any] | None, *, allow: bool) -> None:
        """Take up the spans that the next step of a resumed run has to mask.

        Args:
            step: Steps done.
            state: What `state` was at the checkpoint.
            allow: Predict them with the model of the checkpoint if they are lost, and say so.

        Raises:
            CheckpointError: They are lost, and that is not allowed.
        """
        if step % self._every == 0 or step >= self._settings.steps:
            return
        try:
            self._stored = self._read(step, state)
            self.state = state
        except ValueError as error:
            text = f"resuming {self._settings.output} at step {step} is not exact: {error}"
            if not allow:
                raise CheckpointError(
                    f"{text}. The model that predicted these spans is gone; pass "
                    "--allow-inexact-resume to predict them with the one of the checkpoint"
                ) from error
            self._emit(Notice(text=text))

    def enter(self, step: int, masker: SpanMasker) -> tuple[SegmentMasker, int]:
        """What masks the steps from `step` on, and the step at which it ends to do so.

        Args:
            step: The next step, counted from 0.
            masker: Of the scheme `tagged`.
        """
        stored, self._stored = self._stored, None
        return SegmentMasker(masker, stored or self._predict(step)), self._end(step)

    def _end(self, step: int) -> int:
        return min(step - step % self._every + self._every, self._settings.steps)

    def _rows(self, begin: int, end: int) -> torch.Tensor:
        drawn = [torch.from_numpy(self._plan.batch(step)[1]) for step in range(begin, end)]
        rows: torch.Tensor = torch.unique(torch.cat(drawn))
        return rows

    def _path(self, step: int) -> Path:
        return self._settings.output / SEGMENTS / f"step-{step:07d}.arrow"

    def _read(self, step: int, state: dict[str, Any] | None) -> BlockSpans:
        if state is None or not state["begin"] <= step < state["end"] == self._end(step):
            raise ValueError(
                f"the checkpoint names no spans for the steps before {self._end(step)}"
            )
        spans = BlockSpans.read(self._path(state["begin"]), state["sha256"])
        rows = self._rows(state["begin"], state["end"])
        if not torch.equal(torch.tensor(spans.rows), rows):
            raise ValueError(f"{self._path(state['begin'])} has other blocks than the steps draw")
        return spans

    def _predict(self, step: int) -> BlockSpans:
        begun = time.perf_counter()
        end, path = self._end(step), self._path(step)
        batches = self._source.word_batches(
            self._rows(step, end).numpy(), max_tokens=_SEGMENTATION_TOKENS
        )
        parts, num_words = [], 0
        with inference(self._model), self._autocast():
            for batch in batches:
                parts.append(self._cut(batch))
                num_words += int(batch.cu_words[-1])
        spans = BlockSpans.join(parts)
        self.state = {"begin": step, "end": end, "sha256": spans.write(path)}
        self._prune(path)
        num_blocks, num_spans = len(spans.rows), len(spans.spans)
        segmented = Segmented(
            step=step + 1,
            last_step=end,
            blocks=num_blocks,
            spans_per_block=num_spans / num_blocks,
            words_per_span=num_words / max(1, num_spans),
            seconds=time.perf_counter() - begun,
        )
        self._log.segmentation(segmented)
        self._emit(segmented)
        return spans

    def _cut(self, found: WordBatch) -> BlockSpans:
        """The best segmentation of the blocks of a batch."""
        device = next(self._model.parameters()).device
        batch = found.batch.to(device)
        words = Words(word_of=found.word_of.to(device), cu_words=found.cu_words.to(device))
        backbone = self._model.bert
        states = backbone.encode_packed(batch, output_hidden_states=True).hidden_states
        assert states is not None
        attention = attention_of_words(backbone, batch, states, words, self._scoring)
        # A GPU has no deterministic running sums; what is left is small.
        words = Words(word_of=found.word_of, cu_words=found.cu_words)
        scores = attention_span_scores(attention.float().cpu(), words, self._scoring)
        best = best_segmentation(scores, found.limits, num_threads=torch.get_num_threads())
        return found.spans(best.starts, best.lengths)

    def _prune(self, newest: Path) -> None:
        """Delete the files that no checkpoint has in use any more, and those of steps undone."""
        found = sorted(newest.parent.glob("step-*.arrow"))
        kept = list_checkpoints(self._settings.output / "checkpoints")
        oldest = min([newest.stem, *(path.name for path in kept)])
        first = max(path for path in found if path.stem <= oldest)
        for path in found:
            if not first <= path <= newest:
                path.unlink()


def scoring_of(masking: Mapping[str, Any]) -> SpanScoring:
    """How attention becomes scores under the settings of a masker.

    Its law of span lengths, `geometric_p`, is the prior, and `max_span_words` is the longest span.
    """
    return SpanScoring(
        max_words=masking.get("max_span_words", _MAX_SPAN_WORDS),
        stop_probability=masking.get("geometric_p", _GEOMETRIC_P),
    )
