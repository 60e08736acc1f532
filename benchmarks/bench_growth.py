"""How the cost grows: with tokens, length, vocabulary, padding and the size of a corpus.

Each point is the median of rounds in which all sides take turns, after their losses were compared.
Models are two layers of the machine's width, without dropout, where Hugging Face is at its fastest.
Memory against the batch is in `bench_memory`, threads of the sampler in `bench_sampler`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from corpus_probe import prepare_text, write_text
from growth_fit import ATTENTION, REST
from growth_timing import medians
from peers import Step, make_peer, our_step, padded, peer_step, step_of, without_spans
from pytest_benchmark.fixture import BenchmarkFixture
from records import Record
from timing import NAMES, command_of, name_of
from torch import Tensor, nn
from torch.nn import functional
from workload import Setting, make_batch_of

from spanbert_fast import Config, Model, ops
from spanbert_fast.batch import PackedBatch
from spanbert_fast.data.manifest import TOKENIZER_FOLDER
from spanbert_fast.model.heads import combine_losses

NUM_LAYERS = 2
OURS, PEER = "ours", "Hugging Face sdpa"
BEST = "Hugging Face sdpa, best setting"
"""Only words with a label meet the vocabulary."""
PROBE = Path(__file__).with_name("corpus_probe.py")
linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc/self/status"
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is timed at one x."""

    x: float
    steps: dict[str, Step]
    """By series; those that learn the same have the same loss."""
    tokens: int | None = None
    """If given, the curve shows tokens per second."""


def record(
    benchmark: BenchmarkFixture,
    setting: Setting,
    series: str,
    x: float,
    y: float,
    *,
    model: str = "",
) -> None:
    """Keeps a point; the curve is named like the test."""
    curve = name_of(benchmark).split("::test_")[1]
    setting.records.append(
        Record(
            case=f"{name_of(benchmark)}, {series}, {x:g}",
            curve=curve,
            series=series,
            x=float(x),
            y=float(y),
            dtype=NAMES[setting.dtype],
            threads=torch.get_num_threads(),
            model=model,
            command=command_of(benchmark),
        )
    )


def run(
    benchmark: BenchmarkFixture,
    setting: Setting,
    points: Iterator[Point],
    extra: Callable[[Point, dict[str, float]], dict[str, float]] | None = None,
) -> None:
    """Measures all points; `extra` adds series that have no loss."""

    def measure() -> None:
        for point in points:
            seconds = medians(setting, point.steps)
            if extra:
                seconds |= extra(point, seconds)
            for name, value in seconds.items():
                y = point.tokens / value if point.tokens else value
                record(benchmark, setting, name, point.x, y, model=model)

    model = f"{layers_of(setting)} x {setting.sizes.hidden_size}, {NAMES[setting.dtype]}"
    benchmark.pedantic(measure, rounds=1)


def layers_of(setting: Setting) -> int:
    return min(NUM_LAYERS, setting.sizes.num_layers)


def make_model(setting: Setting, max_length: int = 512, vocab_size: int | None = None) -> Model:
    """Two layers of the machine's width, without dropout."""
    torch.manual_seed(0)
    values = setting.config(0.0, max_length).to_dict()
    values["num_hidden_layers"] = layers_of(setting)
    values["vocab_size"] = vocab_size or values["vocab_size"]
    return Model(Config(**values)).to(setting.device).train()


def all_sides(setting: Setting, lengths: list[int]) -> tuple[dict[str, Step], PackedBatch]:
    """A step of ours and of Hugging Face's, as it comes and at its best, on the same words."""
    batch = without_spans(make_batch_of(setting, lengths))
    model = make_model(setting, max(lengths))
    peers = {PEER: "sdpa", BEST: "sdpa masked"}
    steps = {name: peer_step(setting, model, batch, kind) for name, kind in peers.items()}
    return {OURS: our_step(setting, model, batch), **steps}, batch


def test_tokens(benchmark: BenchmarkFixture, setting: Setting) -> None:
    length = setting.sizes.length // 4
    counts = (2, 4) if setting.is_smoke else (2, 4, 8, 16, 32, 64)

    def points() -> Iterator[Point]:
        for count in counts:
            steps, batch = all_sides(setting, [length] * count)
            yield Point(x=batch.num_tokens, steps=steps)

    run(benchmark, setting, points())


def test_length(benchmark: BenchmarkFixture, setting: Setting) -> None:
    """One sequence: its step, the attention of its layers alone, and what is left."""
    longest = 128 if setting.is_smoke else 8192
    lengths = [length for length in (64 << shift for shift in range(8)) if length <= longest]

    def points() -> Iterator[Point]:
        for length in lengths:
            yield Point(x=length, steps=all_sides(setting, [length])[0])

    def split(point: Point, seconds: dict[str, float]) -> dict[str, float]:
        step = attention_step(setting, int(point.x))
        alone = medians(setting, {"": step})[""] * layers_of(setting)
        rest = max(seconds[OURS] - alone, 1e-9)
        return {ATTENTION: alone, REST: rest}

    run(benchmark, setting, points(), split)


