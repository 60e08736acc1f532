"""What a patched model runs, module by module."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from torch import nn

from spanbert_fast.model.patch.packed import Packed


class PatchedModule(NamedTuple):
    """A module that computes something else than before, or the same in another way."""

    name: str
    """Its path in the model; empty for the model itself."""
    kind: str
    """Name of its class."""
    runs: str
    """The operation of `sf.ops` it runs, and which of its modules are called one by one."""


@dataclass(frozen=True)
class PatchReport:
    """What `sf.patch` replaced; printed, one line for equal layers."""

    model: str
    """Name of the model's class."""
    modules: tuple[PatchedModule, ...]
    """In the order of the model."""

    def __str__(self) -> str:
        """A table."""
        lines: dict[tuple[str, str, str], list[int]] = {}
        for name, kind, runs in self.modules:
            match = re.search(r"(?<=encoder\.layer\.)\d+", name)
            place = name[: match.start()] + "*" + name[match.end() :] if match else name
            lines.setdefault((place, kind, runs), []).append(int(match[0]) if match else 0)
        table = [
            (place.replace("*", _ranges(layers)) or "(the model)", kind, runs)
            for (place, kind, runs), layers in lines.items()
        ]
        widths = [max(len(row[column]) for row in table) for column in (0, 1)]
        rows = (f"  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in table)
        return "\n".join([f"{self.model}, patched:", *rows])


def report_on(model: nn.Module) -> PatchReport:
    """What runs in `model` now."""
    modules = tuple(
        PatchedModule(name, type(module).__name__, runs)
        for name, module in model.named_modules()
        if isinstance(module, Packed) and (runs := module.runs())
    )
    return PatchReport(type(model).__name__, modules)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}"."""
    runs = [
        [number for _, number in group]
        for _, group in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    ]
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return parts[0] if parts == [str(numbers[0])] else "{" + ",".join(parts) + "}"
