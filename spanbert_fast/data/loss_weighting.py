"""What a user may choose about the weight of each target in the pre-training loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

_RANGES = {
    "sequence_length": (-3.0, 3.0),
    "span_length": (-3.0, 3.0),
    "inverse_frequency": (0.0, 2.0),
    "frequency_cap": (1.0, math.inf),
}


@dataclass(frozen=True, kw_only=True)
class LossWeighting:
    """Exponents of what a target's weight is made of; all 0, the paper's: every target weighs 1.

    The weight of a masked piece, for its MLM and its SBO target alike, is

        length of its sequence ^ sequence_length * length of its span ^ span_length * rarity

    over the corpus mean of this product; see `docs/loss_weighting.md`.
    """

    sequence_length: float = 0.0
    """Of the number of pieces of the block, [CLS] and [SEP] left out; -1: every block counts the
    same, whatever its length."""
    span_length: float = 0.0
    """Of the number of pieces of the masked run; -1: every run counts the same."""
    inverse_frequency: float = 0.0
    """A piece that stands c times in the training split has the rarity c ^ -inverse_frequency."""
    frequency_cap: float = 10.0
    """No rarity is above this many times the mean rarity of the corpus' pieces."""

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"weighting {name} must be a number, got {value!r}")
            is_cap = high == math.inf
            if not low <= value <= high or (is_cap and value in (low, high)):
                allowed = f"above {low:g} and finite" if is_cap else f"in [{low:g}, {high:g}]"
                raise ValueError(f"weighting {name} must be {allowed}, got {value}")
            # 1 and 1.0 are the same choice, also in the file of a run.
            object.__setattr__(self, name, float(value))

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Self:
        """The weighting that `values` name, everything else at its default.

        Raises:
            ValueError: A name is unknown or a value out of range.
        """
        if unknown := sorted(set(values) - set(_RANGES)):
            raise ValueError(f"weighting knows {', '.join(_RANGES)}; got {', '.join(unknown)}")
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ looks at every value

    @property
    def is_uniform(self) -> bool:
        """Whether every target weighs 1."""
        return self.sequence_length == self.span_length == self.inverse_frequency == 0

    def __str__(self) -> str:
        if self.is_uniform:
            return "none"
        shown = dataclasses.asdict(self)
        if not self.inverse_frequency:
            del shown["frequency_cap"]
        return ", ".join(f"{name} {value:g}" for name, value in shown.items() if value)
