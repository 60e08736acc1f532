"""Work on files of unknown origin in a process of its own, with limits on memory and time.

A file made to crash, hang or exhaust its reader takes nothing else with it. The process gets the
import path of this one, but nothing of the working directory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_SECONDS = 600.0
REFUSED = 3
"""Exit status of the process for a file that it understood and will not read."""
_BASE_BYTES, _BYTES_PER_BYTE = 1 << 30, 4
_MAX_MESSAGE = 500
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class Refusal(ValueError):
    """Why a file is not read, without its name."""


def memory_budget(num_file_bytes: int) -> int:
    """Bytes that a process may take for files of this size, on top of the libraries it imports.

    The tensors, a copy of them and one more while they are written; 1 GiB for everything else.
    """
    return _BASE_BYTES + _BYTES_PER_BYTE * num_file_bytes


def run_isolated(
    module: str,
    path: Path,
    arguments: Sequence[str],
    *,
    memory_bytes: int,
    timeout_seconds: float,
) -> str:
    """What `main(memory_bytes, *arguments)` of a module of this package prints.

    Args:
        module: dotted name; its `main` gives the exit status.
        path: the file that is being worked on, for messages.
        arguments: strings.
        memory_bytes: what the process may take beyond its imports; enforced on Linux.
        timeout_seconds: the process is killed after this time.

    Raises:
        ValueError: the file was refused, or the process took too long or died.
    """
    # Not `-m`: that would put the working directory, perhaps the hostile folder, on the path.
    search = [*dict.fromkeys([*(entry for entry in sys.path if entry), _PACKAGE_ROOT])]
    code = (
        f"import sys; sys.path[:] = {search!r}; from {module} import main; "
        "sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))"
    )
    command = [sys.executable, "-I", "-c", code, str(memory_bytes), *arguments]
    # Threads reserve memory each, and reading needs none.
    quiet = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "TF_CPP_MIN_LOG_LEVEL": "3"}
    quiet |= {"TF_NUM_INTEROP_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **quiet, "CUDA_VISIBLE_DEVICES": "-1"},
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{path}: not done within {timeout_seconds:g} s, given up") from None
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    message = "".join(c if c.isprintable() else "?" for c in last)[:_MAX_MESSAGE]
    if done.returncode == REFUSED:
        raise ValueError(f"{path}: {message}")
    if done.returncode != 0:
        raise ValueError(f"{path}: the separate process ended with {done.returncode}: {message}")
    return done.stdout


def limit_memory(num_bytes: int) -> None:
    """Forbids this process to take more than `num_bytes` on top of what it has; Linux only."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    status = Path("/proc/self/status").read_text()
    sizes = {line.split(":")[0]: line.split()[1:2] for line in status.splitlines()}
    for limit, name in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        # What is mapped but not written, such as files, counts for the second limit only.
        slack = num_bytes if name == "VmSize" else 0
        wanted = int(sizes[name][0]) * 1024 + num_bytes + slack
        hard = resource.getrlimit(limit)[1]
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        resource.setrlimit(limit, (wanted, hard))


def refuse(error: Exception, memory_bytes: int) -> int:
    """Says on the standard error why a file is refused; the exit status for it."""
    text = str(error)
    # What torch, numpy and TensorFlow say when the system gives them nothing.
    if isinstance(error, MemoryError) or "allocate memory" in text or "bad_alloc" in text:
        text = f"needs more than {memory_bytes >> 20:,} MiB of memory, too much for its size"
    sys.stderr.write(" ".join(text.split())[: 4 * _MAX_MESSAGE] + "\n")
    return REFUSED
