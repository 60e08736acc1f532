"""The ablation of the examples: it runs, goes on, compares like with like, and counts rightly."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import spanbert_fast as sf
from spanbert_fast.data.wordpiece import train_tokenizer

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "ablation"
PLACES = ("the river", "old Berlin", "every bridge", "Anna", "a quiet street", "the lamps of May")
SIZES = {
    "vocab-size": 100,
    "seq-length": 32,
    "validation-permille": 200,
    "steps": 30,
    "batch-tokens": 64,
    "hidden-size": 16,
    "eval-blocks": 8,
    "task-sentences": 16,
    "task-epochs": 1,
}


@pytest.fixture(scope="module")
def ablation() -> Iterator[ModuleType]:
    """The script, as `python examples/ablation` finds it."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("ablation", FOLDER / "__main__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("arms", "recovery", "span_task", "summary"):
            sys.modules.pop(name, None)


def text(rng: random.Random) -> str:
    return " ".join(f"We saw {rng.choice(PLACES)} near {rng.choice(PLACES)}." for _ in range(9))


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    rng = random.Random(0)
    lines = [json.dumps({"text": text(rng)}) for _ in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    sentences = []
    for _ in range(40):
        place = rng.choice(PLACES).split()
        tags = ["B-place", *["I-place"] * (len(place) - 1)]
        rows = [("We", "O"), ("saw", "O"), *zip(place, tags, strict=True), (".", "O")]
        sentences.append("\n".join(f"{word}\t{tag}" for word, tag in rows))
    (tmp_path / "places.conll").write_text("\n\n".join(sentences) + "\n")
    return ["--corpus", str(tmp_path / "corpus.jsonl"), "--spans", str(tmp_path / "places.conll")]


def lines_of(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: line[key] for key in line if key != "cpu_seconds"} for line in lines]


