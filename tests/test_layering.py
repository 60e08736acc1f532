"""The arrows between rooms, read from the source: who may import whom."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "spanbert_fast"
ALL = {"*"}

# room -> (own rooms it may import, outside packages it may import)
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    # huggingface_hub: the decorator that a configuration class of transformers has to carry.
    "config": (set(), {"transformers", "huggingface_hub"}),
    "batch": (set(), {"torch"}),
    "kernels": ({"kernels"}, {"torch", "triton"}),
    "ops": ({"ops"}, {"torch"}),
    "ops.dispatch": ({"ops", "kernels"}, {"torch"}),
    "ops.random": ({"ops", "_core"}, {"torch"}),
    "data": (
        {"config", "batch", "data", "_core"},
        {"numpy", "torch", "pyarrow", "tokenizers", "transformers", "zstandard", "sentencex"},
    ),
    "model": ({"config", "batch", "ops", "model"}, {"torch"}),
    # Refuses weights by what their file says of them.
    "model.loading": ({"config", "model"}, {"torch", "safetensors", "huggingface_hub"}),
    "model.segmentation": ({"config", "batch", "ops", "model", "_core"}, {"torch"}),
    # `pretrained` and the two files that its Hugging Face classes are spread over.
    "model.pretrained": ({"config", "batch", "ops", "model"}, {"torch", "transformers"}),
    "model.backbone": ({"config", "batch", "ops", "model"}, {"torch", "transformers"}),
    "model.outputs": ({"config", "batch", "ops", "model"}, {"torch", "transformers"}),
    "model.patch": ({"config", "batch", "ops", "model"}, {"torch", "transformers"}),
    "tasks": (
        {"config", "batch", "ops", "model", "data.tokenizer", "data.sentences", "tasks"},
        {"torch", "transformers"},
    ),
    "convert": (
        {"config", "model", "tasks", "convert"},
        {"torch", "safetensors", "numpy", "transformers"},
    ),
    # TensorFlow inside functions, in a process of its own; so torch must not be in it.
    "convert.tensorflow_process": ({"convert.isolated"}, {"numpy", "safetensors", "tensorflow"}),
    "train": (
        {"config", "batch", "data", "model", "tasks", "train"},
        {"torch", "transformers", "safetensors", "tensorboard", "matplotlib"},
    ),
    "diagnose": (ALL, ALL),
    "cli": (ALL, ALL),
    "__main__": ({"cli"}, set()),
    "__init__": (ALL, set()),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """Dotted name below the package, without `.py`; a room's `__init__` is the room."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if len(parts) > 1 and parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def rule_for(name: str) -> tuple[set[str], set[str]]:
    """The most specific row of the table."""
    while name not in ALLOWED:
        assert "." in name, f"{name} is a room without a row in the table"
        name = name.rpartition(".")[0]
    return ALLOWED[name]


def imports_of(path: Path) -> list[str]:
    """Full dotted names of everything a file imports at any depth, except under TYPE_CHECKING."""
    names = []
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def covers(allowed: set[str], name: str) -> bool:
    """Whether `name`, or a room around it, stands in `allowed`."""
    return bool(allowed & ALL) or any(name == a or name.startswith(a + ".") for a in allowed)


@pytest.mark.parametrize("path", FILES, ids=room_of)
def test_imports_follow_the_table(path: Path) -> None:
    room = room_of(path)
    own, outside = rule_for(room)
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top == "spanbert_fast":
            assert covers(own, rest), f"{room} may not import {name}"
        elif top not in sys.stdlib_module_names:
            assert covers(outside, top), f"{room} may not import {name}"
            assert not name.startswith("torch.distributed") or room.startswith("train"), (
                f"{room} may not import {name}"
            )


def test_only_bindings_include_pybind11() -> None:
    sources = (PACKAGE.parent / "csrc").iterdir()
    including = [path.name for path in sources if "pybind11" in path.read_text()]
    assert sorted(including) == ["bindings.cpp", "bindings_segmentation.cpp"]


def test_files_and_lines_stay_within_the_style_card() -> None:
    for path in [*FILES, *sorted((PACKAGE.parent / "csrc").iterdir())]:
        lines = path.read_text().splitlines()
        limit = 450 if "kernels" in path.parts else 300
        assert len(lines) <= limit, f"{path.name} has {len(lines)} lines, allowed are {limit}"
        # As ruff does, a remark for a tool at the end of a line is not counted.
        code = [re.sub(r"  # (type: ignore|noqa).*", "", line) for line in lines]
        long = [number for number, line in enumerate(code, 1) if len(line) > 100]
        assert not long, f"{path.name} has lines over 100 characters: {long}"


def test_functions_stay_within_the_style_card() -> None:
    for path in FILES:
        limit = 100 if "kernels" in path.parts else 50
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                # What is read as code: neither docstring nor a signature given by others.
                body = node.body[1:] if ast.get_docstring(node) else node.body
                size = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert size <= limit, f"{path.name}: {node.name} has {size} lines, allowed {limit}"
