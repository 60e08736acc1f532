"""The batches of a training run, made ahead of the model by one background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import torch

from spanbert_fast.batch import PackedBatch
from spanbert_fast.data.manifest import SPECIAL_TOKENS_PER_BLOCK, Split
from spanbert_fast.data.masking import AssembledBatch, SpanMasker
from spanbert_fast.data.plan import StepPlan, split_rows
from spanbert_fast.data.segments import SegmentMasker
from spanbert_fast.data.shards import TokenShards

Int64s = npt.NDArray[np.int64]
RowWeights = Callable[[AssembledBatch], npt.NDArray[np.float32]]

EVALUATION_EPOCH: Final = 2**32 - 1
"""Epoch of the fixed masks of evaluation; no training run gets there."""
_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one optimizer step trains on, as far as one rank computes it."""

    step: int
    epoch: int
    example_ids: Int64s
    """int64 [B], block ids of the whole step, over all micro-batches and ranks."""
    micro_batches: list[PackedBatch]
    """At most `num_micro_batches`, none of them empty: fewer where the step has few blocks."""


class StepLoader:
    """An iterator of `Step`, a pure function of its arguments.

    Neither prefetching nor the number of ranks or micro-batches changes which blocks a step has or
    how they are masked, and starting at step n gives what running to step n gives. Use it as a
    context manager, or call `close`.
    """

    def __init__(
        self,
        shards: TokenShards,
        split: Split,
        masker: SpanMasker | SegmentMasker,
        *,
        seed: int,
        global_batch_tokens: int,
        num_micro_batches: int,
        start_step: int = 0,
        stop_step: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 4,
        pin_memory: bool = False,
        row_weights: RowWeights | None = None,
        with_spans: bool = True,
    ) -> None:
        """Starts the thread.

        Args:
            shards: the open shards.
            split: `train` or `validation`.
            masker: chooses the masks; epoch and block id are the only other things they depend on.
            seed: order of the blocks.
            global_batch_tokens: real tokens of a step over all micro-batches and ranks.
            num_micro_batches: parts into which a rank's share of a step is split.
            start_step: first step to deliver; steps count over all epochs.
            stop_step: the step before which it ends; None: it does not end.
            rank: whose share to deliver.
            world_size: number of ranks.
            prefetch: steps that may wait ready.
            pin_memory: put the tensors into page-locked memory.
            row_weights: gives `PackedBatch.row_weights`; None: every target weighs 1.
            with_spans: False leaves the targets of the span boundary head out, masks as they are.

        Raises:
            ValueError: an argument is out of range, or a block does not fit into a step.
        """
        for name, value, least in (
            ("num_micro_batches", num_micro_batches, 1),
            ("start_step", start_step, 0),
            ("world_size", world_size, 1),
            ("prefetch", prefetch, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}, must be at least {least}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, must be in [0, {world_size - 1}]")
        self._shards, self._split, self._masker = shards, split, masker
        self._num_micro_batches, self._rank, self._world_size = num_micro_batches, rank, world_size
        self._pin_memory, self._row_weights = pin_memory, row_weights
        self._with_spans = with_spans
        self._lengths = shards.lengths(split)
        if len(self._lengths) == 0:
            raise ValueError(f"split {split!r} of {shards.directory} is empty, must hold blocks")
        self._plan = StepPlan(
            self._lengths,
            seed=seed,
            global_batch_tokens=global_batch_tokens,
            manifest_hash=shards.manifest_hash,
        )
        # None: there is no step any more.
        self._ready: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._produce,
            args=(start_step, stop_step),
            name="spanbert-fast-loader",
            daemon=True,
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self._failure is not None:
            raise self._failure
        while not self._closed.is_set():
            try:
                result = self._ready.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(result, BaseException):
                self._failure = result
                raise result
            if result is None:
                self._closed.set()
                break
            return result
        raise StopIteration

    def close(self) -> None:
        """Ends the thread; may be called twice. Afterwards the iterator is exhausted."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _produce(self, step: int, stop_step: int | None) -> None:
        while not self._closed.is_set() and step != stop_step:
            rows: Int64s | None = None
            try:
                epoch, rows = self._plan.batch(step)
                self._offer(self._assemble_step(step, epoch, rows))
            except Exception as error:  # noqa: BLE001  # The consumer's thread raises it.
                failure = RuntimeError(
                    f"step {step}, blocks {None if rows is None else rows.tolist()}: {error}"
                )
                failure.__cause__ = error
                self._offer(failure)
                return
            step += 1
        self._offer(None)

    def _offer(self, result: Step | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(result, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return

    def _assemble_step(self, step: int, epoch: int, rows: Int64s) -> Step:
        parts = split_rows(rows, self._lengths, self._num_micro_batches * self._world_size)
        own: list[tuple[AssembledBatch, Int64s]] = []
        num_items = 0
        for number, part in enumerate(parts):
            if len(part) == 0:
                continue
            # Every rank masks the whole step: cheaper than a collective, and the count is exact.
            batch = assemble_rows(self._shards, self._split, self._masker, part, epoch)
            num_items += len(batch.mlm_positions)
            if number % self._world_size == self._rank:
                own.append((batch, part))
        micro_batches = [self._pack(batch, part, num_items) for batch, part in own]
        if self._pin_memory:
            micro_batches = [batch.pin_memory() for batch in micro_batches]
        return Step(step=step, epoch=epoch, example_ids=rows, micro_batches=micro_batches)

    def _pack(self, batch: AssembledBatch, rows: Int64s, num_items: int) -> PackedBatch:
        weights = None if self._row_weights is None else self._row_weights(batch)
        if not self._with_spans:
            none = np.empty(0, np.int64)
            batch = batch._replace(
                sbo_left=none, sbo_right=none, sbo_cu=np.zeros(1, np.int32), sbo_targets=none
            )
            weights = None if weights is None else weights[: len(batch.mlm_positions)]
        return _pack(batch, rows, num_items, weights)


def evaluation_batches(
    shards: TokenShards, masker: SpanMasker, *, max_tokens: int, split: Split = "validation"
) -> Iterator[PackedBatch]:
    """Yields every block of a split once, in order, under masks that are always the same.

    Args:
        shards: the open shards.
        masker: chooses the masks.
        max_tokens: real tokens of a batch, [CLS] and [SEP] included.
        split: `validation` or `train`.

    Raises:
        ValueError: a block does not fit into a batch.
    """
    tokens = shards.lengths(split).astype(np.int64) + SPECIAL_TOKENS_PER_BLOCK
    if len(tokens) and tokens.max() > max_tokens:
        raise ValueError(f"max_tokens is {max_tokens}, must be at least {tokens.max()}")
    ends = np.cumsum(tokens)
    start = 0
    while start < len(tokens):
        done = int(ends[start - 1]) if start else 0
        end = int(np.searchsorted(ends, done + max_tokens, side="right"))
        rows = np.arange(start, end, dtype=np.int64)
        yield _pack(assemble_rows(shards, split, masker, rows, EVALUATION_EPOCH), rows, None)
        start = end


def assemble_rows(
    shards: TokenShards,
    split: Split,
    masker: SpanMasker | SegmentMasker,
    rows: Int64s,
    epoch: int,
) -> AssembledBatch:
    """The blocks `rows` (int64 [B]) of a split, masked, each between [CLS] and [SEP]."""
    values, offsets = shards.gather(split, rows)
    specials = shards.manifest.special_token_ids
    return masker.assemble(
        values,
        offsets,
        np.arange(len(rows), dtype=np.int64),
        rows,
        epoch=epoch,
        cls_token_id=specials["cls"],
        sep_token_id=specials["sep"],
    )


def _pack(
    batch: AssembledBatch,
    rows: Int64s,
    num_items: int | None,
    row_weights: npt.NDArray[np.float32] | None = None,
) -> PackedBatch:
    tensors = {name: torch.from_numpy(array) for name, array in batch._asdict().items()}
    return PackedBatch(
        **tensors,
        token_type_ids=torch.zeros_like(tensors["input_ids"]),
        max_seqlen=int(np.diff(batch.cu_seqlens).max()),
        sequence_ids=torch.from_numpy(rows),
        row_weights=None if row_weights is None else torch.from_numpy(row_weights),
        num_items=num_items,
    )
