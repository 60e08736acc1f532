"""What a user may choose when asking for a diagnosis, a plan or a warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from spanbert_fast.train.options import Preset


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Tell what this machine offers, which implementation runs and why, and test it."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check token shards, a checkpoint, a run or a saved model for damage."""

    directory: Path
    """What to check."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Tell what a folder holds and how it was made."""

    directory: Path
    """What to look at."""


@dataclass(frozen=True, kw_only=True)
class WarmupOptions:
    """Compile the Triton kernels of a model ahead of time; no GPU is needed.

    The environment variable SPANBERT_FAST_TRITON_CACHE names the directory they go to.
    """

    model: str
    """Folder or hub name of a model, or a config.json."""
    arch: tuple[int, ...] = ()
    """Compute capabilities to compile for, such as 80 90; this machine's GPU unless given."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of training, and of inference with a model loaded in it; fp32 is always there."""
    max_length: int | None = None
    """Longest sequence; all that the model has positions for unless given."""
    eval_only: bool = False
    """Only what evaluation and inference need, not training."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Tell what a pre-training run needs before anything runs: memory, time, disk."""

    preset: Preset = "base"
    """Size and recipe."""
    tokens: float | None = None
    """Real tokens to train on, such as 3e9; those of the recipe unless given."""
    device: str = "cpu"
    """cpu (this machine), a100 or h100, or several as h100x8."""
    seq_length: int = 512
    """Tokens of a block."""
    attention_window: int | None = None
    """A token sees others at a distance of at most this; all of its sequence unless given."""
    vocab_size: int = 28_996
    """Entries of the vocabulary."""
    global_batch_tokens: int | None = None
    """Real tokens per optimizer step; those of the recipe unless given."""
    micro_batches: int | None = None
    """Parts into which a device splits its share of a step; chosen by size unless given."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: as pretrain chooses."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    def __post_init__(self) -> None:
        if self.preset not in get_args(Preset):
            raise ValueError(f"preset must be one of {get_args(Preset)}, got {self.preset!r}")
        if self.tokens is not None and not 1 <= self.tokens < float("inf"):
            raise ValueError(f"tokens must be at least 1 and finite, got {self.tokens}")
        sizes = ("seq_length", "vocab_size", "global_batch_tokens", "micro_batches")
        for name in (*sizes, "attention_window"):
            value = getattr(self, name)
            least = 8 if name in ("seq_length", "vocab_size") else 1
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
