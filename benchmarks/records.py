"""What one case found, in a form that the tables, the plots and the guard read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Record:
    """A comparison, a point of a curve, or the reason why there is none."""

    case: str
    """Names the record in a run: file and test, with its parameters."""
    rows: tuple[str, ...] = ()
    """Rows of the table of bars that it answers."""
    workload: str = ""
    peer: str = ""
    dtype: str = ""
    """Of the products: ours / the peer's."""
    dropout: float = 0.0
    threads: int = 1
    model: str = ""
    ratio: float | None = None
    """Median of rounds; above 1 ours is better, but for the rows whose bar is an upper one."""
    ratio_20: float | None = None
    ratio_80: float | None = None
    ours_seconds: float | None = None
    peer_seconds: float | None = None
    ours_cpu_seconds: float | None = None
    peer_cpu_seconds: float | None = None
    ours_tokens_per_second: float | None = None
    """Real tokens: padding does not count."""
    peer_tokens_per_second: float | None = None
    padding: float | None = None
    """Share of padding in the peer's batch."""
    unit: str = "s"
    """Of the two medians; memory is in MiB."""
    command: str = ""
    """Runs this case alone, from the root of the repository."""
    skipped: str | None = None
    curve: str | None = None
    """The curve that it is a point of, with the point and the name of the line."""
    series: str | None = None
    x: float | None = None
    y: float | None = None

    def line(self) -> str:
        """For the end of a run."""
        name = f"[{', '.join(self.rows)}] {self.case}" if self.rows else self.case
        if self.skipped:
            return f"{name}: not measured, {self.skipped}"
        if self.curve:
            return f"{name}: {self.curve}, {self.series}, {self.x:g}: {self.y:.4g}"
        values = f"ours {self.ours_seconds:.4g} {self.unit}, peer {self.peer_seconds:.4g}"
        spread = f"{self.ratio:.3g} ({self.ratio_20:.3g} to {self.ratio_80:.3g})"
        return f"{name}, {self.dtype}, {self.threads} threads: {values}, ratio {spread}"


def save(path: Path, machine: dict[str, Any], records: Iterable[Record]) -> None:
    """Writes a file of results whole or not at all."""
    value = {"machine": machine, "records": [dataclasses.asdict(record) for record in records]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def load(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """Machine and records of all files of a run.

    Raises:
        ValueError: There is none, or two files come from machines or sizes that differ.
    """
    machines, records = [], []
    for path in sorted(folder.glob("bench_*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        machines.append(value["machine"])
        for item in value["records"]:
            records.append(Record(**{**item, "rows": tuple(item["rows"])}))
    if not machines:
        raise ValueError(f"no results in {folder}: run `make bench` first")
    if any(machine != machines[0] for machine in machines):
        raise ValueError(f"the files in {folder} come from different machines or sizes: {machines}")
    return machines[0], records
