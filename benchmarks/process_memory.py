"""What Linux says of the memory of this process."""

from __future__ import annotations

from pathlib import Path


def status_mib(name: str) -> float:
    """A field of /proc/self/status: VmRSS is resident now, VmHWM was at most.

    `getrusage` would not do: its maximum is inherited from the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024
