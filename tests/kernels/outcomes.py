"""A pytest plugin: one JSON line for each case, with its outcome and what it was a case of.

`verify.py` loads it into the process that runs an inner file. A line is written as soon as a case
is over, so that a process that dies leaves what it had found.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file that gets a JSON line for each case")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--outcomes"):
        path.write_text("")
        config.pluginmanager.register(_Recorder(path))


class _Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed, self.seconds = True, 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Function) -> Generator[None, Any, Any]:
        """A case has passed if all its phases have; one that is skipped proves nothing."""
        report = yield
        if report.when == "setup":
            self.passed, self.seconds = True, 0.0
        self.passed &= report.outcome == "passed"
        self.seconds += report.duration
        if report.when == "teardown":
            line = {"name": item.name, **described(item), "passed": self.passed}
            with self.path.open("a") as file:
                print(json.dumps(line | {"seconds": self.seconds}), file=file)
        return report


def described(item: pytest.Function) -> dict[str, Any]:
    """Op, target and dtypes as the parameters of a case name them; None where they do not."""
    call = getattr(item, "callspec", None)
    facts = list(_facts(call.params.items())) if call else []
    named = dict(facts)
    target = named.get("target", named.get("arch"))
    kernel = named.get("kernel")
    return {
        "function": item.originalname,
        "op": named.get("op", kernel and f"attention_{kernel}"),
        "target": target and f"sm_{target}",
        "dtypes": sorted({str(value)[6:] for _, value in facts if isinstance(value, torch.dtype)}),
    }


def _facts(pairs: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of parameters; those inside of tuples too."""
    for name, value in pairs:
        if hasattr(value, "_asdict"):
            yield from _facts(value._asdict().items())
        elif isinstance(value, tuple):
            yield from _facts((name, each) for each in value)
        else:
            yield name, value
