"""Texts longer than a model allows, in windows that overlap: which windows, and who owns what.

Pieces are counted without special tokens. All windows of a text have the same size n, so the last
one is moved to the left until it is full. The rule of ownership: a token, or a span that is read as
a whole, belongs to the window in which its nearest edge is farthest, and if two are as good, to the
left one. As all windows are equally long, that is the window whose centre is nearest. The ends of a
text need no exception: what is near one is in the first or last window, and in others, if at all,
nearer to an edge.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

LARGEST_DEFAULT_STRIDE = 128
"""Pieces that neighbours share unless more are asked for: none is nearer than 64 to a cut. What a
cut takes away depends on the distance from it in pieces, hardly on the length of the window, and
is 0.01 nats at most from 32 on (docs/long_text.md)."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a text is read that is longer than one window; the names are those of Hugging Face."""

    max_length: int | None = None
    """Tokens of a window, special tokens included; as many as the model allows unless given."""
    stride: int | None = None
    """Pieces that neighbouring windows share, at least; half of a window's, and at most 128, unless
    given."""

    def __post_init__(self) -> None:
        for name, least in (("max_length", 1), ("stride", 0)):
            value = getattr(self, name)
            if value is None:
                continue
            if type(value) is not int:
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def sizes(self, limit: int, num_special: int) -> tuple[int, int]:
        """Pieces of a window and pieces that neighbours share.

        Args:
            limit: Tokens of a sequence that the model allows.
            num_special: Special tokens of a sequence.

        Raises:
            ValueError: A window would be longer than the model allows, or could not move on.
        """
        length = limit if self.max_length is None else self.max_length
        if not num_special < length <= limit:
            raise ValueError(
                f"max_length must be in [{num_special + 1}, {limit}] for this model and its "
                f"{num_special} special tokens, got {length}"
            )
        size = length - num_special
        default = min(size // 2, LARGEST_DEFAULT_STRIDE)
        stride = default if self.stride is None else self.stride
        if stride >= size:
            raise ValueError(
                f"stride must be below the {size} pieces of a window (max_length {length} less "
                f"{num_special} special tokens), got {stride}"
            )
        return size, stride


class Window(NamedTuple):
    """One window of a text, in pieces."""

    start: int
    end: int
    """Just past its last piece."""
    owned_start: int
    """First piece that this window owns."""
    owned_end: int
    """Just past the last piece that it owns."""


def plan_windows(num_pieces: int, size: int, stride: int) -> list[Window]:
    """The windows of a text from left to right; every piece is owned by exactly one.

    Args:
        num_pieces: Pieces of the text.
        size: Pieces of a window, at least 1.
        stride: Pieces that neighbouring windows share, in [0, size); the last two may share more.

    Raises:
        ValueError: A number is out of range.
    """
    if num_pieces < 0 or not 0 <= stride < size:
        raise ValueError(
            f"must have num_pieces >= 0 and 0 <= stride < size, got num_pieces={num_pieces}, "
            f"size={size}, stride={stride}"
        )
    last = max(num_pieces - size, 0)
    starts = [*range(0, last, size - stride), last]
    # Halfway between two centres, the piece in the middle going to the left.
    borders = [(left + right + size + 1) // 2 for left, right in pairwise(starts)]
    return [
        Window(start, min(start + size, num_pieces), first, past)
        for start, first, past in zip(starts, [0, *borders], [*borders, num_pieces], strict=True)
    ]


def window_of(plan: Sequence[Window], first: int, past: int) -> tuple[int, int]:
    """First piece, and the one past the last, of the window in which a span is read.

    That is the window of the plan in which the span's nearest edge is farthest, the left one of
    two. A span that no window of the plan holds gets one of its own, with the span in its middle.

    Args:
        plan: The windows of the text.
        first: First piece of the span.
        past: The piece past its last; it has at most as many as a window.
    """
    size = plan[0].end - plan[0].start
    # Twice the place at which a window would have the span in its middle.
    wanted = first + past - size
    place = min(bisect_left(plan, wanted, key=lambda window: 2 * window.start), len(plan) - 1)
    left = plan[max(place - 1, 0)]
    nearest = left if wanted - 2 * left.start <= 2 * plan[place].start - wanted else plan[place]
    if nearest.start <= first and past <= nearest.end:
        return nearest.start, nearest.end
    return wanted // 2, wanted // 2 + size


def windows_of_choice(windows: Windows | bool) -> Windows | None:
    """The settings, None if there are to be no windows.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(windows, bool):
        return Windows() if windows else None
    if not isinstance(windows, Windows):
        raise TypeError(f"windows must be True, False or Windows(...), got {windows!r:.80}")
    return windows
