"""What a run sets on the machine, and that it is put back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from spanbert_fast.train import machine

CPU = torch.device("cpu")


def test_settings_are_put_back_even_after_a_failure() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with machine.machine_settings(before + 1):
            assert torch.get_num_threads() == before + 1
            assert torch.are_deterministic_algorithms_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_threads_are_left_alone_unless_given() -> None:
    before = torch.get_num_threads()
    with machine.machine_settings(None):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_as_before_afterwards(shown: bool) -> None:
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    with machine.without_progress_bars():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled() == shown
    (logging.enable_progress_bar if before else logging.disable_progress_bar)()


@pytest.mark.parametrize(("has_instruction", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_cpu_multiplies_in_it(
    has_instruction: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instruction)
    assert machine.choose_precision("auto", CPU) == expected
    assert machine.choose_precision("fp16", CPU) == "fp16"


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "bf16"), ((7, 5), "fp16")])
def test_auto_on_a_gpu_depends_on_its_generation(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert machine.choose_precision("auto", torch.device("cuda")) == expected


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.choose_device("auto") == CPU
    with pytest.raises(ValueError, match="got cuda"):
        machine.choose_device("cuda")


def test_environment_says_what_bits_depend_on() -> None:
    found = machine.environment(CPU, "fp32")
    assert set(found) == {"torch", "cpu_capability", "threads", "device", "precision"}
    assert found["threads"] == torch.get_num_threads()


def test_a_folder_is_free_again_after_its_user(tmp_path: Path) -> None:
    with machine.only_user(tmp_path / "run"):
        pass
    with (
        machine.only_user(tmp_path / "run"),
        pytest.raises(ValueError, match="in use by another process"),
        machine.only_user(tmp_path / "run"),
    ):
        pass
