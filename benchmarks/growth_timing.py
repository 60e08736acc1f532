"""Times the points of a growth curve: all sides in turn, once their losses agree."""

from __future__ import annotations

import time

import numpy as np
import torch
from peers import Step
from torch import Tensor
from workload import Setting, relative_error

MAX_ROUNDS, MOST_SECONDS = 7, 2.0


def timed(setting: Setting, step: Step) -> tuple[float, Tensor]:
    """Seconds of a call, and what it returned.

    One thread of a CPU is timed by the seconds it worked: neighbours on the machine, who would bend
    a curve of single calls, take no part in them.
    """
    is_alone = setting.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if is_alone else time.perf_counter
    begun = clock()
    value = step()
    setting.synchronize()
    return clock() - begun, value


def medians(setting: Setting, steps: dict[str, Step]) -> dict[str, float]:
    """Seconds of each step, all called in turn after a first call, whose losses agree.

    Where the first call of one takes seconds it stands for all: nothing in it is warmed up.
    """
    first = {name: timed(setting, step) for name, step in steps.items()}
    losses = [value for _, value in first.values()]
    bound = 5e-3 if setting.dtype.itemsize == 2 else 1e-4
    for loss in losses:
        assert loss.isfinite().all()
        assert relative_error(loss, losses[0]) < bound, losses
    slowest = max(seconds for seconds, _ in first.values())
    if slowest > MOST_SECONDS or setting.is_smoke:
        return {name: seconds for name, (seconds, _) in first.items()}
    rounds = min(MAX_ROUNDS, 1 + int(MOST_SECONDS / slowest))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(timed(setting, step)[0])
    return {name: float(np.median(found)) for name, found in seconds.items()}
