"""Operations, bytes and modelled time of every kernel of a training step on a GPU.

Nothing here was measured on a GPU. The time of a kernel is the largest of four bounds (tensor
cores, special functions, memory, launches), as if each hid completely behind the largest. Counts of
operations come from the package's formulas where it has some, bytes from shapes and dtypes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.kernels import cross_entropy
from spanbert_fast.kernels.attention import flops as attention_flops
from spanbert_fast.train.metrics import model_flops

HALF, SINGLE = 2, 4
"""Bytes of a number in bf16 and in float32."""
BACKWARD_PRODUCTS = 7
"""What the two backward kernels of attention compute: 3 for the queries, 4 for keys and values."""
TILE = 128, 64
"""Queries and keys of a tile of the attention kernels in most of their settings."""
BOUNDS = ("tensor cores", "exp", "memory", "launches")


def _input(source: str) -> Any:
    return dataclasses.field(metadata={"source": source})


@dataclass(frozen=True)
class Gpu:
    """What the model takes for granted about a GPU; the sources are printed with the values."""

    name: str = _input("-")
    num_sms: int = _input("data sheet")
    peak_tflops: float = _input("data sheet: dense bf16 tensor cores, TFLOP/s")
    product_fraction: float = _input("assumed: cuBLAS sustains 250 / 620 TFLOP/s")
    fused_fraction: float = _input("assumed: cross-entropy kernels sustain 165 / 330 TFLOP/s")
    attention_fraction: float = _input("assumed: 165 / 330 TFLOP/s; Triton's tutorial has 340")
    memory_tbytes: float = _input("assumed: sustained TB/s, 86 % of the data sheet's 2.04 / 3.35")
    cache_tbytes: float = _input("assumed: second-level cache, TB/s sustained")
    cache_port: int = _input("assumed: bytes a clock from that cache into one SM")
    vendor_tile: int = _input("assumed: rows and columns of a tile of a small cuBLAS product")
    clock_ghz: float = _input("data sheet: boost clock")
    exp_per_clock: int = _input("CUDA programming guide: special functions per SM and clock")
    launch_us: float = _input("assumed: shortest distance of two kernels in a full queue")

    @property
    def exp_per_second(self) -> float:
        """Special functions of the whole GPU."""
        return self.num_sms * self.exp_per_clock * self.clock_ghz * 1e9


GPUS = (
    Gpu("A100 80 GB SXM", 108, 312, 0.80, 0.53, 0.53, 1.75, 4.0, 64, 64, 1.41, 16, 3.0),
    Gpu("H100 SXM", 132, 989, 0.63, 0.33, 0.33, 2.90, 5.5, 64, 64, 1.755, 16, 3.0),
)


@dataclass(frozen=True)
class Model:
    """Shape of a model and its batch."""

    name: str
    hidden: int
    layers: int
    heads: int
    num_sequences: int
    length: int = _input("full blocks of 512 tokens")
    vocabulary: int = _input("BERT cased")
    mlm_rows: int = _input("15 % of 510, per sequence")
    sbo_rows: int = _input("synthetic text, per sequence")
    spans: int = _input("synthetic text, per sequence")
    window: int | None = None
    """Attention window; None: all tokens."""

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.num_sequences * self.length

    @property
    def read_rows(self) -> int:
        """Rows of the last layer that the heads read: labels, and both edges of each span."""
        return self.num_sequences * (self.mlm_rows + 2 * self.spans)

    @property
    def outer_rows(self) -> int:
        """Rows that pass an attention output and a feed-forward, over all layers."""
        return (self.layers - 1) * self.tokens + self.read_rows

    @property
    def parameters(self) -> int:
        """Matrices of layers and heads, and tables; vectors are left out."""
        layers = 12 * self.layers * self.hidden**2
        heads = (2 + 1 + 1) * self.hidden**2
        return layers + heads + (self.vocabulary + max(512, self.length) + 2) * self.hidden


_WORKLOAD = (512, 28996, 77, 76, 15)
MODELS = (
    Model("base", 768, 12, 12, 32, *_WORKLOAD),
    Model("large", 1024, 24, 16, 16, *_WORKLOAD),
)


class Kernel(NamedTuple):
    """Work of all launches of a kernel in one step."""

    name: str
    launches: int
    flops: float = 0.0
    exps: float = 0.0
    bytes: float = 0.0
    kind: str = "product"
    """Whose sustained fraction holds: "product" (cuBLAS), "fused" or "attention"."""


class Time(NamedTuple):
    """Modelled seconds of one kernel: the largest bound; `bounds` in the order of `BOUNDS`."""

    kernel: Kernel
    bounds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The largest of the bounds."""
        return max(self.bounds)

    @property
    def bound(self) -> str:
        """Name of the largest."""
        return BOUNDS[self.bounds.index(self.seconds)]


