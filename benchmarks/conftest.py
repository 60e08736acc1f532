"""The one place that says on which device the benchmarks run, and what a run reports of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# One thread unless told, before torch is loaded; processes that a case starts inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from records import save
from workload import Setting, choose_setting

SETTING = choose_setting()


@pytest.fixture(scope="session")
def setting() -> Setting:
    """Device, dtype and sizes."""
    return SETTING


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Other people's warnings stay warnings; compilers of peers get the time they need."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))
        item.add_marker(pytest.mark.timeout(1800))


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Adds the GPU, versions and sizes to what pytest-benchmark saves."""
    machine_info.update(SETTING.machine())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints each comparison with its ratio; above 1 ours is faster."""
    if SETTING.records:
        terminalreporter.section("ours and peers, in turn, medians")
        terminalreporter.write_line(f"{SETTING.machine()}")
        for record in SETTING.records:
            terminalreporter.write_line(record.line())


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Writes the records where `SPANBERT_FAST_BENCH_OUTPUT` says, only if every case succeeded."""
    output = os.environ.get("SPANBERT_FAST_BENCH_OUTPUT")
    if output and exitstatus == 0:
        save(Path(output), SETTING.machine(), SETTING.records)
