"""The table of slopes: printed, as Markdown and CSV beside a run; in the README on request."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from growth_fit import CURVES, Series, finding, number, series_of
from records import Record

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- growth: begin -->", "<!-- growth: end -->"
HEAD = (
    "| curve | line | x | y | exponent, all points / upper half | fit | its error |\n|"
    + " --- |" * 7
)
NAMES = {0: "", 1: " x", 2: " x²"}


def law(line: Series) -> str:
    """The sum of powers that fits the points."""
    terms = zip(line.fit.factors, CURVES[line.curve].powers, strict=True)
    shown = [f"{factor:.3g}{NAMES[power]}" for factor, power in terms if factor]
    return " + ".join(shown).replace("+ -", "- ")


def cells(line: Series) -> str:
    """One line of the table."""
    exponents = (line.fit.exponent, line.fit.upper_exponent)
    shown = " / ".join("-" if e is None else f"{e:.2f}" for e in exponents)
    x, y = (f"{number(v[0])} to {number(v[-1])}" for v in (line.x, line.y))
    unit = CURVES[line.curve].unit
    return (
        f"| {line.curve} | {line.name} | {x} | {y} {unit} | {shown} | {law(line)} "
        f"| {line.fit.error:.1%} |"
    )


def table(records: Sequence[Record]) -> str:
    """A line for each line of each curve, and what each curve says."""
    lines = series_of(records)
    if not lines:
        return "No growth curve is in this run.\n"
    said = [
        f"- `{curve}`: {finding(list(some))}."
        for curve, some in groupby(lines, key=lambda line: line.curve)
    ]
    return "\n".join([HEAD, *map(cells, lines), "", *said]) + "\n"


def stored(line: Series) -> dict[str, object]:
    """The line and its fit, for a file."""
    curve = CURVES[line.curve]
    return {
        "curve": line.curve,
        "series": line.name,
        "unit": curve.unit,
        "x": " ".join(f"{x:g}" for x in line.x),
        "y": " ".join(f"{y:.6g}" for y in line.y),
        "exponent": line.fit.exponent,
        "upper_exponent": line.fit.upper_exponent,
        "powers": " ".join(map(str, curve.powers)),
        "factors": " ".join(f"{factor:.6g}" for factor in line.fit.factors),
        "relative_error": line.fit.error,
    }


def write(folder: Path, records: Sequence[Record]) -> str:
    """The table, which is written as `growth.md` and `growth.csv` into the folder of a run."""
    text, rows = table(records), [stored(line) for line in series_of(records)]
    (folder / "growth.md").write_text(text, encoding="utf-8")
    if rows:
        with (folder / "growth.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return text


def commit(text: str, pictures: Sequence[Path], readme: Path = HERE / "README.md") -> None:
    """Puts the table and links to the pictures between the marks in the README."""
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    links = [
        f"![{path.stem}]({path.resolve().relative_to(readme.resolve().parent)})"
        for path in pictures
    ]
    body = "\n\n".join([text, *links])
    readme.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")
