"""What a user may choose of fitting heads to an encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from spanbert_fast.train.options import MASKING_KEYS, Device, Precision, Value
from spanbert_fast.train.scheme import check_scheme


@dataclass(frozen=True, kw_only=True)
class FitHeadsOptions:
    """Train the MLM head and the SBO head of a BERT whose encoder stays as it is."""

    init: str
    """Folder or hub name of the BERT or SpanBERT whose encoder is used."""
    data: Path
    """Folder of token shards that `prepare` wrote with the tokenizer of the encoder."""
    output: Path
    """Folder of the run; an interrupted run there is continued."""
    seed: int = 0
    """Seed of weights, order and masks."""
    steps: int | None = None
    """Optimizer steps; 4000 unless given."""
    tokens: int | None = None
    """Real tokens to train on, instead of steps."""
    global_batch_tokens: int | None = None
    """Real tokens per optimizer step; 4096 unless given."""
    micro_batches: int | None = None
    """Parts into which a step is split (accumulation); chosen by size unless given."""
    learning_rate: float | None = None
    """Peak of the schedule; 1e-3 unless given."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; 100, but a tenth of the steps at most, unless given."""
    log_every: int | None = None
    """Steps between two lines of metrics; 50 unless given."""
    eval_every: int | None = None
    """Steps between two evaluations; 500 unless given, 0: none at all."""
    eval_blocks: int = 2_048
    """Held-out blocks of an evaluation, rounded up to whole batches; 0: all."""
    save_every: int | None = None
    """Steps between two checkpoints; 500 unless given."""
    threads: int | None = None
    """CPU threads; as many as torch takes by itself unless given."""
    device: Device = "auto"
    """Where the model runs; auto: CUDA if there is one."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware has the instruction, else fp32 (fp16 on older GPUs)."""
    language: str | None = None
    """Language code for the model card, for example en."""
    allow_inexact_resume: bool = False
    """Continue a run even if versions, threads or settings changed, so that results may differ."""
    masking: dict[str, Value] = field(default_factory=dict)
    """Settings of the span masker that differ from its defaults, for example mask_ratio 0.2."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.tokens is not None:
            raise ValueError(f"steps is {self.steps} and tokens is {self.tokens}; give one of them")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if unknown := sorted(set(self.masking) - set(MASKING_KEYS)):
            raise ValueError(f"masking knows {', '.join(MASKING_KEYS)}; got {', '.join(unknown)}")
        check_scheme(self.masking, None, freeze_encoder=True)