def attention_kernels(model: Model) -> list[Kernel]:
    """Attention of all layers: FLOPs of the forward by the registered formula."""
    rows = torch.empty(model.tokens, model.heads, model.hidden // model.heads, device="meta")
    cu = torch.arange(model.num_sequences + 1) * model.length
    flops = attention_flops.forward_flops(rows, rows, rows, cu, model.length, 1.0, model.window)
    computed = model.num_sequences * computed_scores(model.length, model.window)
    seen = attention_flops.num_scores(cu, model.tokens, model.length, model.window)
    product = flops / attention_flops.FORWARD_PRODUCTS * model.layers * computed / seen
    scores = model.layers * computed * model.heads
    plane = model.layers * HALF * model.tokens * model.hidden
    statistics = model.layers * SINGLE * model.tokens * model.heads
    names = ("attention forward", "attention backward (queries)", "attention backward (keys)")
    products, planes = (attention_flops.FORWARD_PRODUCTS, 3, BACKWARD_PRODUCTS - 3), (4, 6, 6)
    return [
        Kernel(
            name, model.layers, count * product, scores, traffic * plane + statistics, "attention"
        )
        for name, count, traffic in zip(names, products, planes, strict=True)
    ]


def computed_scores(length: int, window: int | None) -> int:
    """Scores of one head of a sequence: under a window those of all tiles that it touches."""
    if window is None or window >= length - 1:
        return length * length
    queries, keys = TILE
    total = 0
    for first in range(0, length, queries):
        begin = max(first - window, 0) // keys * keys
        end = min(first + queries + window, length)
        total += min(queries, length - first) * math.ceil((end - begin) / keys) * keys
    return total


def matrix_products(model: Model) -> list[Kernel]:
    """Products of cuBLAS: layers, then heads; each has one product forward and two backward."""

    def products(name: str, rows: int, inner: int, columns: int, count: int) -> Kernel:
        # Rows of all launches together.
        operands = HALF * (rows * (inner + columns) + count * inner * columns)
        return Kernel(name, 3 * count, 6 * rows * inner * columns, bytes=3 * operands)

    hidden, layers, outer = model.hidden, model.layers, model.outer_rows
    mlm, sbo, spans = (
        model.num_sequences * rows for rows in (model.mlm_rows, model.sbo_rows, model.spans)
    )
    return [
        products("product: query, key, value", layers * model.tokens, hidden, 3 * hidden, layers),
        products("product: attention output", outer, hidden, hidden, layers),
        products("product: feed-forward in", outer, hidden, 4 * hidden, layers),
        products("product: feed-forward out", outer, 4 * hidden, hidden, layers),
        products("product: MLM transform", mlm, hidden, hidden, 1),
        products("product: SBO first layer", spans, 2 * hidden, hidden, 1),
        products("product: SBO second layer", sbo, hidden, hidden, 1),
    ]


def row_kernels(model: Model) -> list[Kernel]:
    """Kernels without products; bytes as the docstrings of `spanbert_fast.kernels` count them."""
    hidden, layers, tokens = model.hidden, model.layers, model.tokens
    plane, wide = HALF * tokens * hidden, HALF * 4 * hidden * model.outer_rows
    exps, read = 4 * hidden * model.outer_rows, HALF * model.read_rows * hidden
    mlm, sbo, spans = (
        model.num_sequences * rows for rows in (model.mlm_rows, model.sbo_rows, model.spans)
    )
    transformed, targets = HALF * (mlm + sbo) * hidden, HALF * sbo * hidden
    table = SINGLE * model.vocabulary * hidden
    casts = model.parameters * (SINGLE + HALF)
    return [
        Kernel("norm forward", 2 * layers, bytes=2 * layers * 3 * plane),
        Kernel("norm backward", 4 * layers, bytes=2 * layers * 5 * plane),
        Kernel("GELU forward", layers, exps=exps, bytes=2 * wide),
        Kernel("GELU backward", 2 * layers, 0, 2 * exps, 3 * wide),
        Kernel("rows of the last layer, taken and put back", 12, bytes=4 * plane + 16 * read),
        Kernel("embedding forward", 1, bytes=3 * plane + plane),
        Kernel("embedding backward", 2, bytes=plane + 2 * plane + 2 * plane),
        Kernel("segment sums (3 tables)", 9, bytes=3 * 2 * plane + 2 * table),
        Kernel("GELU + norm, heads, both ways", 4, bytes=5 * transformed),
        Kernel("SBO first layer, both ways", 4, bytes=2 * targets + 3 * HALF * spans * hidden),
        Kernel("SBO boundary sums", 6, bytes=4 * 2 * HALF * spans * hidden + plane),
        Kernel("copies of weights in bf16 (autocast)", 6 * layers, bytes=casts),
        Kernel("AdamW", 1, bytes=model.parameters * 7 * SINGLE),
    ]


def vocabulary_kernels(model: Model) -> list[Kernel]:
    """Cross-entropy: four products by the registered formulas, and the slopes between them."""
    rows = model.num_sequences * (model.mlm_rows + model.sbo_rows)
    hidden, vocabulary = model.hidden, model.vocabulary
    states = torch.empty(rows, hidden, device="meta")
    matrix = torch.empty(vocabulary, hidden, device="meta")
    losses, ops = torch.empty(rows, device="meta"), torch.ops.spanbert_fast_triton
    forward = flop_registry[ops.linear_cross_entropy](states, matrix)
    third = flop_registry[ops.linear_cross_entropy_backward](losses, losses, states, matrix) / 3
    chunks = math.ceil(vocabulary / cross_entropy._chunk_size(rows, vocabulary, HALF, 128))
    operands, slopes = HALF * hidden * (rows + vocabulary), HALF * rows * vocabulary
    logits = rows * vocabulary
    gradients = SINGLE * rows * hidden * 2 * chunks, SINGLE * vocabulary * hidden
    return [
        Kernel("cross-entropy forward", 2, forward, logits, operands, "fused"),
        Kernel("cross-entropy slopes", chunks, third, logits, operands + slopes, "fused"),
        Kernel("cross-entropy row gradient", chunks, third, 0, slopes + gradients[0], "fused"),
        Kernel("cross-entropy matrix gradient", chunks, third, 0, slopes + gradients[1], "fused"),
    ]


def kernels(model: Model) -> list[Kernel]:
    """All kernels of one step: forward, backward, optimizer."""
    parts = (attention_kernels, matrix_products, row_kernels, vocabulary_kernels)
    return [kernel for part in parts for kernel in part(model)]


def time_of(gpu: Gpu, kernel: Kernel) -> Time:
    """The four bounds of a kernel, as if each hid behind the largest."""
    fraction = getattr(gpu, f"{kernel.kind}_fraction")
    bounds = (
        kernel.flops / (gpu.peak_tflops * 1e12 * fraction),
        kernel.exps / gpu.exp_per_second,
        kernel.bytes / (gpu.memory_tbytes * 1e12),
        kernel.launches * gpu.launch_us * 1e-6,
    )
    return Time(kernel, bounds)


def step_times(gpu: Gpu, model: Model) -> list[Time]:
    """Of every kernel; the step is their sum."""
    return [time_of(gpu, kernel) for kernel in kernels(model)]


def flops_of_step(model: Model) -> float:
    """What `train.metrics` counts for utilisation: products of the model, nothing recomputed."""
    zeros = torch.zeros(model.tokens, dtype=torch.int64)
    rows, spans = model.num_sequences * model.sbo_rows, model.num_sequences * model.spans
    batch = PackedBatch(
        input_ids=zeros,
        position_ids=zeros,
        token_type_ids=zeros,
        cu_seqlens=torch.arange(model.num_sequences + 1, dtype=torch.int32) * model.length,
        max_seqlen=model.length,
        sequence_ids=zeros[: model.num_sequences],
        mlm_positions=zeros[: model.num_sequences * model.mlm_rows],
        mlm_labels=zeros[: model.num_sequences * model.mlm_rows],
        sbo_left=zeros[:spans],
        sbo_right=zeros[:spans],
        sbo_cu=zeros[: spans + 1].int(),
        sbo_targets=zeros[:rows],
    )
    config = Config(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        intermediate_size=4 * model.hidden,
        attention_window=model.window,
    )
    return model_flops(config, batch)
