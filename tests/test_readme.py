"""README is true: its Python runs, its commands parse."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from spanbert_fast.cli import main
from spanbert_fast.cli.arguments import parse
from spanbert_fast.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMAND_LINES = re.findall(r"^\$ (spanbert-fast .*)$", README, re.MULTILINE)


def main_ok(line: str) -> None:
    """Runs one command, which has to succeed."""
    assert main(shlex.split(line)) == 0


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves behind, from a few steps only."""
    folder = tmp_path_factory.mktemp("readme")
    text = folder / "text.jsonl.zst"
    shutil.copy(ROOT / "examples" / "state_of_the_union.jsonl.zst", text)
    output = folder / "demo_output"
    main_ok(f"prepare --input {text} --output {output}/data --train-tokenizer --vocab-size 2000"
            " --seq-length 64 --validation-permille 60")  # fmt: skip
    main_ok(f"pretrain --data {output}/data --output {output}/run --preset tiny --steps 3"
            " --warmup-steps 1 --eval-every 0")  # fmt: skip
    return folder


def test_python_blocks_run_in_order(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_folder)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4, printed  # three candidates and a masked sentence
    assert "[MASK]" in printed[3]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_parse(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    options, _ = parse(COMMANDS[name], name, arguments)
    assert options


def test_there_are_command_lines() -> None:
    assert len(COMMAND_LINES) >= 4


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    documents = README + (ROOT / "CONTRIBUTING.md").read_text()
    for target in set(re.findall(r"(?:`|\$ )make ([a-z-]+)", documents)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"
