"""The benchmark of long texts on real weights: it runs, and it measures what it says."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib.image import imread

import spanbert_fast as sf
from spanbert_fast.data.tokenizer import load_tokenizer, save_tokenizer
from spanbert_fast.data.wordpiece import train_tokenizer

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LIMIT = 32
TEXT = "we must work together to keep the peace of old Berlin and new York"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(20):
        rng = random.Random(number)
        lines = (" ".join(rng.choices(TEXT.split(), k=12)) + "." for _ in range(40))
        (folder / f"{number:02}.txt").write_text("\n\n".join(lines))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model with random weights."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT], 60)
    save_tokenizer(tokenizer, tmp_path / "model")
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    config = sf.Config(
        vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=LIMIT, **shape
    )
    sf.Model(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def quiz_of(module: ModuleType, texts: Path, folder: Path, length: int) -> object:
    return module.Quiz.of(sorted(texts.glob("*.txt"))[:3], load_tokenizer(folder), length, 400)


def test_all_of_it_runs(
    load, texts: Path, folder: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, picture = tmp_path / "output", tmp_path / "picture.png"
    sizes = ["--pieces", "600", "--seeds", "2", "--adapt-steps", "4", "--extend-steps", "3"]
    sizes += ["--adapt-batch-tokens", "256", "--extend-batch-tokens", "256", "--factors", "2"]
    paths = ["--text", str(texts), "--output", str(output), "--picture", str(picture)]
    main = load("long_context").main
    shown = {}
    for what in ("inside", "states", "beyond", "picture"):
        monkeypatch.setattr("sys.argv", ["", what, str(folder), *paths, *sizes])
        main()
        shown[what] = capsys.readouterr().out
    assert "| attention window 4 | 1.00 |" in shown["inside"]
    assert "| windows of 16, positions of the text, stride 7 | 2.29 |" in shown["states"]
    assert "| interpolate, attention window 8 |" in shown["beyond"]
    assert imread(picture).ndim == 3
    result = json.loads((output / "beyond.json").read_text())
    assert [len(row["seeds"]) for row in result["64, trained"]] == [2] * 5
    # What is trained on has seen more; the control reads what it read before.
    assert result["64, trained"][0]["loss"] < result["64, as it is"][0]["loss"]


def test_a_loss_is_that_of_the_model(load, texts: Path, folder: Path) -> None:
    quiz = quiz_of(load("context_quiz"), texts, folder, LIMIT)
    model = sf.Model.from_pretrained(folder).eval()
    first, last = quiz.edges
    ids = torch.tensor([[first, *shown, last] for shown in quiz.shown])
    labels = torch.full_like(ids, -100)
    for text, places in enumerate(quiz.places):
        assert len(places) == round(0.15 * (LIMIT - 2))
        for place in places:
            labels[text, place + 1] = quiz.answers[text][place]
    assert ((ids == load_tokenizer(folder).mask_token_id) == (labels != -100)).all()
    expected = model(input_ids=ids, labels=labels).mlm_loss
    losses = quiz.losses(model, quiz.whole())
    assert len(losses) == len(quiz.groups)
    torch.testing.assert_close(losses.mean(), expected)


def test_windows_read_every_piece_once_and_cut_ones_are_cut(load, texts: Path, folder: Path):
    module = load("context_quiz")
    quiz = quiz_of(module, texts, folder, 2 * LIMIT)
    model = sf.Model.from_pretrained(folder).eval()
    windows = quiz.windows(sf.Windows(max_length=16, stride=5), LIMIT)
    owned = [(own.text, place) for own in windows for place in own.places]
    assert owned == [(text, place) for text, own in enumerate(quiz.places) for place in own]
    for keeps in (False, True):
        inner = quiz.inner_windows(14, 3, keeps_positions=keeps)
        assert all(own.start > 0 and own.end < 2 * LIMIT - 2 for own in inner)
        inner = [own for own in inner if own.end < LIMIT]
        states = quiz.states(model, inner)
        # As the model itself reads the first of them.
        one = next(own for own in inner if own.places)
        first, last = quiz.edges
        ids = torch.tensor([[first, *quiz.shown[one.text][one.start : one.end], last]])
        shift = one.start if keeps else 0
        places = torch.tensor([[0, *range(1 + shift, 16 + shift)]])
        seen = model.bert(ids, torch.ones_like(ids), position_ids=places).last_hidden_state[0]
        rows = [1 + place - one.start for place in one.places]
        torch.testing.assert_close(states[: len(rows)], seen[rows])


def test_what_windows_lose_is_counted_where_they_own(load) -> None:
    cuts = load("long_context").Cuts
    size = 16
    left = torch.arange(size).repeat(2)
    lost = (torch.minimum(left, size - 1 - left) < 4).double()
    files = torch.arange(2).repeat_interleave(size)
    own = cuts(left, size - 1 - left, lost, files)
    found = {row["way"]: (row["price"], row["lost"]) for row in own.by_stride("w", size)}
    # Of 16 pieces 8 are near an edge; of the 12 or 8 in the middle 4 are, or none.
    assert found["w, stride 0"] == (18 / 16, 0.5)
    assert found["w, stride 4"] == (18 / 12, pytest.approx(1 / 3))
    assert found["w, stride 8"] == (18 / 8, 0)
    assert [(row["from"], row["to"]) for row in own.by_distance(size)] == [
        (0, 0), (1, 1), (2, 3), (4, 7)
    ]  # fmt: skip
    assert [row["all"] for row in own.by_distance(size)] == [(1, 0), (1, 0), (1, 0), (0, 0)]
