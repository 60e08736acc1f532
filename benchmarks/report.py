"""Tables of a run: printed, as Markdown and CSV beside its JSON; with `--commit` in the README."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import growth_table
from bars import BARS, Bar
from plot import draw
from records import Record, load

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- bars: begin -->", "<!-- bars: end -->"
HEAD = (
    "| # | ours against | dtype, threads | ours / peer, wall | CPU | real tokens/s, ours / peer "
    "| ratio (20-80 %) | bar | aim | |\n|" + " --- |" * 10
)


def judge(figure: float, bar: Bar) -> str:
    """What a figure reached."""
    sign = -1 if bar.is_upper else 1
    if sign * figure < sign * bar.bar:
        return "**missed**"
    return "aim met" if sign * figure >= sign * bar.aim else "bar met"


def cells(row: str, record: Record, bar: Bar | None) -> str:
    """One line of the table."""
    title = f"{record.peer}, {record.workload}".strip(", ") + (
        f", dropout {record.dropout}" if record.dropout else ""
    )
    wanted = f"{bar.bar:g} | {bar.aim:g}" if bar else "- | -"
    start = f"| {row} | {title} ({record.model}) | {record.dtype}, {record.threads} "
    if record.skipped:
        return f"{start}| | | | | {wanted} | {record.skipped} |"
    verdict = ""
    assert record.ratio is not None
    if bar:
        verdict = judge(record.ratio, bar)
    wall = f"{record.ours_seconds:.4g} / {record.peer_seconds:.4g} {record.unit}"
    cpu = ""
    if record.ours_cpu_seconds and record.peer_cpu_seconds:
        cpu = f"{record.ours_cpu_seconds:.4g} / {record.peer_cpu_seconds:.4g} s"
    speed = ""
    if record.ours_tokens_per_second and record.peer_tokens_per_second:
        speed = f"{record.ours_tokens_per_second:,.0f} / {record.peer_tokens_per_second:,.0f}"
    ratio = f"{record.ratio:.3g} ({record.ratio_20:.3g}-{record.ratio_80:.3g})"
    return f"{start}| {wall} | {cpu} | {speed} | {ratio} | {wanted} | {verdict} |"


def machine_table(title: str, machine: dict[str, Any]) -> str:
    """What the figures depend on."""
    lines = [f"| {title} | |\n| --- | --- |"]
    for name, value in machine.items():
        if name == "sizes":
            value = ", ".join(f"{key} {size}" for key, size in value.items())
        lines.append(f"| {name.replace('_', ' ')} | {'-' if value is None else value} |")
    return "\n".join(lines) + "\n"


def commands(records: list[Record]) -> str:
    """What measures each line again, alone, with the rows that it answers."""
    found: dict[str, list[str]] = {}
    for record in records:
        if record.command:
            found.setdefault(record.command, []).extend(record.rows)
    lines = [f"{', '.join(rows) or '-'}: {command}" for command, rows in found.items()]
    return "\n".join(["Each line again, alone:\n\n```text", *lines, "```\n"])


def bars_table(records: list[Record]) -> str:
    """The bars in their order, each with the fp32 counterpart; what has no result says so."""
    lines = [HEAD]
    for name, bar in BARS.items():
        found = [(r, x) for x in records for r in x.rows if r == name or r.startswith(f"{name} ")]
        for row, record in sorted(found, key=lambda pair: pair[0]):
            lines.append(cells(row, record, bar if row == name else None))
        if not any(row == name for row, _ in found):
            limits = f"{bar.bar:g} | {bar.aim:g}"
            lines.append(f"| {name} | {bar.title} | | | | | | {limits} | no case in this run |")
    others = [record for record in records if not record.rows and not record.curve]
    return "\n".join([*lines, *(cells("", record, None) for record in others)]) + "\n"


def main() -> None:
    """Writes `table.md` and `records.csv` into the folder of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commit", action="store_true", help="into README.md and results/ too")
    options = parser.parse_args()
    machine, records = load(options.folder)
    growth = growth_table.write(options.folder, records)
    newest = max(path.stat().st_mtime for path in options.folder.glob("bench_*.json"))
    machine = {"measured": time.strftime("%Y-%m-%d", time.gmtime(newest)), **machine}
    tables = f"{bars_table(records)}\n{commands(records)}"
    text = f"{machine_table('your machine', machine)}\n{tables}"
    print(text, growth, sep="\n")
    (options.folder / "table.md").write_text(text, encoding="utf-8")
    with (options.folder / "records.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Record)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(record) for record in records)
    if options.commit:
        ours = f"{machine_table('machine', machine)}\n{tables}"
        readme = HERE / "README.md"
        before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        readme.write_text(f"{before}{BEGIN}\n\n{ours}\n{END}{after}", encoding="utf-8")
        growth_table.commit(growth, draw(options.folder, HERE / "plots"))
        (HERE / "results").mkdir(exist_ok=True)
        for path in (*options.folder.glob("bench_*.json"), *options.folder.glob("*.csv")):
            shutil.copy(path, HERE / "results")


if __name__ == "__main__":
    main()
