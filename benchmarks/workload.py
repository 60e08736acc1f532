"""Sizes for each kind of machine, the named workloads, and batches of them."""

from __future__ import annotations

import dataclasses
import os
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from records import Record
from torch import Tensor

from spanbert_fast import Config, SpanMasker
from spanbert_fast.batch import PackedBatch
from spanbert_fast.train.machine import autocast_dtype, choose_precision

RAGGED = (512, 256, 160, 96)
WORKLOADS = ("full-512", "ragged-50")
ALL_WORKLOADS = (*WORKLOADS, "sentences", "documents")
"""Blocks of 512; half padding in a padded batch; 8 to 40 pieces each; 16 to 512 pieces, mixed."""
PACKAGES = ("transformers", "tokenizers", "onnxruntime", "sentence-transformers")
"""Peers whose version belongs to a figure."""
MASK, SPECIAL, FIRST_WORD = 4, [0, 1, 2, 3], 5


class Sizes(NamedTuple):
    """What a machine can do in a few minutes; the ragged lengths shrink with `length`."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    attention_heads: int
    length: int
    num_blocks: int
    """Sequences of `full-512`."""
    num_ragged: int
    """Sequences of `ragged-50`, a multiple of 4."""
    num_texts: int
    """Sequences of `sentences`; an eighth of it, of `documents`."""
    rounds: int
    compiler: str
    """Backend of `torch.compile` for the peers."""


SIZES = {
    "cuda": Sizes(768, 12, 28996, 12, 512, 32, 32, 256, rounds=20, compiler="inductor"),
    "cpu": Sizes(256, 4, 8000, 12, 512, 2, 4, 256, rounds=5, compiler="inductor"),
    # Every line is run by `make test`; nothing is to be learnt about speed.
    "smoke": Sizes(128, 1, 101, 2, 32, 2, 4, 16, rounds=1, compiler="eager"),
}
BASE = {"hidden_size": 768, "num_layers": 12, "vocab_size": 28996, "rounds": 3}
"""BERT base, for the rows of the table that a CPU can run with it in the time."""


@dataclass(frozen=True)
class Setting:
    """The machine of this run and the sizes that it gets."""

    device: torch.device
    dtype: torch.dtype
    """Of matrix products, on both sides."""
    is_base: bool = False
    """BERT base instead of the sizes of the machine; never in the smoke run."""
    records: list[Record] = field(default_factory=list)
    """What was measured or skipped, for the end of the run and for the report."""

    @property
    def is_smoke(self) -> bool:
        """Whether this run only shows that everything runs."""
        return os.environ.get("SPANBERT_FAST_BENCH_SIZES") == "smoke"

    @property
    def sizes(self) -> Sizes:
        """The row of the table; `SPANBERT_FAST_BENCH_SIZES=smoke` asks for the smallest."""
        if self.is_smoke:
            return SIZES["smoke"]
        return SIZES[self.device.type]._replace(**(BASE if self.is_base else {}))

    @property
    def model(self) -> str:
        """Names the size of the model in a table."""
        sizes = self.sizes
        return f"{sizes.num_layers} x {sizes.hidden_size}, {sizes.vocab_size:,} words"

    @property
    def has_bf16(self) -> bool:
        """Whether a bf16 row says anything here: the device multiplies in bf16."""
        return self.is_smoke or choose_precision("auto", self.device) == "bf16"

    def base(self) -> Setting:
        """The same machine with a model of BERT base's size."""
        return dataclasses.replace(self, is_base=True)

    def at(self, dtype: torch.dtype) -> Setting:
        """The same machine with products in `dtype`."""
        return dataclasses.replace(self, dtype=dtype)

    def lengths(self, workload: str) -> list[int]:
        """Lengths of the sequences of a workload."""
        sizes = self.sizes
        if workload == "full-512":
            return [sizes.length] * sizes.num_blocks
        if workload == "ragged-50":
            parts = [part * sizes.length // RAGGED[0] for part in RAGGED]
            return parts * (sizes.num_ragged // len(RAGGED))
        rng, scale = np.random.default_rng(0), sizes.length / 512
        if workload == "sentences":
            return rng.integers(8, 41, sizes.num_texts).tolist()
        lengths = np.exp(
            rng.uniform(np.log(16 * scale), np.log(sizes.length), sizes.num_texts // 8)
        )
        return np.maximum(3, lengths.astype(int)).tolist()

    def config(self, dropout: float, max_length: int = 512) -> Config:
        """Heads of 64, four times as wide between them, as in BERT."""
        sizes = self.sizes
        return Config(
            vocab_size=sizes.vocab_size,
            max_position_embeddings=max(512, max_length),
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
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: version_of(name) for name in PACKAGES},
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "gpu": torch.cuda.get_device_name(self.device) if is_gpu else None,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "has_bf16_products": self.has_bf16,
            "threads": torch.get_num_threads(),
            "sizes": self.sizes._asdict(),
        }


def cpu_name() -> str:
    """As the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """Of an installed package; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
    return make_batch_of(setting, setting.lengths(workload)[:num_sequences])


def make_batch_of(setting: Setting, lengths: list[int]) -> PackedBatch:
    """The same for sequences of these lengths."""
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


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the expected norm."""
    difference = found.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm())
