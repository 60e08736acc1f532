"""The package as users get it: light, small, complete, and the same from sdist and tree."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import spanbert_fast as sf

ROOT = Path(__file__).resolve().parents[1]


def contents(wheel: Path) -> dict[str, str]:
    """SHA-256 per file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One wheel built from the sdist, one from the tree."""
    from_sdist, from_tree = tmp_path_factory.mktemp("sdist"), tmp_path_factory.mktemp("tree")
    build = [sys.executable, "-m", "build", "--no-isolation", str(ROOT)]
    for arguments in (["--outdir", str(from_sdist)], ["--wheel", "--outdir", str(from_tree)]):
        done = subprocess.run([*build, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return next(from_sdist.glob("*.whl")), next(from_tree.glob("*.whl"))


def test_sdist_and_tree_give_the_same_wheel(built: tuple[Path, Path]) -> None:
    from_sdist, from_tree = map(contents, built)
    assert from_sdist == from_tree


def test_wheel_is_small_complete_and_free_of_torch(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    wheel = built[0]
    assert wheel.stat().st_size < 2_000_000
    names = contents(wheel)
    for source in (ROOT / "spanbert_fast").rglob("*.py"):
        assert source.relative_to(ROOT).as_posix() in names
    assert {"spanbert_fast/py.typed", "spanbert_fast/_core.pyi"} <= set(names)
    (extension,) = [name for name in names if name.startswith("spanbert_fast/_core.") and
                    not name.endswith(".pyi")]  # fmt: skip
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(extension, tmp_path)
    if sys.platform == "linux":
        listed = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
        # Names only: each line ends in a random load address, and "c10" is a hexadecimal number.
        needed = [Path(line.split()[0]).name for line in listed.splitlines()]
        assert any(name.startswith("libstdc++") for name in needed)
        assert not re.search("torch|c10|cuda|python", " ".join(needed))


def test_import_is_light_and_without_side_effects() -> None:
    program = """
import logging, os, sys, time
environment, handlers = dict(os.environ), list(logging.getLogger().handlers)
start = time.process_time()  # What others compute meanwhile does not count.
import spanbert_fast
seconds = time.process_time() - start
heavy = {"torch", "transformers", "numpy", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
assert dict(os.environ) == environment and logging.getLogger().handlers == handlers
print(seconds)
"""
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                           check=False) for _ in range(3)]  # fmt: skip
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert min(float(run.stdout) for run in runs) < 0.3


def test_version_is_the_same_everywhere() -> None:
    assert importlib.metadata.version("spanbert_fast") == sf.__version__
    assert f"version: {sf.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {sf.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", sf.__all__)
def test_public_names_resolve_and_are_documented(name: str) -> None:
    value = getattr(sf, name)
    assert name == "__version__" or value.__doc__
    assert name in dir(sf)


def test_unknown_name_raises() -> None:
    with pytest.raises(AttributeError, match="no attribute 'SpanMaster'"):
        sf.SpanMaster  # noqa: B018


@pytest.mark.parametrize("name", ["runtime", "development"])
def test_lock_files_pin_every_requirement(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.lock").read_text().splitlines()[1:]
    pins = dict(line.split("==") for line in lines)
    assert pins["torch"] == "2.13.0"
    assert ("triton" in pins) == (name == "development")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    from packaging.requirements import Requirement
    from packaging.version import Version

    for text in project["dependencies"]:
        requirement = Requirement(text)
        assert Version(pins[requirement.name]) in requirement.specifier, text
        assert "<" in str(requirement.specifier), f"{text} has no cap"
