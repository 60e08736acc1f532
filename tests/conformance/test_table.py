"""The table of what we ask of their suite: true, complete, and the one that the docs show."""

from __future__ import annotations

import importlib
import inspect
import re
import tarfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conformance import fetch, run, suite

DOCUMENT = (fetch.ROOT / "docs" / "conformance.md").read_text()
SUITES = {"sf.Model": "ModelSuite", "patched BERT": "PatchedSuite"}


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the document."""
    _, _, section = DOCUMENT.partition(f"## {heading}\n")
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_document_shows_the_table() -> None:
    wanted = [
        [row.classes, row.versions.rstrip(".") or "all", f"`{row.test}`", row.reason]
        for row in suite.deviations()
    ]
    assert rows_of("What we do not pass") == wanted
    adapted = [[row.classes, f"`{row.method}`", row.reason] for row in suite.adaptations()]
    assert rows_of("What we adapt") == adapted


def test_the_document_shows_every_version() -> None:
    shown = [row[:2] for row in rows_of("Results")]
    versions = fetch.locked()["transformers"]
    assert shown == [[version, classes] for version in versions for classes in run.SUITES]


@pytest.mark.parametrize("classes", SUITES)
def test_the_table_is_complete(classes: str) -> None:
    """Whatever a suite overrides of theirs is listed, and what is listed is there."""
    suite.load("test_modeling_common")
    module = importlib.import_module(f"conformance.{run.SUITES[classes].removesuffix('.py')}")
    cases: Any = getattr(module, SUITES[classes])
    inherited = {name for base in cases.__mro__[1:] for name in vars(base)}
    overridden = {
        name
        for name, value in vars(cases).items()
        if inspect.isfunction(value)
        and inspect.getsourcefile(inspect.unwrap(value)) == module.__file__
        and name in inherited - {*vars(unittest.TestCase)}
    }
    listed = {row.method for row in suite.adaptations() if row.classes == classes}
    assert overridden | {*getattr(cases, "replaced", {})} == listed
    for row in suite.deviations():
        assert row.classes in SUITES
        assert row.classes != classes or hasattr(cases, row.test)


def outcome_of(monkeypatch: pytest.MonkeyPatch, test: Any) -> str:
    row = suite.Deviation("ours", "test_it", "^ValueError: refused", "because")
    monkeypatch.setattr(suite, "deviations", lambda: [row])
    cases = suite.held_to("ours")(type("Cases", (unittest.TestCase,), {"test_it": test}))
    result = unittest.TestResult()
    cases("test_it").run(result)
    found = [*result.failures, *result.errors, *result.skipped]
    assert len(found) == 1
    return str(found[0][1])


def raising(error: Exception) -> Any:
    def test_it(self: unittest.TestCase) -> None:
        with self.subTest("a part"):
            raise error

    return test_it


def test_a_deviation_must_fail_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outcome_of(monkeypatch, raising(ValueError("refused")))
    assert expected == "contract: because"
    assert "test_it passes now" in outcome_of(monkeypatch, lambda self: None)
    assert "another" in outcome_of(monkeypatch, raising(ValueError("another")))
    assert "TypeError" in outcome_of(monkeypatch, raising(TypeError("refused")))
    theirs = outcome_of(monkeypatch, raising(unittest.SkipTest("needs a GPU")))
    assert theirs == "needs a GPU"


def test_outcomes_are_counted_once() -> None:
    tally = run.Tally()
    base = {"failed": False, "skipped": False, "passed": False, "when": "call", "longrepr": None}

    def see(**values: Any) -> None:
        tally.pytest_runtest_logreport(SimpleNamespace(**{**base, **values}))

    see(passed=True, when="setup")
    see(passed=True)
    see(passed=True, context="a subtest")
    see(failed=True)
    see(failed=True, when="setup")
    for reason in ("contract: because", "needs a GPU", "needs a GPU"):
        see(skipped=True, longrepr=("file", 1, f"Skipped: {reason}"))
    counts = {"passed": 1, "subtests": 1, "failed": 2, "by contract": 1, "skipped": 2}
    assert {name: number for name, number in tally.counts.items() if number} == counts
    assert tally.reasons == {"contract: because": 1, "needs a GPU": 2}


def test_versions_are_those_we_support() -> None:
    pins = fetch.locked()
    runtime = (fetch.ROOT / "requirements" / "runtime.lock").read_text()
    assert f"transformers=={pins['transformers'][0]}\n" in runtime
    supported = (fetch.ROOT / "pyproject.toml").read_text()
    oldest = re.search(r'"transformers>=([\d.]+),', supported)
    assert oldest is not None
    assert pins["transformers"][-1].startswith(f"{oldest[1]}.")


def test_an_archive_without_tests_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "transformers-1.0.tar.gz"
    (tmp_path / "README.md").write_text("no tests")
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(tmp_path / "README.md", "transformers-1.0/README.md")
    with pytest.raises(KeyError, match=fetch.FILES[0]):
        fetch.unpack(archive, tmp_path / "tests")


def test_a_suite_that_is_not_there_is_one_counted_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `make test` shows it; `make conformance` fails on the same."""
    monkeypatch.setattr(suite, "FOLDER", tmp_path)
    with pytest.raises(pytest.skip.Exception, match="`make conformance` fetches") as skipped:
        suite.load("test_modeling_common")
    assert skipped.value.allow_module_level
    with pytest.raises(SystemExit, match="was not fetched"):
        run.run_suite("0.0.0", "test_model_suite.py")
