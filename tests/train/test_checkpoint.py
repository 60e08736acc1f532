"""A checkpoint is complete or absent, shows damage, and its writing never harms an older one."""

from __future__ import annotations

import errno
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spanbert_fast.train import checkpoint
from spanbert_fast.train.checkpoint import CheckpointError


def save(directory: Path, step: int, keep: int = 3) -> Path:
    return checkpoint.save_checkpoint(
        directory,
        step,
        weights={"weight": torch.full((8, 8), float(step)), "bias": torch.arange(8.0)},
        optimizer={
            "exp_avg.weight": torch.full((8, 8), step / 2),
            "step.weight": torch.tensor(step),
        },
        state={"seed": 7, "random": checkpoint.random_state()},
        keep=keep,
    )


def content(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 12)
    assert path.name == "step-0000012"
    files = checkpoint.verify_checkpoint(path)
    assert files.step == 12
    assert files.num_bytes == sum(len(v) for k, v in content(path).items() if k != "manifest.json")
    loaded = checkpoint.load_checkpoint(path)
    assert loaded.step == 12
    assert loaded.state["seed"] == 7
    assert torch.equal(loaded.weights["weight"], torch.full((8, 8), 12.0))
    assert loaded.optimizer["step.weight"].item() == 12


def test_random_state_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    expected = torch.rand(3)
    torch.rand(100)
    checkpoint.restore_random_state(checkpoint.load_checkpoint(path).state["random"])
    assert torch.equal(torch.rand(3), expected)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == [
        "step-0000003",
        "step-0000010",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000003", "step-0000010"]


def test_a_refused_newer_checkpoint_never_costs_the_good_one(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "step-0000003" / "state.json").write_text("{}")
    save(tmp_path, 2, keep=1)
    assert checkpoint.latest_valid_checkpoint(tmp_path, on_refused=lambda *_: None) == (
        tmp_path / "step-0000002"
    )
    save(tmp_path, 3, keep=1)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-0000003"]
    checkpoint.verify_checkpoint(tmp_path / "step-0000003")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "removed"])
def test_a_damaged_newest_checkpoint_is_refused_by_name(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    data = bytearray((newest / name).read_bytes())
    if damage == "flipped":
        position = data.index(b"sha256") + 12 if name == "manifest.json" else len(data) // 2
        data[position] ^= 1
    (newest / name).write_bytes({"truncated": data[:-10], "emptied": b""}.get(damage, data))
    if damage == "removed":
        (newest / name).unlink()
    with pytest.raises(CheckpointError, match=newest.name):
        checkpoint.load_checkpoint(newest)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest_valid_checkpoint(tmp_path) == tmp_path / "step-0000001"
    assert str(newest) in caplog.text


def test_every_flipped_bit_of_a_sample_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    generator = random.Random(0)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        good = (path / name).read_bytes()
        for _ in range(20):
            bad = bytearray(good)
            bad[generator.randrange(len(bad))] ^= 1 << generator.randrange(8)
            (path / name).write_bytes(bad)
            with pytest.raises(CheckpointError, match=name):
                checkpoint.verify_checkpoint(path)
        (path / name).write_bytes(good)
    checkpoint.verify_checkpoint(path)


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "step-0000009")
    with pytest.raises(CheckpointError, match="holds step 1"):
        checkpoint.verify_checkpoint(tmp_path / "step-0000009")


def test_no_checkpoint_is_none_but_only_damaged_ones_are_an_error(tmp_path: Path) -> None:
    assert checkpoint.latest_valid_checkpoint(tmp_path / "missing") is None
    assert checkpoint.latest_valid_checkpoint(tmp_path) is None
    (save(tmp_path, 1) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* verifies"):
        checkpoint.latest_valid_checkpoint(tmp_path, on_refused=lambda *_: None)


class FullDisk:
    """Lets `allowed` calls through, then reports that no space is left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
        self.calls = 0
        self.allowed = allowed
        for owner, name in (
            (checkpoint, "save_file"),
            (Path, "write_text"),
            (Path, "mkdir"),
            (Path, "rename"),
            (os, "fsync"),
        ):
            monkeypatch.setattr(owner, name, self.guard(getattr(owner, name)))

    def guard(self, function):
        def guarded(*args, **kwargs):
            self.calls += 1
            if self.calls > self.allowed:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return guarded


def test_a_disk_full_at_any_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(tmp_path, 1, keep=1)
    before = content(old)
    failures = 0
    for allowed in range(100):
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, allowed)
            try:
                save(tmp_path, 2, keep=1)
            except OSError:
                failures += 1
            else:
                assert disk.calls <= allowed
                break
        newest = checkpoint.latest_valid_checkpoint(tmp_path)
        assert newest is not None
        if newest == old:
            assert content(old) == before
        else:  # the new one was complete; only clearing up failed
            assert newest.name == "step-0000002"
    assert failures >= 12
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000002"]


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_file_that_cannot_grow_is_an_oserror_and_leaves_the_old_checkpoint(
    tmp_path: Path,
) -> None:
    old = save(tmp_path, 1, keep=1)
    before = content(tmp_path)
    program = f"""
import resource, signal, sys, torch
from pathlib import Path
from spanbert_fast.train.checkpoint import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    save_checkpoint(Path({str(tmp_path)!r}), 2, weights={{"w": torch.zeros(1 << 16)}},
                    optimizer={{}}, state={{}}, keep=1)
except OSError as error:
    print(error)
    sys.exit(28)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 28, done.stderr
    assert "model.safetensors" in done.stdout
    assert content(tmp_path) == before
    checkpoint.verify_checkpoint(old)


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".unfinished-step-0000005"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    assert checkpoint.latest_valid_checkpoint(tmp_path) is None
    save(tmp_path, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000005"]
