"""What a user may choose when asking for a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
