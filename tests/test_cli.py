"""The command line: the commands as documented, mistakes in one line, and a whole small run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from spanbert_fast.cli import main
from spanbert_fast.cli.commands import COMMANDS
from spanbert_fast.cli.progress import PrepareView, PretrainView
from spanbert_fast.cli.render import new_console, table, to_json
from spanbert_fast.data.options import Note
from spanbert_fast.data.options import Progress as Prepared
from spanbert_fast.train import events

TEXT = "The cat sat on the mat number {0}.\nIt was glad of mat {0}.\nDogs bark at cat {0}.\n"


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.disable_progress_bar()
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "SPANBERT_FAST_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def python(*words: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_nothing_heavy(words: Sequence[str]) -> None:
    program = (
        "import sys\nfrom spanbert_fast.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit as end: assert not end.code\n"
        "print({'torch', 'transformers', 'pyarrow'} & set(sys.modules) or 'light')"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("light\n")
    assert "usage: spanbert-fast" in done.stdout


def test_module_and_version() -> None:
    done = python("-m", "spanbert_fast", "--version")
    assert (done.returncode, done.stdout) == (0, "spanbert-fast 0.1.0\n")


def test_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in COMMANDS)
    assert main([]) == 2
    assert capsys.readouterr().out == listed
    assert main(["pretrian"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown command 'pretrian'. Did you mean pretrain?")
    assert ", ".join(COMMANDS) in error


def given(
    monkeypatch: pytest.MonkeyPatch, words: Sequence[str], outcome: BaseException | int = 0
) -> Any:
    """The options that a command line gives; the command itself does not run."""
    seen: list[Any] = []

    def run(options: Any, as_json: bool) -> int:
        seen.extend((options, as_json))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    name = words[0]
    monkeypatch.setitem(COMMANDS, name, dataclasses.replace(COMMANDS[name], run=run))
    status = main(words)
    return (*seen, status)


def test_documented_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "prepare --input a.txt b:2.5 --output out --tokenizer dir --seq-length 128 --workers 3"
    options, _, _ = given(monkeypatch, words.split())
    assert options.input == ("a.txt", "b:2.5")
    assert (options.output, options.tokenizer) == (Path("out"), "dir")
    assert (options.seq_length, options.workers) == (128, 3)

    words = "pretrain --data d --output o --preset tiny --config run.toml --init ckpt"
    options, _, _ = given(monkeypatch, words.split())
    assert (options.data, options.output, options.preset) == (Path("d"), Path("o"), "tiny")
    assert (options.config, options.init, options.steps) == (Path("run.toml"), "ckpt", None)

    words = "convert --from fairseq model.pt --config config.json OUT"
    options, as_json, _ = given(monkeypatch, words.split())
    assert (options.source, options.output) == (Path("model.pt"), Path("OUT"))
    assert (options.source_format, options.config) == ("fairseq", Path("config.json"))
    assert as_json is False

    options, as_json, _ = given(monkeypatch, ["evaluate", "MODEL", "--data", "SHARDS", "--json"])
    assert (options.model, options.data, as_json) == ("MODEL", Path("SHARDS"), True)

    options, _, _ = given(monkeypatch, ["fill", "M", "a [MASK]", "[MASK] b", "--length", "1", "9"])
    assert (options.model, options.text, options.length) == ("M", ("a [MASK]", "[MASK] b"), (1, 9))

    words = "warmup M --arch 80 90 --precision fp16 --max-length 384 --eval-only --json"
    options, as_json, _ = given(monkeypatch, words.split())
    assert (options.model, options.arch, options.precision) == ("M", (80, 90), "fp16")
    assert (options.max_length, options.eval_only, as_json) == (384, True, True)

    for name in ("verify", "show"):
        assert given(monkeypatch, [name, "DIR"])[0].directory == Path("DIR")
    assert given(monkeypatch, ["doctor"])[2] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (None, None)),
        ("--compile --reference-optimizer", (True, True)),
        ("--compile False --no-reference-optimizer", (False, False)),
        ("--reference_optimizer True --no-compile", (False, True)),
    ],
)
def test_switches_that_may_stay_open(
    monkeypatch: pytest.MonkeyPatch, words: str, expected: tuple[bool | None, bool | None]
) -> None:
    options, _, _ = given(monkeypatch, ["pretrain", *words.split(), "--data", "d"])
    assert (options.compile, options.reference_optimizer) == expected


def test_tables_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "pretrain --model num_hidden_layers 4 --masking mask_ratio 0.2 scheme token"
    options, _, _ = given(monkeypatch, words.split())
    assert options.model == {"num_hidden_layers": 4}
    assert options.masking == {"mask_ratio": 0.2, "scheme": "token"}


@pytest.mark.parametrize(
    "words",
    [
        "convert --from onnx model.pt OUT",
        "evaluate --data d",
        "evaluate m --dat d",
        "fill m x --top-k many",
        "pretrain --preset huge",
    ],
)
def test_mistakes_in_options_end_with_status_2(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert f"spanbert-fast {words.split()[0]} --help" in " ".join(
        (captured.out + captured.err).split()
    )
    assert "Traceback" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("outcome", "status", "line"),
    [
        (ValueError("seed must be\n  0 or more"), 2, "error: seed must be 0 or more\n"),
        (FileNotFoundError("no such file: x"), 2, "error: no such file: x\n"),
        (RuntimeError("step 3: not finite"), 1, "error: step 3: not finite\n"),
        (OSError(), 2, "error: OSError\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_failures_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: BaseException,
    status: int,
    line: str,
) -> None:
    assert given(monkeypatch, ["doctor"], outcome)[-1] == status
    assert capsys.readouterr().err == line


def test_debugging_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPANBERT_FAST_DEBUG", "1")
    assert given(monkeypatch, ["doctor"], ValueError("wrong"))[-1] == 2
    assert "Traceback" in capsys.readouterr().err


def test_mistakes_of_ours_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError):
        given(monkeypatch, ["doctor"], TypeError("a bug"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which shards were prepared and a model was pre-trained for six steps."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("\n".join(TEXT.format(i % 50) for i in range(300)))
    words = (
        f"prepare --input {folder}/text.txt --output {folder}/data --train-tokenizer "
        "--vocab-size 80 --seq-length 32 --workers 1 --validation-permille 100"
    )
    assert main(words.split()) == 0
    words = (
        f"pretrain --data {folder}/data --output {folder}/run --steps 6 --warmup-steps 2 "
        "--global-batch-tokens 256 --log-every 2 --eval-every 3 --save-every 3 --threads 1 "
        "--model hidden_size 32 num_attention_heads 2 intermediate_size 64"
    )
    assert main(words.split()) == 0
    return folder


def out(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == status
    return capsys.readouterr().out


def test_fill(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = run / "run" / "model", "The [MASK] [MASK] on the mat."
    shown = out(capsys, "fill", model, text, "[MASK] sat", "--top-k", 2)
    assert f"text 1, characters 4 to 17: {text}" in shown
    assert "mlm+sbo" in shown
    assert out(capsys, "fill", model, text, "--json", "--length", 1, 2, status=2) == ""
    found = json.loads(out(capsys, "fill", model, text, "--json", "--top-k", 3))
    assert [len(spans) for spans in found] == [3]
    assert set(found[0][0]) >= {"text", "token_ids", "log_probability", "start", "end", "head"}
    assert found[0][0]["start"] == 4


def test_fill_without_text(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert main(["fill", str(run / "run" / "model")]) == 2
    assert "no text was given" in capsys.readouterr().err


def test_fill_reads_lines(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("The [MASK] sat\n\nIt [MASK] glad\n")
    with lines.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        found = json.loads(out(capsys, "fill", run / "run" / "model", "--json"))
    assert [spans[0]["text_index"] for spans in found] == [0, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fill ./absent [MASK]", "no such folder: ./absent"),
        ("evaluate /absent/model --data d", "no such folder: /absent/model"),
        ("pretrain --data d --output o --init a/b/c", "no such folder: a/b/c"),
        ("pretrain --data d --output o --config absent.toml", "absent.toml: No such file"),
        ("convert --from fairseq model.pt OUT", "--config is needed"),
        ("convert --from hf absent OUT", "no such folder: absent"),
        ("convert --from fairseq . --config absent.json OUT", "no configuration at absent.json"),
        ("prepare --input a --output b", "tokenizer is None and train_tokenizer is False"),
        ("evaluate m --data d --max-blocks -1", "max_blocks must not be negative, got -1"),
        ("verify absent", "no such folder: absent"),
        ("warmup ./absent", "no such folder: ./absent"),
    ],
)
def test_mistakes_are_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1


def test_evaluate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("evaluate", run / "run" / "model", "--data", run / "data", "--threads", 1)
    shown = out(capsys, *words)
    assert "unigram law" in shown
    assert "SBO by span length" in shown
    result = json.loads(out(capsys, *words, "--json"))
    assert f"{result['mlm_loss']:.4f}" in shown


def test_verify_and_show(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for folder, kind in (("data", "token shards"), ("run", "run"), ("run/model", "model")):
        assert out(capsys, "verify", run / folder).endswith("intact\n")
        report = json.loads(out(capsys, "verify", run / folder, "--json"))
        assert (report["kind"], report["is_intact"]) == (kind, True)
        assert f"{run / folder}: {kind}" in out(capsys, "show", run / folder)
        assert json.loads(out(capsys, "show", run / folder, "--json"))["kind"] == kind
    [newest, *_] = sorted((run / "run" / "checkpoints").iterdir(), reverse=True)
    broken = tmp_path / newest.name
    broken.mkdir()
    for file in newest.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:-1])
    assert out(capsys, "verify", broken, status=1).endswith("DAMAGED\n")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    shown = out(capsys, "doctor")
    assert "varlen_attention" in shown
    assert "directory of compiled kernels" in shown
    assert json.loads(out(capsys, "doctor", "--json"))["checks"][0]["passed"] is True


def test_convert(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    golden = Path(__file__).resolve().parent / "golden"
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(json.loads((golden / "reference_tiny.json").read_text())["config"])
    )
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nThe\ncat\nsat\n")
    words = ["convert", "--from", "fairseq", golden / "reference_tiny.fairseq.pt"]
    words += ["--config", config, "--vocab", vocabulary, tmp_path / "out"]
    shown = out(capsys, *words)
    assert "70,664" in shown
    assert "SBO slots" in shown
    filled = json.loads(out(capsys, "fill", tmp_path / "out", "The [MASK] sat", "--json"))
    assert filled[0][0]["head"] == "mlm+sbo"
    out(capsys, *words, status=2)


def test_reader_that_goes_away(run: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "spanbert_fast", "show", str(run / "data")]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_tables_in_a_terminal_and_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("[MASK]", 7), ("[bold]é", 12345)]
    table(new_console(), ("span", "n"), rows, title="[title]", numbers=1)
    assert capsys.readouterr().out == "[title]\nspan         n\n[MASK]       7\n[bold]é  12345\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    table(new_console(), ("span", "n"), rows, title="[title]", numbers=1)
    shown = capsys.readouterr().out
    assert "┃" in shown
    assert "[bold]é" in shown
    assert "[title]" in shown


STARTED = events.RunStarted(
    output=Path("run"),
    preset="tiny",
    resumed_from=None,
    start_step=0,
    num_steps=10,
    num_parameters=1234,
    global_batch_tokens=64,
    training_blocks=5,
    validation_blocks=1,
    precision="fp32",
    device="cpu",
    num_threads=1,
    matmul_flops_per_second=1e10,
)
PROGRESS = events.Progress(
    step=4,
    num_steps=10,
    epoch=0,
    loss=3.25,
    mlm_loss=1.5,
    sbo_loss=1.75,
    learning_rate=1e-4,
    gradient_norm=1.0,
    tokens=256,
    tokens_per_second=1000.0,
    flop_utilisation=0.25,
    seconds_left=75.0,
)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_pretraining_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    with PretrainView() as view:
        view(STARTED)
        view(PROGRESS)
        view(events.CheckpointRefused(path=Path("step-1"), reason="[bold] changed"))
        view(events.Notice(text="the data moved"))
        view(events.CheckpointSaved(step=4, path=Path("step-4"), seconds=0.5))
        view(
            events.ExamplesReady(
                examples=(
                    events.SpanExample(left="The", right="sat", truth="cat", mlm="dog", sbo=None),
                )
            )
        )
    shown = capsys.readouterr().out
    for part in (
        "1,234 parameters",
        "step 4/10",
        "loss 3.250",
        "mlm 1.500",
        "sbo 1.750",
        "1,000 tokens/s",
        "mfu 25%",
        "left 0:01:15",
        "checkpoint refused: step-1: [bold] changed",
        "note: the data moved",
        "step 4: checkpoint step-4 (0.5 s)",
        "The ___ sat",
    ):
        assert part in shown, part


def test_preparing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with PrepareView() as view:
        for done in range(11):
            view(Prepared(stage="tokenize", done=done * 10**6, total=10**7))
        view(Prepared(stage="write", done=7, total=7))
        view(Note(text="[x] is odd"))
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "tokenize: 10.0 of 10.0 MB",
        "write: 7 of 7 blocks",
        "note: [x] is odd",
    ]


def test_json_of_values() -> None:
    value = to_json({"a": (Path("x"), PROGRESS), 1: None})
    assert json.loads(json.dumps(value)) == value
    assert value["a"][0] == "x"
    assert value["a"][1]["step"] == 4
