"""What a training run tells whoever watches it: plain values, no rendering."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Quality of the span boundary head on the targets that share one property."""

    value: int
    """Offset in the span, counted from 0, or the length of the span in pieces."""
    targets: int
    loss: float
    """Mean cross-entropy in nats."""
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """What needs no model: the unigram law of the training split, scored on the same targets."""

    unigram_entropy: float
    """Entropy of the law itself, in nats: what guessing by it costs on the training split."""
    unigram_cross_entropy: float
    """Cross-entropy of the law on the held-out MLM targets, in nats."""
    majority_token: str
    majority_accuracy: float
    """Share of the held-out MLM targets that are the most frequent token of the training split."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Losses in nats and top-1 accuracies on held-out blocks under fixed masks."""

    blocks: int
    tokens: int
    mlm_targets: int
    mlm_loss: float | None
    """None where the model has no trained MLM head."""
    mlm_accuracy: float | None
    sbo_targets: int
    sbo_loss: float | None
    """None where the model has no trained span boundary head."""
    sbo_accuracy: float | None
    sbo_by_offset: tuple[Bucket, ...]
    sbo_by_span_length: tuple[Bucket, ...]
    baselines: Baselines


@dataclass(frozen=True, kw_only=True)
class SpanExample:
    """One masked span of a held-out block: what stood there and what each head says."""

    left: str
    """Text before the span, as the model saw it."""
    right: str
    truth: str
    mlm: str | None
    """Most probable token at each position, by the MLM head."""
    sbo: str | None
    """The same by the span boundary head, which sees the two boundary tokens only."""


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """The run is built, and restored if it is resumed; the first step follows."""

    output: Path
    preset: str
    resumed_from: Path | None
    start_step: int
    """Steps already done."""
    num_steps: int
    num_parameters: int
    global_batch_tokens: int
    training_blocks: int
    validation_blocks: int
    precision: str
    device: str
    num_threads: int
    matmul_flops_per_second: float
    """Measured on this machine just now; what `flop_utilisation` is relative to."""
    weighting: str = "none"
    """Weights of the targets in the loss, in words; "none": all 1."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Means since the last one of these."""

    step: int
    """Steps done, counted from 1."""
    num_steps: int
    epoch: int
    loss: float
    mlm_loss: float
    sbo_loss: float | None
    """None where the span boundary head is not learned: its weight is 0."""
    learning_rate: float
    gradient_norm: float
    """Before clipping, of the last step."""
    tokens: int
    """Real tokens since the beginning of the run."""
    tokens_per_second: float
    flop_utilisation: float
    """Floating-point operations of the model per second, relative to a measured matmul."""
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """The model predicted the spans that the next steps mask."""

    step: int
    """First step that masks them, counted from 1."""
    last_step: int
    blocks: int
    """Blocks that these steps draw."""
    spans_per_block: float
    words_per_span: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The model was evaluated on the held-out blocks."""

    step: int
    num_steps: int
    result: EvaluationResult


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is on the disk, complete and verified."""

    step: int
    path: Path
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CheckpointRefused:
    """A checkpoint does not verify and is not used."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something the user should know; the run goes on."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ExamplesReady:
    """Masked spans of held-out blocks with predictions, after the last step."""

    examples: tuple[SpanExample, ...]


@dataclass(frozen=True, kw_only=True)
class PretrainSummary:
    """How a run ended."""

    output: Path
    model: Path
    """Folder with weights, configuration, tokenizer and model card."""
    report: Path
    """The curves, as a picture."""
    steps: int
    tokens: int
    seconds: float
    """Wall-clock time of this process, from start to end."""
    evaluation: EvaluationResult | None
    """On the held-out blocks after the last step; None without held-out blocks."""


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    """The last event."""

    summary: PretrainSummary


Event = (
    RunStarted
    | Progress
    | Segmented
    | Evaluated
    | CheckpointSaved
    | CheckpointRefused
    | Notice
    | ExamplesReady
    | RunFinished
)
