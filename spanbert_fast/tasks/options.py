"""What a user may choose when filling spans from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class FillOptions:
    """Fill every run of [MASK] with its most probable spans."""

    model: str
    """Folder or hub name of a model with a trained head."""
    text: tuple[str, ...] = ()
    """Texts with [MASK]; lines of the standard input if there are none."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; the model's own unless given."""
    top_k: int = 5
    """Candidates per run."""
    head: Literal["auto", "mlm", "sbo"] = "auto"
    """Head that predicts; auto: each trained head that applies."""
    length: tuple[int, int] | None = None
    """Shortest and longest filling in tokens, tried for the single [MASK] of each text."""
    allow_untrained_heads: bool = False
    """Use heads with random weights, too."""
