"""Slopes of growth curves are those of the points, and every picture of a run is drawn."""

from __future__ import annotations

import csv
import importlib
import math
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MACHINE = {
    "torch": "2.13.0+cpu",
    "transformers": "5.22.0",
    "cpu": "AMD EPYC",
    "gpu": None,
    "cpu_capability": "AVX2",
    "has_bf16_products": False,
    "threads": 1,
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def records(load) -> list:
    """A run with all curves and a few comparisons, one of them lost, one not measured."""
    record = load("records").Record

    def points(curve: str, series: str, law, *xs: float) -> list:
        return [record(case="c", curve=curve, series=series, x=x, y=law(x)) for x in xs]

    def ratio(case: str, workload: str, peer: str, value: float, **changes) -> object:
        spread = {"ratio_20": 0.9 * value, "ratio_80": 1.1 * value}
        common = {"dtype": "fp32 / fp32", "ours_seconds": 1.0, "peer_seconds": value}
        common |= {"ours_cpu_seconds": 1.0, "peer_cpu_seconds": value}
        return record(
            case=case, workload=workload, peer=peer, ratio=value, **spread, **common | changes
        )

    tokens, lengths = (256, 512, 1024, 2048), [64 << shift for shift in range(8)]
    peer = "Hugging Face sdpa"
    return [
        ratio("bench_training.py::a", "full-512", peer, 2.0, rows=("1",), dropout=0.1),
        ratio("bench_inference.py::a", "ragged-50", f"{peer}, padded", 0.8, rows=("8b",)),
        ratio("bench_floor.py::a", "full-512", "floor", 1.2, rows=("14a",)),
        ratio("bench_sampler.py::a", "", "plain Python twin", 200.0, rows=("15c",)),
        record(case="bench_inference.py::b", workload="full-512", skipped="no bf16"),
        *points("tokens", "ours", lambda x: 0.01 + 1e-4 * x, *tokens),
        *points("tokens", peer, lambda x: 0.02 + 2e-4 * x, *tokens),
        *points("length", "ours", lambda x: 1e-4 * x + 1e-7 * x**2, *lengths),
        *points("length", "ours, attention alone", lambda x: 1e-7 * x**2, *lengths),
        *points("length", "ours, all but attention", lambda x: 1e-4 * x, *lengths),
        *points("length", peer, lambda x: 2e-4 * x + 1e-7 * x**2, *lengths),
        *points("vocabulary", "ours", lambda x: 1e-6 * x, 8e3, 16e3),
        *points("vocabulary", peer, lambda x: 6e-6 * x, 8e3, 16e3),
        *points("padding", "ours", lambda x: 900.0, 0, 0.4, 0.8),
        *points("padding", peer, lambda x: 900 * (1 - x), 0, 0.4, 0.8),
        *points("memory", "ours", lambda x: 30.0 * x, 4, 8, 16),
        *points("memory", f"{peer}, padded", lambda x: 90.0 * x, 4, 8, 16),
        *points("sampler", "SpanMasker", lambda x: 100 * x**0.9, 1, 2, 4),
        *points("loader", "memory of its own", lambda x: 30 + 0.1 * x, 1, 4, 16),
        *points("loader", "with mapped files", lambda x: 50 + 2 * x, 1, 4, 16),
        *points("prepare", "memory of its own", lambda x: 55.0, 1, 4, 16),
    ]


def test_fit_finds_the_law_of_its_points(load) -> None:
    growth_fit = load("growth_fit")
    whole, line, speed = (growth_fit.CURVES[name] for name in ("length", "tokens", "padding"))
    x = [64.0 * 2**shift for shift in range(8)]
    square = growth_fit.fit(x, [3e-9 * v**2 for v in x], whole)
    assert square.exponent == pytest.approx(2)
    assert square.factors == pytest.approx((0, 0, 3e-9))
    mixed = growth_fit.fit(x, [0.01 + 2e-5 * v + 4e-9 * v**2 for v in x], whole)
    assert mixed.factors == pytest.approx((0.01, 2e-5, 4e-9))
    assert mixed.error < 1e-12
    assert 0 < mixed.exponent < mixed.upper_exponent < 2
    fixed = growth_fit.fit(x[::-1], [0.5 + 1e-3 * v for v in x[::-1]], line)
    assert fixed.factors == pytest.approx((0.5, 1e-3))
    flat = growth_fit.fit(x, [7.0] * 8, line)
    assert flat.exponent == pytest.approx(0, abs=1e-12)
    assert flat.factors == pytest.approx((7, 0))
    falls = growth_fit.fit([0, 0.5, 1], [3.0, 2.0, 1.0], speed)
    assert falls.exponent is falls.upper_exponent is None
    assert falls.factors == pytest.approx((3, -2))


def test_no_term_of_a_cost_is_negative(load) -> None:
    """A line below a convex curve would have a constant below 0."""
    growth_fit = load("growth_fit")
    x = [1.0, 2, 4, 8]
    found = growth_fit.fit(x, [v**1.3 for v in x], growth_fit.CURVES["tokens"])
    assert found.factors[0] == 0 < found.factors[1]
    assert 0.1 < found.error < 0.5


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [([1, 1], [1.0, 2.0], "at least two x"), ([1, 2], [1.0, 0.0], "y above 0")],
)
def test_fit_refuses_what_has_no_slope(load, x, y, message) -> None:
    growth_fit = load("growth_fit")
    with pytest.raises(ValueError, match=message):
        growth_fit.fit(x, y, growth_fit.CURVES["tokens"])


