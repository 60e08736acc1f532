"""How many programs a multiprocessor holds, against NVIDIA's occupancy calculator."""

from __future__ import annotations

import pytest

from kernels.compiled import Compiled, Occupancy


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared", "columns", "expected"),
    [
        (80, 4, 32, 0, 0, Occupancy(16, 64, "warps")),
        (80, 1, 32, 0, 0, Occupancy(32, 32, "programs")),
        (80, 8, 255, 0, 0, Occupancy(1, 8, "registers")),
        # Five warps of 96 registers fit in a quarter; of all registers at once 21 would.
        (80, 1, 96, 0, 0, Occupancy(20, 20, "registers")),
        (80, 1, 97, 0, 0, Occupancy(16, 16, "registers")),
        (80, 4, 64, 48 * 1024, 0, Occupancy(3, 12, "shared memory")),
        (80, 4, 64, 163 * 1024, 0, Occupancy(1, 4, "shared memory")),
        (90, 4, 64, 48 * 1024, 0, Occupancy(4, 16, "shared memory")),
        (90, 4, 64, 227 * 1024, 0, Occupancy(1, 4, "shared memory")),
        (100, 4, 64, 0, 256, Occupancy(2, 8, "tensor memory")),
    ],
)
def test_occupancy(
    arch: int, num_warps: int, registers: int, shared: int, columns: int, expected: Occupancy
) -> None:
    code = Compiled([], registers, 0, shared, columns)
    assert code.occupancy(arch, num_warps) == expected
