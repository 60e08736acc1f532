"""What is known of each curve before it is measured, and what a fit finds in its points.

Fits are least squares of relative errors: a curve's points span decades, and the cheapest of them
say what does not grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from records import Record

ATTENTION, REST = "ours, attention alone", "ours, all but attention"
"""Parts of a step that `bench_growth` takes apart."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How a curve is drawn and read."""

    title: str
    x: str
    """Of the axis, with its unit."""
    y: str
    unit: str
    """Of `y`, short."""
    powers: tuple[int, ...] = (0, 1)
    """The points are fitted by a sum of these powers of x."""
    is_cost: bool = True
    """No term of the sum is below 0."""
    logarithmic: str = "xy"
    """Axes that are."""


CURVES = {
    "tokens": Curve(
        title="Step time against the number of tokens",
        x="tokens in the batch, in sequences of one length",
        y="forward and backward, seconds",
        unit="s",
    ),
    "length": Curve(
        title="Step time against length, one sequence",
        x="tokens in the sequence",
        y="forward and backward, seconds",
        unit="s",
        powers=(0, 1, 2),
    ),
    "vocabulary": Curve(
        title="The masked-word head against the vocabulary",
        x="entries of the vocabulary",
        y="forward and backward, seconds",
        unit="s",
    ),
    "padding": Curve(
        title="Speed against padding",
        x="share of padding in a padded batch",
        y="real tokens per second",
        unit="tokens/s",
        is_cost=False,
        logarithmic="",
    ),
    "memory": Curve(
        title="Memory of a training step against the batch",
        x="sequences in the batch, half of it padding if padded",
        y="peak above model and batch, MiB",
        unit="MiB",
        logarithmic="",
    ),
    "sampler": Curve(
        title="Span masking against threads",
        x="threads",
        y="million tokens per second",
        unit="million tokens/s",
        logarithmic="",
    ),
    "loader": Curve(
        title="Memory of loader and sampler against the corpus",
        x="million tokens in the shards",
        y="above the imports, MiB",
        unit="MiB",
        logarithmic="x",
    ),
    "prepare": Curve(
        title="Peak memory of prepare against the text",
        x="text, MB",
        y="above the imports, MiB",
        unit="MiB",
        logarithmic="x",
    ),
}


class Fit(NamedTuple):
    """Exponent of a power law, and the factors of the powers that a curve is made of."""

    exponent: float | None
    """Slope of log y against log x, over all points; None if an x is 0."""
    upper_exponent: float | None
    """The same for the upper half of the points."""
    factors: tuple[float, ...]
    """One for each of `powers`."""
    error: float
    """Root mean square of the relative errors of the sum of powers."""


