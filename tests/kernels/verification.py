"""The summary of `make verify-kernels`: results of the inner files, kept as JSON, as one table."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kernels.closure import kernel_files
from kernels.in_process import HERE, ROOT

RESULTS = ROOT / "build" / "verification"
SUMMARY = ROOT / "benchmarks" / "kernels" / "verification.md"
Result = dict[str, Any]


class InnerFile(NamedTuple):
    """What holds for those cases of a file whose parameters do not say it."""

    op: str = ""
    """Empty: the words of the test's name."""
    target: str = "launches only"
    dtypes: tuple[str, ...] = ()
    needs_simulator: bool = False


# The slowest come first, so that two processes end at about the same time.
FILES = {
    "attention_compiled": InnerFile(target="sm_90", dtypes=("bfloat16",)),
    "rows_in_simulator": InnerFile(needs_simulator=True),
    "rows_compiled": InnerFile(dtypes=("bfloat16", "float32")),
    "attention_in_simulator": InnerFile("varlen_attention", needs_simulator=True),
    "attention_in_interpreter": InnerFile("varlen_attention", "interpreter"),
    "rows_in_interpreter": InnerFile("", "interpreter"),
    "rows_far_in_interpreter": InnerFile("", "interpreter", ("float16",)),
    "model_in_simulator": InnerFile("whole model", "sm_80", ("bfloat16", "float32"), True),
    "model_without_sync": InnerFile("whole model", dtypes=("float32",)),
    "model_in_interpreter": InnerFile("whole model", "interpreter", ("float32",)),
    "rows_traffic": InnerFile("", "sm_90", ("bfloat16", "float32"), True),
    "banded_in_simulator": InnerFile("banded_attention", needs_simulator=True),
    "banded_compiled": InnerFile(dtypes=("bfloat16",)),
    "banded_in_interpreter": InnerFile("banded_attention", "interpreter", ("float16", "float32")),
}
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
_HEAD = """\
# Verification of the Triton kernels

Written by `make verify-kernels`, which runs all cases of every inner test file of `tests/kernels/`,
each file in a process of its own. Nothing here ran on a GPU.

- `*_in_interpreter`: the kernels' source under Triton's interpreter, against the reference.
- `*_in_simulator`, `rows_traffic`: the compiled PTX of the target, executed by ptxsim on a CPU,
  which finds accesses out of bounds, races and elements that nobody wrote.
- `model_without_sync`: the host's side of a training step on tensors without values, where waiting
  for the GPU would raise.
- `*_compiled`: machine code for the target, compiled and read, not executed.

A case that is skipped counts as failed. Seconds are those of one of two processes at a time.
`code` is the hash of those kernels that the inner file reaches, prose left out: a result is stale
as soon as one of them is another.
"""
_COLUMNS = (
    "inner file",
    "op or law",
    "target",
    "dtypes",
    "cases",
    "passed",
    "failed",
    "seconds",
    "code",
    "Triton",
    "date",
)


def source_hash(name: str) -> str:
    """Hash of the kernels that an inner file exercises: results with another one are stale."""
    return hash_of(kernel_files(HERE / f"{name}.py"))


def hash_of(paths: Iterable[Path]) -> str:
    """Hash of the code of some files of the repository. Prose does not count."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        code = ast.dump(_without_prose(ast.parse(path.read_text())))
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0{code}\0".encode())
    return digest.hexdigest()[:12]


def _without_prose(tree: ast.AST) -> ast.AST:
    """The same code without docstrings; comments are gone already."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_prose(line)] or [ast.Pass()]
    return tree


def _is_prose(line: ast.stmt) -> bool:
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )


def load_results(folder: Path) -> dict[str, Result]:
    """The kept result of each inner file that has one."""
    paths = {name: folder / f"{name}.json" for name in FILES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def has_failed(result: Result) -> bool:
    return bool(result["error"]) or not all(case["passed"] for case in result["cases"])


def render(
    results: dict[str, Result], present: Mapping[str, str], *, has_simulator: bool = True
) -> str:
    """The summary as Markdown.

    Args:
        results: The kept result of each inner file that has one.
        present: `source_hash` of each inner file, with the kernels as they are.
        has_simulator: Whether ptxsim is there now.
    """
    cases = [case for result in results.values() for case in result["cases"]]
    num_failed = sum(not case["passed"] for case in cases)
    remarks = [
        *_remark("not run", [name for name in FILES if name not in results]),
        *_remark("stale", [n for n, each in results.items() if each["source"] != present[n]]),
        *_remark("failed", [name for name, each in results.items() if has_failed(each)]),
    ]
    if not has_simulator:
        remarks.append("the simulator's part is missing: ptxsim was absent")
    verdict = "Incomplete: " + "; ".join(remarks) if remarks else "Complete"
    counts = f"{len(cases):,} cases, {num_failed:,} failed"
    lines = [_HEAD, f"**{verdict}.** {counts}, {len(results)} of {len(FILES)} files have a result."]
    lines += ["", _line(_COLUMNS), _line(["---"] * 4 + ["---:"] * 4 + ["---"] * 3)]
    for name in FILES:
        if name in results:
            lines += [_line(row) for row in _rows(name, results[name], present[name])]
        else:
            lines.append(_line([f"`{name}`", "not run", *["-"] * 9]))
    failures = list(_failures(results))
    if failures:
        lines += ["", "## Failed", "", *failures]
    return "\n".join(lines) + "\n"


def _remark(what: str, names: list[str]) -> list[str]:
    return [f"{what} {', '.join(names)}"] if names else []


def _rows(name: str, result: Result, present: str) -> Iterator[list[str]]:
    """One row for each op and target, in the order in which they ran."""
    groups: dict[tuple[str, str], list[Any]] = {}
    usual = FILES[name]
    for case in result["cases"]:
        words = case["function"].removeprefix("test_").replace("_", " ")
        # An interpreted case is of no GPU, whatever settings it was launched with.
        target = usual.target if usual.target == "interpreter" else case["target"] or usual.target
        groups.setdefault((case["op"] or usual.op or words, target), []).append(case)
    label = f"`{name}`" if result["source"] == present else f"`{name}` (stale)"
    end = [f"`{result['source']}`", result["triton"], result["date"]]
    for (op, target), cases in groups.items():
        found = {dtype for case in cases for dtype in case["dtypes"]} or set(usual.dtypes)
        dtypes = ", ".join(_SHORT[dtype] for dtype in _SHORT if dtype in found)
        passed = sum(case["passed"] for case in cases)
        numbers = [len(cases), passed, len(cases) - passed]
        seconds = f"{sum(case['seconds'] for case in cases):.1f}"
        yield [label, op, target, dtypes or "see the test", *map(str, numbers), seconds, *end]
    if result["error"]:
        yield [label, f"**{result['error']}**", *["-"] * 6, *end]


def _failures(results: dict[str, Result]) -> Iterator[str]:
    for name in FILES:
        if name in results:
            if results[name]["error"]:
                yield f"- `{name}`: {results[name]['error']}"
            for case in results[name]["cases"]:
                if not case["passed"]:
                    yield f"- `{name}::{case['name']}`"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
