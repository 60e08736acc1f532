"""Only the last program of each launch runs in the interpreter: tensors may be of any size then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture
def last_program_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is launched runs its last program alone; random numbers begin anew."""
    last = [0, 0, 0]
    make = interpreter.GridExecutor.__init__

    def start(self: Any, fn: Any, names: Any, grid: Any, *rest: Any) -> None:
        last[: len(grid)] = [count - 1 for count in grid]
        last[len(grid) :] = [0] * (3 - len(grid))
        make(self, fn, names, (1,) * len(grid), *rest)

    def program(self: Any, axis: int) -> Any:
        return interpreter.TensorHandle(np.array([last[axis]], dtype=np.int32), tl.int32)

    monkeypatch.setattr(interpreter.GridExecutor, "__init__", start)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", program)
    # It copies each storage onto itself, which would touch every page.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    torch.manual_seed(0)
