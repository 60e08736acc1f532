"""What a user may choose when filling spans from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spanbert_fast.tasks.windows import Windows


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
    windows: bool = False
    """Read texts that are longer than the model allows in windows that overlap."""
    max_length: int | None = None
    """Tokens of a window, special tokens included; as many as the model allows unless given."""
    stride: int | None = None
    """Pieces that neighbouring windows share; half of a window's, and at most 128, unless given."""


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """Cut texts into spans by a model's attention."""

    model: str
    """Folder or hub name of a model."""
    text: tuple[str, ...] = ()
    """Texts; lines of the standard input if there are none."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; the model's own unless given."""
    max_words: int = 10
    """Longest span in words."""
    layers: tuple[int, ...] | None = None
    """Layers whose attention counts, from 0; all unless given."""
    heads: tuple[int, ...] | None = None
    """Heads of these layers, from 0; all unless given."""
    border_weight: float = 1.0
    """How much attention across its borders speaks against a span."""
    sharpness: float = 1.0
    """Factor of the attention's evidence beside the law of lengths."""
    stop_probability: float = 0.5
    """Of the geometric law of lengths; above 1/2 spans get shorter."""
    respect_sentences: bool = False
    """No span crosses the border of a sentence."""
    windows: bool = False
    """Read texts that are longer than the model allows in windows that overlap."""
    max_length: int | None = None
    """Tokens of a window, special tokens included; as many as the model allows unless given."""
    stride: int | None = None
    """Pieces that neighbouring windows share; half of a window's, and at most 128, unless given."""
    html: Path | None = None
    """Page to write, with the spans underlined."""
    png: Path | None = None
    """Picture to write, with the spans underlined."""


def chosen_windows(options: FillOptions | SegmentOptions) -> Windows | bool:
    """The windows asked for; a length or a stride asks for them, too."""
    if options.max_length is None and options.stride is None:
        return options.windows
    return Windows(max_length=options.max_length, stride=options.stride)
