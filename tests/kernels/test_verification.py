"""The summary of `make verify-kernels`, and the results that it is made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kernels import closure, verification, verify
from kernels.closure import kernel_files
from kernels.in_process import HERE
from kernels.verification import FILES, has_failed, hash_of, load_results, render
from kernels.verify import run_file

NEW = dict.fromkeys(FILES, "new")
END = ["`new`", "3.7.1", "2026-11-26"]


def case(op: str | None, target: str | None, passed: bool = True, **rest: Any) -> dict[str, Any]:
    usual = {"name": "test_law[x]", "function": "test_a_law", "dtypes": [], "seconds": 1.5}
    return usual | {"op": op, "target": target, "passed": passed} | rest


def result(*cases: dict[str, Any], source: str = "new", error: str = "") -> dict[str, Any]:
    kept = {"source": source, "triton": "3.7.1", "date": "2026-11-26", "seconds": 9.0}
    return kept | {"error": error, "cases": list(cases)}


def rows(text: str, name: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_cases_are_summed_by_op_and_target() -> None:
    found = result(
        case("bias_gelu", "sm_80", dtypes=["bfloat16"]),
        case("bias_gelu", "sm_80", False, dtypes=["float16", "float32"], name="test_law[y]"),
        case("bias_gelu", "sm_90", dtypes=["bfloat16"]),
        case(None, None),
    )
    text = render({"rows_compiled": found}, NEW)
    assert [row[1:] for row in rows(text, "rows_compiled")] == [
        [
            "bias_gelu",
            "sm_80",
            "bf16, fp16, fp32",
            "2",
            "1",
            "1",
            "3.0",
            "`new`",
            "3.7.1",
            "2026-11-26",
        ],
        ["bias_gelu", "sm_90", "bf16", "1", "1", "0", "1.5", *END],
        [
            "a law",
            "launches only",
            "bf16, fp32",
            "1",
            "1",
            "0",
            "1.5",
            "`new`",
            "3.7.1",
            "2026-11-26",
        ],
    ]
    assert "4 cases, 1 failed, 1 of 14 files" in text
    assert "failed rows_compiled.**" in text
    assert text.count("- `rows_compiled::test_law[y]`") == 1
    assert has_failed(found)


def test_complete_summary_says_so() -> None:
    text = render({name: result(case("op", "sm_90")) for name in FILES}, NEW)
    assert "**Complete.** 14 cases, 0 failed, 14 of 14" in text
    assert "## Failed" not in text
    assert rows(text, "rows_far_in_interpreter")[0][2] == "interpreter"


def test_results_of_other_kernels_are_marked_stale() -> None:
    kept = {name: result(case("op", "sm_90")) for name in FILES}
    kept["rows_traffic"] = result(case("op", "sm_90"), source="old")
    text = render(kept, NEW)
    assert "**Incomplete: stale rows_traffic.**" in text
    assert text.count("(stale)") == 1
    assert rows(text, "rows_traffic")[0][0] == "`rows_traffic` (stale)"


def test_a_process_that_died_is_a_failure() -> None:
    died = result(case("op", "sm_80"), error="the process ended with -11")
    text = render({"rows_in_simulator": died}, NEW)
    assert has_failed(died)
    assert len(rows(text, "rows_in_simulator")) == 2
    assert "- `rows_in_simulator`: the process ended with -11" in text


def test_what_did_not_run_is_named() -> None:
    text = render({}, NEW, has_simulator=False)
    assert "the simulator's part is missing" in text
    assert all(rows(text, name)[0][1] == "not run" for name in FILES)


def test_without_the_simulator_the_sweep_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []
    monkeypatch.setattr(verify, "HAS_SIMULATOR", False)
    monkeypatch.setattr(verify, "RESULTS", tmp_path)
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    monkeypatch.setattr(verify, "SUMMARY", tmp_path / "summary" / "verification.md")
    monkeypatch.setattr(verify, "run_file", lambda path, _: ran.append(path.stem) or result())
    assert verify.main([]) == 1
    compiled = {f"{name}_compiled" for name in ("attention", "banded", "rows")}
    compiled.add("model_without_sync")
    interpreted = {"rows_far_in_interpreter"}
    interpreted |= {f"{name}_in_interpreter" for name in ("attention", "banded", "rows", "model")}
    assert set(ran) == compiled | interpreted
    assert "simulator's part is missing" in capsys.readouterr().out
    assert "simulator's part is missing" in verify.SUMMARY.read_text()


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_exit_code_says_whether_anything_failed(
    passed: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "HAS_SIMULATOR", True)
    for name in ("RESULTS", "ROOT"):
        monkeypatch.setattr(verify, name, tmp_path)
    monkeypatch.setattr(verify, "SUMMARY", tmp_path / "verification.md")
    monkeypatch.setattr(verify, "run_file", lambda *_: result(case("op", "sm_80", passed)))
    assert verify.main(["--only", "rows_compiled"]) == code


INNER = """\
from typing import NamedTuple
import pytest, torch
class Variant(NamedTuple):
    arch: int
    kernel: str
    dtypes: tuple