def test_an_unknown_curve_is_refused(load) -> None:
    record = load("records").Record(case="c", curve="width", series="ours", x=1, y=1)
    with pytest.raises(ValueError, match="curve is 'width'"):
        load("growth_fit").series_of([record])


def test_the_table_says_what_grows(load, records, tmp_path: Path) -> None:
    text = load("growth_table").write(tmp_path, records)
    assert "| length | ours, attention alone | 64 to 8,192 |" in text
    for sentence in (
        "`length`: attention costs as much as all the rest at 1,000 tokens",
        "a further entry of the vocabulary costs Hugging Face 6.0 times what it costs ours",
        "a further sequence costs Hugging Face 3.0 times",
        "at 80% padding ours is 5.0 times as fast",
        "16 times the corpus takes 1.5 MiB more",
        "16 times the text takes 0.0 MiB more",
    ):
        assert sentence in text
    with (tmp_path / "growth.csv").open() as file:
        rows = {(row["curve"], row["series"]): row for row in csv.DictReader(file)}
    assert float(rows["length", "ours, attention alone"]["exponent"]) == pytest.approx(2)
    assert float(rows["sampler", "SpanMasker"]["exponent"]) == pytest.approx(0.9)


def test_what_does_not_grow_is_told_without_a_ratio(load) -> None:
    growth_fit, record = load("growth_fit"), load("records").Record
    for name in growth_fit.CURVES:
        points = [
            record(case="c", curve=name, series=series, x=x, y=9.0 - x)
            for series in ("ours", "Hugging Face sdpa")
            for x in (1, 2)
        ]
        assert growth_fit.finding(growth_fit.series_of(points))
        assert growth_fit.finding(growth_fit.series_of(points[:2]))


def test_the_report_prints_slopes_too(load, records, tmp_path: Path, monkeypatch, capsys) -> None:
    load("records").save(tmp_path / "bench_x.json", MACHINE, records)
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    load("report").main()
    assert "| tokens | ours | 256 to 2,048 |" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "bench_x.json",
        "growth.csv",
        "growth.md",
        "records.csv",
        "table.md",
    }


def test_every_picture_is_drawn(load, records, tmp_path: Path) -> None:
    plot = load("plot")
    load("records").save(tmp_path / "bench_x.json", MACHINE, records)
    paths = plot.draw(tmp_path, tmp_path / "plots")
    assert sorted((tmp_path / "plots").iterdir()) == sorted(paths)
    assert {path.stem for path in paths} == {"speedups", *load("growth_fit").CURVES}
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert 5_000 < len(content) <= 150_000, path.name


def test_bars_begin_at_one_and_show_what_is_lost(load, records) -> None:
    plot = load("plot")
    compared = [record for record in records if plot.is_speedup(record)]
    figure = plot.speedups(compared, plot.caption(MACHINE))
    assert "ahead in 2 of 3" in figure.get_suptitle()
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "full-512",
        "ragged-50",
        plot.OTHER,
    ]
    bars = [axis.patches[0] for axis in figure.axes]
    assert [bar.get_x() + bar.get_width() for bar in bars] == pytest.approx([2, 0.8, 200])
    colors = [bar.get_facecolor() for bar in bars]
    assert colors[0] == colors[2] != colors[1]
    labels = [axis.get_yticklabels()[0].get_text() for axis in figure.axes]
    assert labels[0] == "step: Hugging Face sdpa, fp32, dropout 0.1"


def test_axes_hold_every_point(load, records) -> None:
    plot, growth_fit = load("plot"), load("growth_fit")
    lines = [line for line in growth_fit.series_of(records) if line.curve == "length"]
    figure = plot.curve_figure(lines, "here")
    (axis,) = figure.axes
    assert axis.get_xscale() == axis.get_yscale() == "log"
    assert list(axis.get_xticks()) == [64 << shift for shift in range(8)]
    drawn = {line.get_label(): line for line in axis.lines}
    assert "ours, attention alone (slope 2.00)" in drawn
    assert all(math.isfinite(y) for line in drawn.values() for y in line.get_ydata())


def test_the_readme_is_filled_between_its_marks(load, tmp_path: Path) -> None:
    table, readme = load("growth_table"), tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    for _ in range(2):  # what is filled can be filled again
        table.commit("new\n", [tmp_path / "plots" / "length.png"], readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("new") == text.count("![length](plots/length.png)") == 1
    assert table.BEGIN in (BENCHMARKS / "README.md").read_text()