def test_it_runs_and_goes_on(
    ablation: ModuleType,
    inputs: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "output"
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    arguments = ["--output", str(output), "--seeds", "5", *sizes, *inputs]
    assert ablation.main(arguments) == 0
    log, table = output / "results.jsonl", (output / "summary.md").read_text()
    first = lines_of(log)
    assert [line["arm"] for line in first] == [*ablation.ARMS, "no pre-training"]
    assert len({line["tokens"] for line in first[:4]}) == 1
    assert [set(line["spans"]) for line in first[:4]] == [{"mlm"}] * 3 + [{"mlm", "sbo", "auto"}]
    assert "| geometric + SBO, SBO head |" in table
    assert (output / "ablation.png").stat().st_size > 10_000

    # A line that a kill cut short is computed again, to the bit; the others stand.
    capsys.readouterr()
    written = log.read_bytes()
    third = written.index(b'{"arm": "geometric + SBO"')
    log.write_bytes(written[: third + 40])
    assert ablation.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n=== ") == 2
    assert lines_of(log) == first
    assert (output / "summary.md").read_text() == table

    assert ablation.main([*arguments, "--layers", "2"]) == 1
    assert "results with layers 1, asked is 2" in capsys.readouterr().err
    start_from_equal_weights(ablation, output)


def start_from_equal_weights(ablation: ModuleType, output: Path) -> None:
    """With a rate of almost 0 nothing but the beginning is left."""
    sizes = {"steps": 30, "batch_tokens": 32, "layers": 1, "hidden_size": 16, "threads": 1}
    budget = ablation.Budget(**sizes, learning_rate=1e-12)
    found = []
    for name in ("token", "geometric + SBO"):
        folder = output / name
        ablation.pretrain(ablation.ARMS[name], 5, budget, output / "data", folder)
        found.append(sf.Model.from_pretrained(folder / "model").state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3"], "--steps must be at least 30, got 3"),
        (["--seeds", "1", "1"], r"--seeds must be different numbers from 0, got \[1, 1\]"),
        (["--seeds", "-1"], "--seeds must be different numbers from 0"),
        (["--learning-rate", "nan"], r"--learning-rate must be in \(0, 1\), got nan"),
        (["--corpus", "no_such_file"], "no_such_file does not exist"),
        (["--spans", ".", ".", "."], "--spans takes one path, or two"),
        (["--eval-blocks", "0"], "--eval-blocks must be at least 1, got 0"),
    ],
)
def test_options_that_are_wrong(
    ablation: ModuleType,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        ablation.main(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_the_commands_of_the_page(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (FOLDER.parents[1] / "docs" / "ablation.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^\$ python examples/ablation (.*)$", page, re.MULTILINE)
    assert len(commands) >= 3
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = shlex.split(command)
        for word in words:
            if not re.fullmatch(r"-.*|[\d.]+", word):
                Path(word).parent.mkdir(parents=True, exist_ok=True)
                Path(word).touch()
        assert ablation.parse(words).steps >= 2_000


def test_spans_are_hidden_whole_and_counted_by_length(
    ablation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    texts = [text(rng) for _ in range(30)]
    tokenizer = train_tokenizer(texts, 90)
    blocks = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in texts]
    quiz = ablation.SpanQuiz(tokenizer, blocks, 15)
    assert quiz.num_left_out == 0
    known = {tuple(block) for block in blocks}
    answers = [answer.ids for own in quiz.answers for answer in own]
    for shown, own in zip(quiz.texts, quiz.answers, strict=True):
        ids = tokenizer(shown, add_special_tokens=False)["input_ids"]
        hidden = [place for place, token in enumerate(ids) if token == tokenizer.mask_token_id]
        for place, token in zip(hidden, (t for answer in own for t in answer.ids), strict=True):
            ids[place] = token
        assert tuple(ids) in known  # the answers are what stood there
        assert {0, len(ids) - 1}.isdisjoint(hidden)  # the SBO head sees a token on either side
        words = tokenizer.convert_ids_to_tokens(ids)
        for place in hidden:  # no word is hidden in part
            assert place + 1 in hidden or not words[place + 1].startswith("##")
            assert place - 1 in hidden or not words[place].startswith("##")

    def fill(model: None, tokenizer: Any, texts: list[str], **_: Any) -> list[list[Any]]:
        """Right about spans of one piece; of longer ones the last piece is wrong."""
        rest = [own for one, own in zip(quiz.texts, quiz.answers, strict=True) if one in texts]
        right = [answer.ids for own in rest for answer in own]
        guesses = [ids if len(ids) == 1 else (*ids[:-1], -1) for ids in right]
        return [[SimpleNamespace(token_ids=guess)] for guess in guesses]

    monkeypatch.setattr(sf, "fill_span", fill)
    score = quiz.fill(None, tokenizer, "mlm")
    assert sum(score["spans"].values()) == len(answers)
    assert score["spans"]["2"] == sum(len(answer) == 2 for answer in answers) > 0
    assert score["spans"]["5+"] == sum(len(answer) >= 5 for answer in answers) > 0
    share = score["spans"]["1"] / len(answers)
    assert score["exact"] == {"1": 1.0, "2": 0.0, "3": 0.0, "4": 0.0, "5+": 0.0, "all": share}
    assert (score["pieces"]["2"], score["pieces"]["4"]) == (0.5, 0.75)


def test_the_right_content_is_chosen_by_its_probability(ablation: ModuleType) -> None:
    """Two models without context: one has the law of the answers, one its opposite."""
    rng = random.Random(2)
    texts = [text(rng) for _ in range(60)]
    tokenizer = train_tokenizer(texts, 90)
    blocks = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in texts]
    quiz = ablation.SpanQuiz(tokenizer, blocks, 15)
    answers = [answer for own in quiz.answers for answer in own]
    for answer in answers:
        assert {len(ids) for ids in answer.choices} <= {len(answer.ids)}
        assert len({answer.ids, *answer.choices}) in (1, 10)
    model = sf.Model(sf.Config(vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=1,
                               num_hidden_layers=1, intermediate_size=8))  # fmt: skip
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    counts = torch.bincount(
        torch.tensor([token for answer in answers for token in answer.ids]),
        minlength=len(tokenizer),
    )
    law = ((counts + 1) / (counts + 1).sum()).log()
    model.cls.predictions.bias.data.copy_(law)
    model.cls.span_boundary.bias.data.copy_(-law)
    uniform = torch.zeros(len(tokenizer))
    found = quiz.choose(model, ("mlm", "sbo", "auto"), uniform)
    known = torch.cat([law[list(answer.ids)] for answer in answers])
    assert found["mlm"]["nats"]["all"] == pytest.approx(-float(known.mean()), rel=1e-4)
    # The two cancel out, which leaves the uniform law.
    assert found["auto"]["nats"]["all"] == pytest.approx(math.log(len(tokenizer)), rel=1e-4)
    for head, sign in (("mlm", 1), ("sbo", -1)):
        right = [
            all(
                sign * float((law[list(answer.ids)] - law[list(wrong)]).sum()) > 1e-5
                for wrong in answer.choices
            )
            for answer in answers
            if answer.choices
        ]
        assert found[head]["choice"]["all"] == pytest.approx(sum(right) / len(right))
        assert 0 < sum(right) < len(right)
    # What counts is how much more probable the context makes a content: -law + 2 law = law.
    assert quiz.choose(model, ["sbo"], 2 * -law)["sbo"]["choice"] == pytest.approx(
        found["mlm"]["choice"]
    )


def test_both_ways_of_marking_spans(ablation: ModuleType, tmp_path: Path) -> None:
    lines = ["#begin document (x); part 0"]
    words = ("In", "old", "Berlin", "Anna", "met", "Anna", ".")
    marks = ("_", "(0", "(1)|0)", "(2)", "_", "(2)", "_")
    for _ in range(6):
        rows = zip(words, marks, strict=True)
        lines += [f"x\t0\t{i}\t{word}\t_\t{mark}" for i, (word, mark) in enumerate(rows)]
        lines.append("")
    (tmp_path / "brackets.conll").write_text("\n".join(lines))
    tags = ("O", "B-place", "I-place", "B-person", "O", "I-person", "O")
    block = "\n".join(f"{word} {tag}" for word, tag in zip(words, tags, strict=True))
    (tmp_path / "tags.conll").write_text("\n\t\n".join([block] * 6))

    def marked(name: str) -> set[tuple[str, str]]:
        tokenizer = train_tokenizer([" ".join(words)], 60)
        task = ablation.read_task([tmp_path / name], tokenizer=tokenizer, longest=64, sentences=8)
        assert (len(task.train), len(task.test)) == (4, 2)
        sentence = task.train[0]
        assert sentence.types.count("none") == len(sentence.types) / 2
        spans = zip(sentence.spans, sentence.types, strict=True)
        return {(sentence.text[a:b], kind) for (a, b), kind in spans if kind != "none"}

    found = {(word, "mention") for word in ("old Berlin", "Berlin", "Anna")}
    assert marked("brackets.conll") == found
    assert marked("tags.conll") == {("old Berlin", "place"), ("Anna", "person")}
    (tmp_path / "nothing.conll").write_text("In O\nBerlin O\n")
    with pytest.raises(ValueError, match="no marked spans"):
        marked("nothing.conll")
