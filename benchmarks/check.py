"""The guard: fails when a ratio of a run is more than 15 % worse than the stored one.

Ratios, not times. A baseline holds for one class of machine (CPU capability, bf16 products,
threads, sizes); one of another class is refused by name. `--store` makes a run the baseline.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bars import BARS
from records import Record, load

BASELINE = Path(__file__).with_name("baseline.json")
ALLOWED = 0.15
CLASS = ("cpu_capability", "has_bf16_products", "gpu", "threads", "sizes")


def figures(records: list[Record]) -> dict[str, float]:
    """Ratio of each row, by row, workload, dtype and model."""
    return {
        f"{row} | {r.workload} | {r.peer} | {r.dtype} | {r.model}": r.ratio
        for r in records
        for row in r.rows
        if r.ratio is not None
    }


def worse(stored: dict[str, float], found: dict[str, float]) -> list[str]:
    """One line for each figure that fell, or that is missing."""
    lines = []
    for name, before in stored.items():
        now = found.get(name)
        is_upper = BARS[name.split(" ", 1)[0]].is_upper
        if now is None:
            lines.append(f"{name}: was {before:.3g}, is missing")
        elif now > before * (1 + ALLOWED) if is_upper else now < before * (1 - ALLOWED):
            lines.append(f"{name}: was {before:.3g}, is {now:.3g}")
    return lines


def machine_class(machine: dict[str, Any]) -> dict[str, Any]:
    """What two runs must share for their ratios to be compared."""
    return {name: machine[name] for name in CLASS}


def main(arguments: list[str] | None = None) -> int:
    """0: nothing fell; 1: something did; 2: the baseline is of another class of machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--store", action="store_true")
    options = parser.parse_args(arguments)
    machine, records = load(options.folder)
    mine, found = machine_class(machine), figures(records)
    if options.store:
        value = {"class": mine, "ratios": found}
        options.baseline.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        return 0
    if not options.baseline.exists():
        print(f"{options.baseline} does not exist: store a run with --store")
        return 2
    stored = json.loads(options.baseline.read_text(encoding="utf-8"))
    if stored["class"] != mine:
        differ = [f"{k}: {v}, here {mine[k]}" for k, v in stored["class"].items() if v != mine[k]]
        print(f"the baseline is of another class of machine: {'; '.join(differ)}")
        return 2
    lines = worse(stored["ratios"], found)
    print("\n".join(lines) or f"{len(found)} ratios, none fell by more than {ALLOWED:.0%}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
