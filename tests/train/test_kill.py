"""Kill -9 at random moments, continue, and end with the bits of a run that nobody killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from safetensors.torch import load_file

from spanbert_fast.train.events import Event, RunStarted
from spanbert_fast.train.metrics import read_metrics
from spanbert_fast.train.options import PretrainOptions
from spanbert_fast.train.pretrain import pretrain

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")

# A process that has imported everything and waits to be forked: a second start costs no import.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["spanbert_fast.train.pretrain"])


def work(options: PretrainOptions, started: Connection) -> None:
    """What a killed process does."""

    def tell(event: Event) -> None:
        if isinstance(event, RunStarted):
            started.send(event.start_step)

    pretrain(options, on_event=tell)


def run_with_kills(options: PretrainOptions, most: int, delays: Callable[[], float]) -> int:
    """Run until the end; the number of kills on the way, `most` at most."""
    for killed in range(most + 1):
        started, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=work, args=(options, sender))
        process.start()
        sender.close()
        started.recv()
        process.join(None if killed == most else delays())
        if process.exitcode is not None:
            assert process.exitcode == 0
            return killed
        process.kill()
        process.join()
    raise AssertionError("the last process is never killed")


def check_kills(make_options: Callable[..., PretrainOptions], folder: Path, num_kills: int) -> None:
    # Saves and evaluates often, so that many kills fall into those.
    changes = {"steps": 60, "eval_every": 6, "save_every": 3, "keep_checkpoints": 1}
    whole = folder / "whole"
    begun = time.monotonic()
    pretrain(make_options(whole, **changes))
    duration = time.monotonic() - begun
    generator = random.Random(0)
    killed = rounds = 0
    while killed < num_kills:
        rounds += 1
        output = folder / f"round-{rounds}"
        killed += run_with_kills(
            make_options(output, **changes),
            num_kills - killed,
            lambda: generator.uniform(0, 0.6 * duration),
        )
        left, right = (load_file(path / "model/model.safetensors") for path in (whole, output))
        assert left.keys() == right.keys()
        assert all(left[name].equal(right[name]) for name in left)
        first, second = (
            [(line["kind"], line["step"]) for line in read_metrics(path / "metrics.jsonl")]
            for path in (whole, output)
        )
        assert first == second
        names = {path.name for path in (output / "checkpoints").iterdir()}
        assert names == {"step-0000060"}


def test_three_kills_do_not_change_a_bit(
    options: Callable[..., PretrainOptions], tmp_path: Path
) -> None:
    check_kills(options, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_do_not_change_a_bit(
    options: Callable[..., PretrainOptions], tmp_path: Path
) -> None:
    check_kills(options, tmp_path, 20)
