"""Sizes for each kind of machine, the two workloads, and timing of two callables in turn."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from spanbert_fast import Config, SpanMasker
from spanbert_fast.batch import PackedBatch
from spanbert_fast.train.machine import autocast_dtype, choose_precision

RAGGED = (512, 256, 160, 96)
WORKLOADS = ("full-512", "ragged-50")
MASK, SPECIAL, FIRST_WORD = 4, [0, 1, 2, 3], 5


class Sizes(NamedTuple):
    """What a machine can do in a few minutes; the ragged lengths shrink with `length`."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    attention_heads: int
    length: int
    num_sequences: int
    rounds: int
    compiler: str
    """Backend of `torch.compile` for the peers."""


SIZES = {
    "cuda": Sizes(768, 12, 28996, 12, 512, 32, rounds=20, compiler="inductor"),
    "cpu": Sizes(256, 2, 8000, 12, 512, 4, rounds=3, compiler="inductor"),
    # Every line is run by `make test`; nothing is to be learnt about speed.
    "smoke": Sizes(128, 1, 101, 2, 32, 4, rounds=1, compiler="eager"),
}


@dataclass(frozen=True)
class Setting:
    """The machine of this run and the sizes that it gets."""

    device: torch.device
    dtype: torch.dtype
    """Of matrix products, on both sides."""
    rows: list[str] = field(default_factory=list)
    """One line for each comparison, for the end of the run."""

    @property
    def sizes(self) -> Sizes:
        """The row of the table; `SPANBERT_FAST_BENCH_SIZES=smoke` asks for the smallest."""
        return SIZES[os.environ.get("SPANBERT_FAST_BENCH_SIZES", self.device.type)]

    def lengths(self, workload: str) -> list[int]:
        """Lengths of the sequences of a workload."""
        length, num_sequences = self.sizes.length, self.sizes.num_sequences
        if workload == "full-512":
            return [length] * num_sequences
        return [part * length // RAGGED[0] for part in RAGGED] * (num_sequences // len(RAGGED))

    def config(self, dropout: float) -> Config:
        """Heads of 64, four times as wide between them, as in BERT."""
        sizes = self.sizes
        return Config(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.hidden_size // 64,
            intermediate_size=4 * sizes.hidden_size,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )

    def synchronize(self) -> None:
        """Waits for the GPU, so that a clock sees its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def machine(self) -> dict[str, Any]:
        """What a figure depends on."""
        is_gpu = self.device.type == "cuda"
        return {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "gpu": torch.cuda.get_device_name(self.device) if is_gpu else None,
            "threads": torch.get_num_threads(),
            "sizes": self.sizes._asdict(),
        }


def choose_setting() -> Setting:
    """A GPU if there is one, and the precision that pre-training would choose there.

    A CPU without bf16 products emulates them, some 20 times slower: nobody trains that way. The
    smoke run takes bf16 everywhere, because its path is the one with autocast.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_smoke = os.environ.get("SPANBERT_FAST_BENCH_SIZES") == "smoke"
    precision = choose_precision("bf16" if is_smoke else "auto", device)
    return Setting(device, autocast_dtype(precision))


def make_batch(setting: Setting, workload: str, num_sequences: int | None = None) -> PackedBatch:
    """A masked batch of random words, with MLM and SBO targets; of the first sequences, if told."""
    lengths = setting.lengths(workload)[:num_sequences]
    words = np.arange(FIRST_WORD, setting.sizes.vocab_size, dtype=np.int32)
    ids = np.random.default_rng(1).choice(words, sum(lengths))
    cu = np.cumsum((0, *lengths), dtype=np.int32)
    masker = SpanMasker(
        np.ones(setting.sizes.vocab_size, bool),
        mask_token_id=MASK,
        special_token_ids=SPECIAL,
        replacement_ids=words,
    )
    masked = masker(ids, cu, np.arange(len(lengths)))._asdict()
    tensors = {name: torch.from_numpy(array) for name, array in masked.items()}
    tensors["input_ids"] = tensors["input_ids"].long()
    batch = PackedBatch(
        **tensors,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        token_type_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        cu_seqlens=torch.from_numpy(cu),
        max_seqlen=max(lengths),
        sequence_ids=torch.arange(len(lengths)),
    )
    return batch.to(setting.device)


def places(cu_seqlens: Tensor, length: int) -> Tensor:
    """Place of each packed token in a padded batch laid out flat: int64 [T]."""
    sizes = cu_seqlens.diff().tolist()
    return torch.cat([b * length + torch.arange(n) for b, n in enumerate(sizes)]).to(
        cu_seqlens.device
    )


def time_in_turn(
    benchmark: BenchmarkFixture,
    setting: Setting,
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
) -> None:
    """Times `peer`, and `ours` before each of its rounds; the ratio of medians goes to the summary.

    A machine that is slowed by its neighbours slows both.
    """
    own: list[float] = []
    other: list[float] = []

    def timed(step: Callable[[], object], seconds: list[float]) -> None:
        setting.synchronize()
        begun = time.perf_counter()
        step()
        setting.synchronize()
        seconds.append(time.perf_counter() - begun)

    for _ in range(2):
        ours()
        peer()
    benchmark.pedantic(
        timed, args=(peer, other), setup=lambda: timed(ours, own), rounds=setting.sizes.rounds
    )
    a, b = statistics.median(own), statistics.median(other)
    threads = f"{torch.get_num_threads()} threads" if setting.device.type == "cpu" else "GPU"
    benchmark.extra_info.update(ours_seconds=a, peer_seconds=b, ratio=b / a, threads=threads)
    setting.rows.append(
        f"{name}, {threads}: ours {a * 1e3:.1f} ms, peer {b * 1e3:.1f} ms, ratio {b / a:.2f}"
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the expected norm."""
    difference = found.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm())