def fit(x: Sequence[float], y: Sequence[float], curve: Curve) -> Fit:
    """The laws that go through the points best.

    Raises:
        ValueError: there are fewer than two different x, one is below 0, or a y is not above 0.
    """
    if len(x) != len(y) or len(set(x)) < 2:
        raise ValueError(f"x is {list(x)}, y is {list(y)}: must be pairs with at least two x")
    if min(x) < 0 or min(y) <= 0:
        raise ValueError(f"x is {list(x)}, y is {list(y)}: x must be at least 0, y above 0")
    order = np.argsort(x)
    at, cost = np.array(x, float)[order], np.array(y, float)[order]
    half = min(len(at) // 2, len(at) - 2)
    exponents = [
        float(np.polyfit(np.log(at[start:]), np.log(cost[start:]), 1)[0]) if at[0] else None
        for start in (0, half)
    ]
    return Fit(*exponents, *fit_sum(at, cost, curve))


def fit_sum(x: np.ndarray, y: np.ndarray, curve: Curve) -> tuple[tuple[float, ...], float]:
    """Factors of the powers, and the root mean square of the relative errors.

    Of all sums of some of the powers the best one is taken whose terms a cost may have.
    """
    basis = np.stack([x**power for power in curve.powers], axis=1) / y[:, None]
    scale = np.abs(basis).max(axis=0)
    best: tuple[tuple[float, ...], float] = ((0.0,) * len(scale), float("inf"))
    for number in range(1, len(scale) + 1):
        for some in map(list, combinations(range(len(scale)), number)):
            found = np.linalg.lstsq(basis[:, some] / scale[some], np.ones(len(x)), rcond=None)[0]
            factors = np.zeros(len(scale))
            factors[some] = found / scale[some]
            error = float(np.sqrt(np.mean((basis @ factors - 1) ** 2)))
            if error < best[1] and not (curve.is_cost and factors.min() < 0):
                best = tuple(factors.tolist()), error
    return best


def number(value: float) -> str:
    """A figure of a table or of an axis."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Series(NamedTuple):
    """A line of a curve: its points by x, and what fits them."""

    curve: str
    name: str
    x: list[float]
    y: list[float]
    fit: Fit
    model: str


def series_of(records: Sequence[Record]) -> list[Series]:
    """All lines of a run, in the order of `CURVES` and of measurement; one point is no line.

    Raises:
        ValueError: a record belongs to a curve that nobody described.
    """
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.curve is None:
            continue
        if record.curve not in CURVES:
            known = ", ".join(CURVES)
            raise ValueError(f"curve is {record.curve!r} in {record.case}, must be one of {known}")
        assert record.series is not None
        found.setdefault((record.curve, record.series), []).append(record)
    lines = []
    for (curve, name), points in found.items():
        x, y = (list(v) for v in zip(*sorted((p.x, p.y) for p in points), strict=True))
        if len(set(x)) > 1:
            law = fit(x, y, CURVES[curve])
            lines.append(Series(curve, name, x, y, law, points[0].model))
    return sorted(lines, key=lambda line: list(CURVES).index(line.curve))


def finding(lines: Sequence[Series]) -> str:
    """What the lines of one curve say, in a sentence; the first of them is ours.

    Where Hugging Face has several settings, the sentence speaks of its best.
    """
    ours, peers = lines[0], [line for line in lines if "Hugging Face" in line.name]
    x, y, law = ours.x, ours.y, ours.fit
    times = f"{x[-1] / x[0]:,.0f} times" if x[0] else ""
    if ours.curve == "tokens":
        return f"{times} the tokens take {y[-1] / y[0]:,.1f} times the time"
    if ours.curve == "length":
        return meeting(lines)
    if ours.curve == "sampler":
        return f"{x[-1]:g} threads mask {y[-1] / y[0]:.2f} times as much as {x[0]:g}"
    if ours.curve in ("loader", "prepare"):
        what = "corpus" if ours.curve == "loader" else "text"
        sign = "more" if y[-1] >= y[0] else "less"
        return f"{times} the {what} takes {abs(y[-1] - y[0]):,.1f} MiB {sign}"
    if ours.curve == "padding" and peers:
        ratio = y[-1] / max(peer.y[-1] for peer in peers)
        return f"at {x[-1]:.0%} padding ours is {ratio:.1f} times as fast as Hugging Face"
    if not peers or not law.factors[1]:
        return f"ours takes {number(y[0])} to {number(y[-1])} {CURVES[ours.curve].unit}"
    ratio = min(peer.fit.factors[1] for peer in peers) / law.factors[1]
    what = "entry of the vocabulary" if ours.curve == "vocabulary" else "sequence"
    return f"a further {what} costs Hugging Face {ratio:.1f} times what it costs ours"


def meeting(lines: Sequence[Series]) -> str:
    """Where attention costs as much as the rest of the step, between two points."""
    by_name = {line.name: line for line in lines}
    alone, rest = by_name.get(ATTENTION), by_name.get(REST)
    if alone is None or rest is None or alone.x != rest.x:
        return f"ours takes {number(lines[0].y[0])} to {number(lines[0].y[-1])} s"
    lead = np.log(np.array(alone.y) / np.array(rest.y))
    above = np.flatnonzero(lead > 0)
    if len(above) == 0 or above[0] == 0:
        side = "below" if len(above) == 0 else "above"
        return f"attention stays {side} all the rest"
    pair = slice(above[0] - 1, above[0] + 1)
    place = np.exp(np.interp(0, lead[pair], np.log(alone.x[pair])))
    return f"attention costs as much as all the rest at {float(f'{place:.2g}'):,.0f} tokens"
