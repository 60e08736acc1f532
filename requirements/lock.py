"""Writes the pinned environments beside this file: `runtime`, `development` and `tensorflow.lock`.

pip resolves what pyproject.toml allows, with the pins below; the answer is stored name by name.
torch is written without its local version (`+cpu`, `+cu130`): one lock file serves every build.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
PINS = ["torch==2.13.0", "transformers==5.23.0"]
DEVELOPMENT = [
    "triton==3.7.1", "accelerate", "build", "clang-format", "datasets", "hypothesis", "mypy",
    "onnx", "onnxruntime", "onnxscript", "peft", "pytest", "pytest-benchmark", "pytest-timeout",
    "pytest-xdist", "ruff", "scipy", "sentence-transformers",
]  # fmt: skip


def resolve(requirements: list[str]) -> list[str]:
    """The pinned closure of `requirements`, sorted by name."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    report = subprocess.run(
        [*command, "--report", "-", *requirements], check=True, capture_output=True, text=True
    )
    packages = [item["metadata"] for item in json.loads(report.stdout)["install"]]
    return sorted(f"{p['name'].lower()}=={p['version'].split('+')[0]}" for p in packages)


def main() -> None:
    """Resolves the environments and writes them."""
    with (HERE.parent / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    build = project["build-system"]["requires"]
    runtime = [*PINS, *project["project"]["dependencies"], *build]
    environments = {
        "runtime": runtime,
        "development": runtime + DEVELOPMENT,
        # Its own folder: it is large, and never in one process with torch.
        "tensorflow": project["project"]["optional-dependencies"]["tensorflow"],
    }
    for name, requirements in environments.items():
        lines = [
            f"# Written by requirements/lock.py: the pinned {name} environment.",
            *resolve(requirements),
        ]
        (HERE / f"{name}.lock").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
