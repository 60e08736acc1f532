"""What a user may choose when asking for a diagnosis or a warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


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
