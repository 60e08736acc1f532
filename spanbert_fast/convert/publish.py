"""A new folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_free(output: Path) -> None:
    """Raises FileExistsError if there is something at `output` that is not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not empty")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A scratch folder beside `output` that takes its place when the block ends without an error.

    Raises:
        FileExistsError: `output` exists and is not empty.
    """
    check_free(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}_", dir=output.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if output.exists():
            output.rmdir()
        os.replace(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
