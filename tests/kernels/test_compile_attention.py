"""Attention kernels compiled ahead of time for sm_80, sm_90 and sm_100."""

from __future__ import annotations

from kernels.in_process import run_tests


def test_common_variants() -> None:
    run_tests("attention_compiled", "common or short or cheap")