def attention_step(setting: Setting, length: int) -> Step:
    """Attention of one layer, forward and backward."""
    shape = (length, setting.sizes.hidden_size // 64, 64)
    rows = [
        torch.randn(shape, device=setting.device, dtype=setting.dtype, requires_grad=True)
        for _ in range(3)
    ]
    slope = torch.ones(shape, device=setting.device, dtype=setting.dtype)
    cu = torch.tensor([0, length], dtype=torch.int32, device=setting.device)

    def step() -> Tensor:
        mixed = ops.varlen_attention(*rows, cu, length, scale=0.125)
        torch.autograd.grad(mixed, rows, slope)
        return mixed

    return step


def test_vocabulary(benchmark: BenchmarkFixture, setting: Setting) -> None:
    """The masked-word head and its loss, from hidden states; Hugging Face decodes every row."""
    sizes = setting.sizes
    batch = without_spans(make_batch_of(setting, [sizes.length] * 2))
    labels = padded(batch)["labels"].flatten()
    hidden = torch.randn(batch.num_tokens, sizes.hidden_size, device=setting.device)

    def points() -> Iterator[Point]:
        for times in (1, 2) if setting.is_smoke else (1, 2, 4, 8):
            model = make_model(setting, vocab_size=sizes.vocab_size * times)
            peer = make_peer(model, "sdpa")
            steps = {
                OURS: head_step(setting, model, hidden, lambda rows, m=model: ours(m, rows)),
                PEER: head_step(setting, peer, hidden, lambda rows, p=peer: theirs(p, rows)),
            }
            yield Point(x=sizes.vocab_size * times, steps=steps)

    def ours(model: Model, rows: Tensor) -> Tensor:
        return combine_losses(model.cls.score(rows, batch), model.config).loss

    def theirs(peer: nn.Module, rows: Tensor) -> Tensor:
        return functional.cross_entropy(peer.cls(rows).float(), labels)

    run(benchmark, setting, points())


def head_step(
    setting: Setting, module: nn.Module, hidden: Tensor, loss: Callable[[Tensor], Tensor]
) -> Step:
    """Forward and backward to fresh gradients of weights and of hidden states [T, D]."""
    return step_of(setting, module, lambda: loss(hidden.clone().requires_grad_()))


def test_padding(benchmark: BenchmarkFixture, setting: Setting) -> None:
    """Eight sequences, one of full length; the shorter the others, the more padding."""
    length = setting.sizes.length // 2
    shares = (0, 0.5) if setting.is_smoke else (0, 0.2, 0.4, 0.6, 0.8)

    def points() -> Iterator[Point]:
        for share in shares:
            other = round(length * (1 - share * 8 / 7))
            lengths = [length, *[other] * 7]
            steps, batch = all_sides(setting, lengths)
            padding = 1 - sum(lengths) / (8 * length)
            yield Point(x=padding, steps=steps, tokens=batch.num_tokens)

    run(benchmark, setting, points())


def probe(what: str, path: Path, *options: object) -> dict[str, float]:
    """What `corpus_probe.py` found in a process of its own."""
    command = [sys.executable, str(PROBE), what, str(path), *map(str, options)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


class Corpus(NamedTuple):
    """Synthetic text and the shards made of it."""

    megabytes: float
    """Of text, 10**6 bytes."""
    shards: Path
    prepared: dict[str, float]
    """What the probe said of `prepare`."""


@pytest.fixture(scope="module")
def corpora(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """Each four times as large as the last; one tokenizer for all."""
    folder = tmp_path_factory.mktemp("corpora")
    first, times = (20_000, (1, 4)) if setting.is_smoke else (250_000, (1, 4, 16, 64))
    found = []
    for number in times:
        text, shards = folder / f"{number}.txt", folder / str(number)
        write_text(text, first * number)
        if not found:
            prepare_text(text, folder / "first", None)
        tokenizer = folder / "first" / TOKENIZER_FOLDER
        made = probe("prepare", shards, "--source", text, "--tokenizer", tokenizer)
        text.unlink()
        found.append(Corpus(first * number / 1e6, shards, made))
    return found


def keep_memory(
    benchmark: BenchmarkFixture, setting: Setting, x: float, found: dict[str, float]
) -> None:
    """Two points: the memory of a process, with and without what is mapped."""
    record(benchmark, setting, "memory of its own", x, found["own"])
    record(benchmark, setting, "with mapped files", x, found["peak"])


@linux_only
def test_prepare(benchmark: BenchmarkFixture, setting: Setting, corpora: list[Corpus]) -> None:
    def measure() -> None:
        for corpus in corpora:
            keep_memory(benchmark, setting, corpus.megabytes, corpus.prepared)

    benchmark.pedantic(measure, rounds=1)


@linux_only
def test_loader(benchmark: BenchmarkFixture, setting: Setting, corpora: list[Corpus]) -> None:
    def measure() -> None:
        for corpus in corpora:
            million_tokens = corpus.prepared["tokens"] / 1e6
            keep_memory(benchmark, setting, million_tokens, probe("read", corpus.shards))

    benchmark.pedantic(measure, rounds=1)