@pytest.mark.parametrize("variant", [Variant(80, "forward", (torch.float16, None))])
def test_fits(variant): pass
@pytest.mark.parametrize("op", ["bias_gelu"])
@pytest.mark.parametrize("target", [80, 90])
def test_runs(op, target): assert target == 80
def test_skipped(): pytest.skip("no reason")
"""


def test_outcomes_are_those_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "rows_compiled.py"
    path.write_text(INNER)
    found = run_file(path, tmp_path)
    assert load_results(tmp_path) == {"rows_compiled": json.loads(json.dumps(found))}
    cases = [(c["op"], c["target"], c["dtypes"], c["passed"]) for c in found["cases"]]
    assert cases == [
        ("attention_forward", "sm_80", ["float16"], True),
        ("bias_gelu", "sm_80", [], True),
        ("bias_gelu", "sm_90", [], False),
        (None, None, [], False),
    ]
    assert not found["error"]
    assert "assert 90 == 80" in (tmp_path / "rows_compiled.log").read_text()


def test_a_file_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows_compiled.py"
    path.write_text("import spanbert_fast.nothing")
    assert run_file(path, tmp_path)["error"] == "the process ended with 2"


def test_prose_leaves_results_fresh_and_code_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = tmp_path / "norm.py"
    monkeypatch.setattr(verification, "ROOT", tmp_path)
    hashes = []
    for text in (
        'def f(x):\n    """One."""\n    return x + 1\n',
        'def f(x):\n    """Two."""\n    # Why.\n    return x + 1\n',
        'def f(x):\n    """Two."""\n    return x + 2\n',
    ):
        kernel.write_text(text)
        hashes.append(hash_of([kernel]))
    assert hashes[0] == hashes[1] != hashes[2]


TREE = {
    "spanbert_fast/__init__.py": "def __getattr__(name): ...\n"
    "if TYPE_CHECKING:\n    from spanbert_fast.model import Model as Model\n",
    "spanbert_fast/model.py": "from spanbert_fast.ops.gelu import gelu",
    "spanbert_fast/ops/__init__.py": "from spanbert_fast.ops.gelu import gelu as gelu\n"
    "from spanbert_fast.ops.norm import normed as normed",
    "spanbert_fast/ops/gelu.py": "from spanbert_fast import _core\n_core.bits()",
    "spanbert_fast/ops/norm.py": "import torch",
    "spanbert_fast/kernels/__init__.py": "from spanbert_fast.kernels.cache import use",
    "spanbert_fast/kernels/cache.py": "import os",
    "spanbert_fast/kernels/common.py": "import triton",
    "spanbert_fast/kernels/gelu.py": "from spanbert_fast.kernels.common import launch",
    "spanbert_fast/kernels/norm.py": "from spanbert_fast.kernels import common, segments",
    "spanbert_fast/kernels/segments.py": "import triton",
    "tests/kernels/cases.py": "from spanbert_fast import ops\ndef run(): return ops.normed()",
    "tests/kernels/by_op.py": "from kernels.cases import run",
    "tests/kernels/by_model.py": "import spanbert_fast as sf\ndef f(): return sf.Model()",
    "tests/kernels/by_name.py": "def f():\n    from spanbert_fast.kernels import segments",
    "tests/kernels/by_alias.py": "from spanbert_fast.ops import gelu as normed",
}
EVERY = {"__init__", "cache"}


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ("by_op", {"common", "norm", "segments"}),
        ("by_model", {"common", "gelu"}),
        ("by_name", {"segments"}),
        ("by_alias", {"common", "gelu"}),
    ],
)
def test_an_inner_file_reaches_what_it_uses(
    inner: str, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(closure, "ROOT", tmp_path)
    monkeypatch.setattr(closure, "HERE", tmp_path / "tests" / "kernels")
    found = kernel_files(tmp_path / "tests" / "kernels" / f"{inner}.py")
    assert {path.stem for path in found} == expected | EVERY


def reached(name: str) -> set[str]:
    """Rooms of the kernels that an inner file of ours reaches, without what all of them do."""
    room = closure.ROOT / "spanbert_fast" / "kernels"
    paths = (path.relative_to(room).parts[0] for path in kernel_files(HERE / f"{name}.py"))
    return {part.removesuffix(".py") for part in paths} - EVERY - {"common"}


OF_ROWS = {"activation", "cross_entropy", "embedding", "norm", "rows", "segments", "span_boundary"}
OF_ROWS |= {"vocabulary"}


@pytest.mark.parametrize("name", FILES)
def test_inner_files_are_stale_by_what_they_exercise(name: str) -> None:
    """A kernel that is added makes nobody's results stale; one that is left out would hide."""
    expected = {
        "attention": {"attention"},
        "banded": {"banded_attention", "rows"},
        "rows": OF_ROWS,
        "model": OF_ROWS | {"attention"},
    }[name.split("_")[0]]
    if name == "banded_in_interpreter":
        # It takes a log-sum-exp from there.
        expected = expected | {"attention"}
    assert reached(name) == expected


def test_every_kernel_is_exercised() -> None:
    kernels = (closure.ROOT / "spanbert_fast" / "kernels").rglob("*.py")
    exercised = {path for name in FILES for path in kernel_files(HERE / f"{name}.py")}
    # It launches none itself, and is tested by the warm-up.
    assert {path.stem for path in set(kernels) - exercised} == {"ahead"}
