"""Marks of their suite, the quick part of it, and silence about what it warns of."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.suite import quick_tests

HERE = Path(__file__).resolve().parent
MARKERS = (
    "accelerate_tests", "flash_attn_3_test", "flash_attn_4_test", "flash_attn_test",
    "is_pipeline_test", "is_training_test", "torch_compile_test",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of Hugging Face's suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    quick = quick_tests()
    for item in items:
        if item.path.parent == HERE and item.path.name.endswith("_suite.py"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            if item.name not in quick:
                item.add_marker(pytest.mark.slow)
