"""Fetches Hugging Face's test suite: `python tests/conformance/fetch.py VERSION`.

It is in the source archives of transformers, not in the wheels. `build/conformance/VERSION` gets
the few files that are needed in `tests/`, and in `site/` what they import; that is transformers
itself too, unless this environment has the version already.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "conformance.lock"
FILES = (
    "test_configuration_common.py",
    "test_modeling_common.py",
    "test_pipeline_mixin.py",
    "test_training_mixin.py",
)


def locked() -> dict[str, list[str]]:
    """The versions in the lock file, by package, in its order."""
    pins: dict[str, list[str]] = {}
    for line in LOCK.read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins.setdefault(name, []).append(version)
    return pins


def folder_of(version: str) -> Path:
    """Where the suite of this version of transformers is, once fetched.

    The variable SPANBERT_FAST_CONFORMANCE names another folder of suites.
    """
    default = ROOT / "build" / "conformance"
    return Path(os.environ.get("SPANBERT_FAST_CONFORMANCE", default)) / version


def pip(*arguments: str) -> None:
    options = ["--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", *options], check=True
    )


def unpack(archive: Path, folder: Path) -> None:
    """Writes the needed files of a source archive into `folder`.

    Raises:
        KeyError: The archive lacks one of them.
    """
    folder.mkdir()
    stem = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as opened:
        for name in FILES:
            member = opened.extractfile(f"{stem}/tests/{name}")
            assert member is not None
            (folder / name).write_bytes(member.read())


def fetch(version: str) -> None:
    """Makes `folder_of(version)`, whole or not at all."""
    pins = locked()
    target = folder_of(version)
    target.parent.mkdir(parents=True, exist_ok=True)
    packages = [f"{name}=={pin}" for name, (pin, *_) in pins.items() if name != "transformers"]
    if importlib.metadata.version("transformers") != version:
        packages.append(f"transformers=={version}")
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        partial = Path(name)
        wanted = ["--no-binary", ":all:", "--no-build-isolation", f"transformers=={version}"]
        pip("download", *wanted, "--dest", str(partial))
        (archive,) = partial.glob("*.tar.gz")
        unpack(archive, partial / "tests")
        archive.unlink()
        pip("install", "--no-compile", "--target", str(partial / "site"), *packages)
        shutil.rmtree(target, ignore_errors=True)
        (partial / "whole").mkdir()
        for each in ("tests", "site"):
            (partial / each).rename(partial / "whole" / each)
        (partial / "whole").rename(target)


if __name__ == "__main__":
    (asked,) = sys.argv[1:]
    if asked not in locked()["transformers"]:
        sys.exit(f"{LOCK} has no transformers=={asked}")
    fetch(asked)
