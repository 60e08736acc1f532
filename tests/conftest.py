"""Settings that every test shares; must run before torch or triton is imported.

A test that fails fails again: its random numbers do not depend on which tests ran before it in the
same process, which pytest-xdist decides by the clock.
"""

import os
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Small tensors on two threads spend more time waiting than computing.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples every time, and no verdict about the speed of a machine that others use, too.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def _begin_anew() -> None:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the generator that foreign code draws from)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """What many tests share is made by whichever of them comes first."""
    if fixturedef.scope != "function":
        _begin_anew()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    _begin_anew()
