"""Compiles a kernel ahead of time, for a GPU that need not be there, and reads the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes that one program may have on the data centre GPU of each generation.
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = {80: r"\bHMMA", 90: r"\bHGMMA", 100: r"\bUTC\w*MMA"}
# Registers are given to a warp in units, from a quarter of a multiprocessor's.
_REGISTER_UNIT, _QUARTERS = 256, 4
# Bytes that the driver keeps of each program's shared memory.
_RESERVED_SHARED_MEMORY = 1024
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*)")


class Multiprocessor(NamedTuple):
    """What one multiprocessor can hold (CUDA C++ Programming Guide, "Compute Capabilities")."""

    shared_memory: int
    """Bytes."""
    tensor_memory: int = 0
    """Columns."""
    warps: int = 64
    programs: int = 32
    registers: int = 65536


MULTIPROCESSOR = {
    80: Multiprocessor(164 * 1024),
    90: Multiprocessor(228 * 1024),
    100: Multiprocessor(228 * 1024, tensor_memory=512),
}


class Occupancy(NamedTuple):
    """Programs and warps that a multiprocessor holds at a time, and what sets the bound."""

    programs: int
    warps: int
    limit: str


class Compiled(NamedTuple):
    """What the machine code of a kernel needs."""

    instructions: list[str]
    registers: int
    stack: int
    """Bytes of a thread's stack frame."""
    shared_memory: int
    """Bytes of a program."""
    tensor_memory: int
    """Columns of a program; from sm_100 on, the sums of a product are kept there."""

    @property
    def num_spills(self) -> int:
        """Instructions that read or write a thread's local memory."""
        return self.count(r"\b(LDL|STL)\b")

    def occupancy(self, arch: int, num_warps: int) -> Occupancy:
        """How many programs of `num_warps` warps fit on a multiprocessor of `arch`."""
        limits = MULTIPROCESSOR[arch]
        registers = -(-32 * self.registers // _REGISTER_UNIT) * _REGISTER_UNIT
        warps = limits.registers // _QUARTERS // registers * _QUARTERS
        programs = {
            "warps": limits.warps // num_warps,
            "programs": limits.programs,
            "registers": warps // num_warps,
            "shared memory": limits.shared_memory // (self.shared_memory + _RESERVED_SHARED_MEMORY),
        }
        if self.tensor_memory:
            programs["tensor memory"] = limits.tensor_memory // self.tensor_memory
        limit = min(programs, key=lambda name: programs[name])
        return Occupancy(programs[limit], programs[limit] * num_warps, limit)

    def count(self, pattern: str) -> int:
        """Instructions that match a regular expression."""
        return sum(bool(re.search(pattern, line)) for line in self.instructions)


def compile_for(
    arch: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: Any
) -> Compiled:
    """The kernel's machine code.

    Args:
        arch: Compute capability, such as 80.
        kernel: The `@triton.jit` function.
        signature: Triton's name of the type of each argument that is not in `constants`; pointers
            and strides among them are taken to be divisible by 16.
        constants: The `tl.constexpr` arguments.
        options: Such as `num_warps`.
    """
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    divisible = [n for n in names if n.endswith(("_ptr", "_stride")) and n not in constants]
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, types, constants, hints)
    options = {"enable_fp_fusion": True} | options
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "--dump-resource-usage", file.name)
        listing = _output("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    lines = [match[1] for line in listing.splitlines() if (match := _INSTRUCTION.match(line))]
    needs = int(found[1]), int(found[2]), binary.metadata.shared, binary.metadata.tmem_size
    return Compiled(lines, *needs)


def _output(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
