"""The benchmarks run, at sizes that say nothing about speed, and the roofline model adds up."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


def run(*arguments: str) -> str:
    """What a Python process printed; it has to succeed."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        "SPANBERT_FAST_BENCH_SIZES": "smoke",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(3600)
def test_every_benchmark_runs() -> None:
    options = ("--benchmark-disable", "-p", "no:cacheprovider")
    # A compiled peer takes seconds, and takes the same lines on every workload.
    selected = ("-k", "not (compiled and (0.0 or ragged))")
    output = run("-m", "pytest", "benchmarks", *options, *selected)
    rows = ("8c", "10a", "10b", "[7]", "[13 growth]", "[15b]", "[9b]")
    for case in ("bench_step.py", "bench_attention.py", "bench_growth.py", *rows):
        assert case in output
    # What this machine lacks is told, not passed over.
    for reason in ("timed on a GPU only", "no CPU kernel", "no backward on a CPU"):
        assert reason in output


def test_the_comparison_of_loss_weights_runs(tmp_path: Path) -> None:
    sizes = ("--steps", "4", "--every", "2", "--seeds", "1", "--short", "400", "--long", "40")
    paths = ("--output", str(tmp_path / "runs"), "--picture", str(tmp_path / "curves.png"))
    output = run("benchmarks/loss_weighting.py", *sizes, *paths)
    assert (
        len(re.findall(r"^(weight 1|length \^ 1), (short|long): loss 3 at", output, re.MULTILINE))
        == 4
    )
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import check

    return check


def test_the_guard_sees_what_fell(check) -> None:
    stored = {"1 | a": 2.0, "14a | b": 1.2, "6 (fp32) | c": 4.0}
    assert check.worse(stored, {"1 | a": 1.71, "14a | b": 1.37, "6 (fp32) | c": 9.0}) == []
    lines = check.worse(stored, {"1 | a": 1.69, "14a | b": 1.39})
    assert len(lines) == 3
    assert "is missing" in lines[2]


def test_the_guard_refuses_another_class_of_machine(check, tmp_path: Path, capsys) -> None:
    machine = dict.fromkeys(check.CLASS, "x")
    path, baseline = tmp_path / "bench_x.json", tmp_path / "baseline.json"
    record = check.Record(case="a", rows=("1",), ratio=2.0)
    options = [str(tmp_path), "--baseline", str(baseline)]
    save = sys.modules["records"].save
    save(path, machine, [record])
    assert check.main(options) == 2
    assert check.main([*options, "--store"]) == check.main(options) == 0
    save(path, machine, [dataclasses.replace(record, ratio=1.6)])
    assert check.main(options) == 1
    save(path, {**machine, "cpu_capability": "AVX2"}, [record])
    capsys.readouterr()
    assert check.main(options) == 2
    assert "cpu_capability: x, here AVX2" in capsys.readouterr().out


def test_the_table_says_what_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    report, record = (importlib.import_module(name) for name in ("report", "records"))
    figures = {"ours_seconds": 1.0, "peer_seconds": 2.0, "ratio_20": 1.9, "ratio_80": 2.1}
    made = [
        record.Record(case="a", rows=("1", "2 (fp32)"), ratio=2.0, command="run a", **figures),
        record.Record(case="b", rows=("14a",), ratio=1.2, command="run b", **figures),
        record.Record(case="c", rows=("5",), skipped="no bf16", command="run c"),
        record.Record(case="d", rows=("11",), ratio=2.0, **figures),
    ]
    lines = {line.split("|")[1].strip(): line for line in report.bars_table(made).splitlines()}
    assert "bar met" in lines["1"]
    assert "bar met" in lines["14a"]
    assert "**missed**" in lines["11"]
    assert lines["2 (fp32)"].endswith("| - | - |  |")
    assert "no bf16" in lines["5"]
    assert "no case in this run" in lines["2"]
    assert set(report.BARS) <= set(lines)
    assert "1, 2 (fp32): run a" in report.commands(made)
    assert report.judge(1.1, report.BARS["14a"]) == "aim met"


@pytest.fixture
def roofline():
    pytest.importorskip("triton", reason="the formulas stand beside the kernels")
    from spanbert_fast.diagnose import roofline

    return roofline


def cases(roofline):
    return [(gpu, model) for gpu in roofline.GPUS for model in roofline.MODELS]


def test_the_committed_table_is_what_the_script_writes(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the formulas stand beside the kernels")
    run("benchmarks/roofline.py", "--markdown", str(tmp_path / "roofline.md"))
    written = (tmp_path / "roofline.md").read_text()
    assert written == (BENCHMARKS / "kernels" / "roofline.md").read_text()
    titles = [line for line in written.splitlines() if line.startswith("## ")]
    assert all("modelled" in title for title in titles)


def test_no_kernel_beats_a_bound(roofline) -> None:
    for gpu, model in cases(roofline):
        for time in roofline.step_times(gpu, model):
            assert time.seconds > 0
            assert all(time.seconds >= bound for bound in time.bounds)
            assert time.bounds[roofline.BOUNDS.index(time.bound)] == time.seconds


def test_no_step_beats_the_peak_of_the_tensor_cores(roofline) -> None:
    for gpu, model in cases(roofline):
        step = sum(time.seconds for time in roofline.step_times(gpu, model))
        ideal = roofline.flops_of_step(model) / (gpu.peak_tflops * 1e12)
        assert 0.2 < ideal / step < max(gpu.product_fraction, gpu.attention_fraction)


def test_products_hold_the_flops_of_the_model(roofline) -> None:
    """What is computed is what the model needs, and what the kernels compute a second time."""
    for model in roofline.MODELS:
        work = {kernel.name: kernel.flops for kernel in roofline.kernels(model)}
        forward = work["attention forward"]
        per_layer = 4 * model.num_sequences * model.length**2 * model.hidden
        assert forward == model.layers * per_layer
        # Seven products in the backward where two forward ones have five or four in the model.
        backward = work["attention backward (queries)"] + work["attention backward (keys)"]
        assert backward == 3.5 * forward
        again = 1.5 * forward + work["cross-entropy slopes"]
        assert sum(work.values()) - again == pytest.approx(roofline.flops_of_step(model), rel=1e-3)


def test_attention_formula_is_the_registered_one(roofline) -> None:
    import torch

    from spanbert_fast.kernels import attention  # noqa: F401, registers the formula

    op = torch.ops.spanbert_fast.triton_varlen_attention
    assert flop_registry[op] is roofline.attention_flops.forward_flops


def test_twice_the_batch_takes_twice_the_time(roofline) -> None:
    for gpu, model in cases(roofline):
        twice = dataclasses.replace(model, num_sequences=2 * model.num_sequences)
        once, both = (roofline.step_times(gpu, m) for m in (model, twice))
        # The optimizer and the copies of the weights do not grow.
        fixed = sum(t.seconds for t in once if t.kernel.name.startswith(("AdamW", "copies")))
        before, after = (sum(t.seconds for t in times) - fixed for times in (once, both))
        assert after == pytest.approx(2 * before, rel=0.02)


def test_the_split_of_the_first_sbo_layer_is_argued(roofline, monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = importlib.import_module("roofline")
    for gpu, model in cases(roofline):
        layer = script.boundary_layer(gpu, model)
        assert layer.split < layer.whole_rows
        assert layer.whole_rows_occupancy < layer.split_occupancy <= 1
