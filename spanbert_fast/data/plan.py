"""Which blocks form which step: a pure function of shards, seed, epoch and size of a step."""

from __future__ import annotations

import functools
import hashlib
import heapq
from typing import Final

import numpy as np
import numpy.typing as npt

from spanbert_fast import _core
from spanbert_fast.data.manifest import SPECIAL_TOKENS_PER_BLOCK

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]

WINDOW: Final = 4096
_CACHED_WINDOWS: Final = 64
_ROUNDS: Final = 8
_ROWS_STREAM: Final = 0
_BATCHES_STREAM: Final = 1


class KeyedPermutation:
    """A permutation of 0..size-1 that is computed where it is asked for and never stored.

    A Feistel network whose round function is Philox4x32-10 permutes the next power of two; what
    falls outside walks along its cycle until it is inside.
    """

    def __init__(self, size: int, *, key: int, epoch: int, stream: int) -> None:
        """The permutation named by a 64-bit key and two 32-bit numbers."""
        self._size = size
        self._key = key
        self._epoch = epoch
        self._stream = stream
        bits = max(2, (size - 1).bit_length())
        self._bits = bits // 2, bits - bits // 2

    def __call__(self, indices: Int64s) -> Int64s:
        """int64 [N], the images of `indices` (int64 [N], each in 0..size-1)."""
        images = self._network(indices)
        outside = np.flatnonzero(images >= self._size)
        while len(outside):
            images[outside] = self._network(images[outside])
            outside = outside[images[outside] >= self._size]
        return images

    def _network(self, indices: Int64s) -> Int64s:
        left_bits, right_bits = self._bits
        left, right = indices >> right_bits, indices & ((1 << right_bits) - 1)
        counters = np.empty((len(indices), 4), np.uint32)
        counters[:, 2] = self._epoch
        counters[:, 3] = self._stream
        for number in range(_ROUNDS):  # The halves trade places and sizes, back after two rounds.
            counters[:, 0] = right
            counters[:, 1] = number
            words = _core.philox4x32(counters, self._key)[:, 0].astype(np.int64)
            left, right = right, left ^ (words & ((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right


class EpochPlan:
    """The batches of one epoch: every row in exactly one of them.

    Rows are permuted; each window of 4,096 is sorted by length, upwards and downwards in turn so
    that neighbours stay alike where windows meet; the stream of windows is cut into batches of at
    most `global_batch_tokens` real tokens, [CLS] and [SEP] included; the batches are permuted. Only
    the cuts and their order are stored.
    """

    def __init__(
        self,
        lengths: Int32s,
        *,
        seed: int,
        epoch: int,
        global_batch_tokens: int,
        manifest_hash: str,
    ) -> None:
        """Finds the cuts.

        Args:
            lengths: int32 [rows], pieces of each block without [CLS] and [SEP].
            seed: any integer.
            epoch: in [0, 2**32).
            global_batch_tokens: real tokens of a step over all micro-batches and ranks, [CLS] and
                [SEP] included.
            manifest_hash: names the shards; other shards get another order.

        Raises:
            ValueError: there are no rows, or one of them does not fit into a batch.
        """
        if len(lengths) == 0:
            raise ValueError("lengths is empty, a plan needs at least one block")
        if not 0 <= epoch < 2**32:
            raise ValueError(f"epoch is {epoch}, must be in [0, 2**32)")
        longest = int(lengths.max()) + SPECIAL_TOKENS_PER_BLOCK
        if global_batch_tokens < longest:
            raise ValueError(
                f"global_batch_tokens is {global_batch_tokens}, must be at least {longest}, "
                "the tokens of the longest block"
            )
        digest = hashlib.blake2b(f"{manifest_hash}:{seed}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        self._lengths = lengths
        self._rows = KeyedPermutation(len(lengths), key=key, epoch=epoch, stream=_ROWS_STREAM)
        # Batches are permuted, so a window is asked for once per batch that it holds.
        self._window = functools.lru_cache(maxsize=_CACHED_WINDOWS)(self._make_window)
        self._cuts = self._find_cuts(global_batch_tokens)
        batches = KeyedPermutation(self.num_batches, key=key, epoch=epoch, stream=_BATCHES_STREAM)
        # At once: one by one, a batch costs more than to read its tokens.
        self._places = batches(np.arange(self.num_batches, dtype=np.int64))

    @property
    def num_batches(self) -> int:
        """Number of batches of the epoch; one of them is smaller than the others."""
        return len(self._cuts) - 1

    def batch(self, index: int) -> Int64s:
        """int64 [B], the rows of a batch."""
        if not 0 <= index < self.num_batches:
            raise ValueError(f"index is {index}, must be in [0, {self.num_batches - 1}]")
        place = int(self._places[index])
        start, end = int(self._cuts[place]), int(self._cuts[place + 1])
        first, last = start // WINDOW, (end - 1) // WINDOW
        rows = np.concatenate([self._window(number) for number in range(first, last + 1)])
        return rows[start - first * WINDOW : end - first * WINDOW]

    def _make_window(self, number: int) -> Int64s:
        end = min((number + 1) * WINDOW, len(self._lengths))
        rows = self._rows(np.arange(number * WINDOW, end, dtype=np.int64))
        rows = rows[np.argsort(self._lengths[rows], kind="stable")]
        return rows[::-1] if number % 2 else rows

    def _find_cuts(self, global_batch_tokens: int) -> Int64s:
        cuts = [0]
        room = global_batch_tokens
        for offset in range(0, len(self._lengths), WINDOW):
            tokens = self._lengths[self._window(offset // WINDOW)].astype(np.int64)
            ends = np.cumsum(tokens + SPECIAL_TOKENS_PER_BLOCK)
            done = 0
            while (fitting := int(np.searchsorted(ends, done + room, side="right"))) < len(ends):
                cuts.append(offset + fitting)
                done = int(ends[fitting - 1]) if fitting else 0
                room = global_batch_tokens
            room -= int(ends[-1]) - done
        cuts.append(len(self._lengths))
        return np.array(cuts, np.int64)


class StepPlan:
    """The blocks of every step of a run; steps count from 0 over all epochs."""

    def __init__(
        self, lengths: Int32s, *, seed: int, global_batch_tokens: int, manifest_hash: str
    ) -> None:
        """Takes the arguments of `EpochPlan`, for all epochs."""
        self._make = functools.partial(
            EpochPlan,
            lengths,
            seed=seed,
            global_batch_tokens=global_batch_tokens,
            manifest_hash=manifest_hash,
        )
        self._begin_epoch(0, 0)

    def batch(self, step: int) -> tuple[int, Int64s]:
        """The epoch of a step, and its rows (int64 [B]); cheapest where steps are asked in turn."""
        if step < self._first_step:
            self._begin_epoch(0, 0)
        while step >= (end := self._first_step + self._plan.num_batches):
            self._begin_epoch(self._epoch + 1, end)
        return self._epoch, self._plan.batch(step - self._first_step)

    def _begin_epoch(self, epoch: int, first_step: int) -> None:
        self._plan = self._make(epoch=epoch)
        self._epoch, self._first_step = epoch, first_step


def split_rows(rows: Int64s, lengths: Int32s, num_parts: int) -> list[Int64s]:
    """Deals rows to `num_parts` parts of nearly equal numbers of tokens.

    Greedy: from the longest row to the shortest, each to the part that has the fewest tokens so
    far. The rows of a part ascend. Parts may be empty where there are fewer rows than parts.

    Args:
        rows: int64 [B], distinct rows.
        lengths: int32 [all rows of the split], pieces of each block.
        num_parts: number of parts, at least 1.
    """
    if num_parts < 1:
        raise ValueError(f"num_parts is {num_parts}, must be at least 1")
    if num_parts == 1:
        return [np.sort(rows)]
    tokens = lengths[rows].astype(np.int64) + SPECIAL_TOKENS_PER_BLOCK
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0, part) for part in range(num_parts)]
    order = np.lexsort((rows, -tokens))
    for row, size in zip(rows[order].tolist(), tokens[order].tolist(), strict=True):
        load, part = heapq.heappop(loads)
        parts[part].append(row)
        heapq.heappush(loads, (load + size, part))
    return [np.array(sorted(part), np.int64) for part in parts]
