"""Where Triton keeps compiled kernels: its own choice, or what a variable of ours names."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from triton import knobs

VARIABLE = "SPANBERT_FAST_TRITON_CACHE"


def use_named_directory() -> None:
    """Has Triton keep compiled kernels where the environment names a directory, if it does.

    Raises:
        ValueError: The directory can't be made or written.
    """
    if not is_named():
        return
    named = os.environ[VARIABLE]
    path = Path(named).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"{VARIABLE} is {named!r}, allowed is a directory that can be made and written: "
            f"{error.strerror}"
        ) from error
    # Triton would hand the directory on in an environment variable; importing a room must not.
    propagates, knobs.propagate_env = knobs.propagate_env, False
    try:
        knobs.cache.dir = str(path)
    finally:
        knobs.propagate_env = propagates


def is_named() -> bool:
    """Whether the environment names the directory."""
    return bool(os.environ.get(VARIABLE))


def directory() -> Path:
    """The directory of compiled kernels in use; it need not exist yet."""
    return Path(knobs.cache.dir)
