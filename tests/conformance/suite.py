"""Imports Hugging Face's test classes, and runs what our contract refuses as what it is.

Their files are taken as they are. Three of the modules that they import are not in the source
archive; what stands in for them is here.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
import tomllib
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import transformers

from conformance.fetch import folder_of

TABLE = Path(__file__).with_name("deviations.toml")
FOLDER = folder_of(transformers.__version__)
PACKAGE = "hugging_face_tests"

# Fields that any configuration takes, none at its default: ConfigTester sets and reads each.
CONFIG_FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "no", 1: "yes", 2: "perhaps"},
    "label2id": {"no": 0, "yes": 1, "perhaps": 2},
    "problem_type": "regression",
}


class Deviation(NamedTuple):
    """A test of theirs that our models do not pass, and must not start to pass unnoticed."""

    classes: str
    test: str
    raises: str
    """Searched in the name and the message of what it raises."""
    reason: str
    versions: str = ""
    """The transformers versions that it concerns, by their beginning; all by default."""

    @property
    def is_here(self) -> bool:
        """Whether it concerns the version that is installed."""
        return transformers.__version__.startswith(self.versions)


class Adaptation(NamedTuple):
    """A method of theirs that our suite overrides, or a name in their module that it replaces."""

    classes: str
    method: str
    reason: str


def _table() -> dict[str, Any]:
    with TABLE.open("rb") as file:
        return tomllib.load(file)


def deviations() -> list[Deviation]:
    """What our models do not pass, in the order of the table."""
    return [Deviation(**row) for row in _table()["deviation"]]


def adaptations() -> list[Adaptation]:
    """What is adapted for them to run, in the order of the table."""
    return [Adaptation(**row) for row in _table()["adaptation"]]


def quick_tests() -> list[str]:
    """Names of the tests that `make test` runs; the others are marked slow."""
    names: list[str] = _table()["quick"]
    return names


def load(name: str) -> ModuleType:
    """Their module `name`, for instance "test_modeling_common".

    Skips the module that asks for it, as one counted skip, if the suite was not fetched.
    """
    if not (FOLDER / "tests").is_dir():
        pytest.skip(
            f"Hugging Face's tests {transformers.__version__} are not in {FOLDER}: "
            "`make conformance` fetches them",
            allow_module_level=True,
        )
    if PACKAGE not in sys.modules:
        sys.path.append(str(FOLDER / "site"))
        _enter(PACKAGE, [FOLDER / "tests"])
        for module, values in (
            ("exporters.test_export", {"ExportTesterMixin": type("ExportTesterMixin", (), {})}),
            ("generation.test_utils", {"GenerationTesterMixin": type("Generation", (), {})}),
            ("utils.test_configuration_utils", {"config_common_kwargs": CONFIG_FIELDS}),
        ):
            _enter(f"{PACKAGE}.{module.partition('.')[0]}", [])
            vars(_enter(f"{PACKAGE}.{module}")).update(values)
        _enter_judges_of_pipelines()
    # They read the sources of transformers beside them, to find the package that is imported.
    theirs = "transformers.utils.direct_transformers_import"
    with mock.patch(theirs, return_value=transformers):
        return importlib.import_module(f"{PACKAGE}.{name}")


def _enter_judges_of_pipelines() -> None:
    # Version 5.22 imports them all; `conformance.pipelines` has those that judge our models.
    _enter(f"{PACKAGE}.pipelines", [])
    source = (FOLDER / "tests" / "test_pipeline_mixin.py").read_text("utf-8")
    for module, name in re.findall(r"^from \.(pipelines\.\w+) import (\w+)$", source, re.MULTILINE):
        setattr(_enter(f"{PACKAGE}.{module}"), name, type(name, (), {}))


def _enter(name: str, path: list[Path] | None = None) -> ModuleType:
    module = ModuleType(name)
    if path is not None:
        module.__path__ = [str(folder) for folder in path]
    sys.modules[name] = module
    return module


@contextmanager
def known_as(**classes: tuple[str, ...]) -> Iterator[None]:
    """Our class names in their tables of heads, as `MASKED_LM=("Model",)`, for a while.

    Their tests ask these tables which labels a class takes.
    """
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    with (
        mock.patch.dict(auto.MODEL_MAPPING_NAMES),
        mock.patch.dict(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    ):
        for kind, names in classes.items():
            prefix = "MODEL" if kind == "BASE" else f"MODEL_FOR_{kind}"
            getattr(auto, f"{prefix}_MAPPING_NAMES")["spanbert_fast"] = names
        yield


def held_to(label: str) -> Callable[[type], type]:
    """Decorates a test class: the deviations of this set of classes must fail, as the table says.

    Such a test counts as skipped, with the reason of the table. If it passes, or raises anything
    else, it fails.
    """

    def decorate(cases: type) -> type:
        for row in deviations():
            if row.classes == label and row.is_here:
                setattr(cases, row.test, _must_fail(getattr(cases, row.test), row))
        return cases

    return decorate


def _must_fail(test: Callable[..., None], row: Deviation) -> Callable[..., None]:
    @functools.wraps(test)
    def run(self: unittest.TestCase) -> None:
        try:
            # A failure in a subtest would be reported as one of the whole.
            with mock.patch.object(self, "subTest", return_value=nullcontext()):
                test(self)
        except unittest.SkipTest:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            if not re.search(row.raises, said):
                raise
            self.skipTest(f"contract: {row.reason}")
        self.fail(f"{row.test} passes now: take it out of {TABLE.name}")

    return run
