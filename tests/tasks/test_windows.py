"""Windows: who owns a piece is a rule, and each task says of a window what it says of it alone."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spanbert_fast.cli import main
from spanbert_fast.config import Config
from spanbert_fast.data.tokenizer import save_tokenizer
from spanbert_fast.data.wordpiece import train_tokenizer
from spanbert_fast.model.pretrained import Model
from spanbert_fast.model.span_scores import SpanScoring, attention_of_words
from spanbert_fast.model.span_segmenter import SpanSegmenter, mean_of_words
from spanbert_fast.tasks.fill import fill_span
from spanbert_fast.tasks.segment import segment
from spanbert_fast.tasks.span_embeddings import span_embeddings
from spanbert_fast.tasks.windows import Windows, plan_windows, window_of
from spanbert_fast.tasks.words import find_words, read_words

SENTENCE = "We must work together, unbelievably so: the quiet river follows a broken engine."
LIMIT, HEART = 24, 22  # tokens that the model allows, and pieces among them


@st.composite
def texts(draw: st.DrawFn) -> tuple[int, int, int]:
    """Pieces of a text, of a window, and in common."""
    size = draw(st.integers(1, 600))
    return draw(st.integers(1, 200_000)), size, draw(st.integers(0, size - 1))


@settings(max_examples=80)
@given(texts(), st.integers(0, 2**32))
@example((200_000, 510, 255), 0)
@example((200_000, 2, 1), 0)
@example((511, 510, 509), 0)
@example((510, 510, 0), 0)
@example((1, 1, 0), 0)
def test_every_piece_is_owned_once_by_the_window_with_the_farthest_edges(
    shape: tuple[int, int, int], seed: int
) -> None:
    num_pieces, size, stride = shape
    plan = plan_windows(num_pieces, size, stride)
    starts, ends = torch.tensor([window[:2] for window in plan]).unbind(1)
    first, past = torch.tensor([window[2:] for window in plan]).unbind(1)
    assert int(starts[0]) == 0
    assert int(ends[-1]) == num_pieces
    assert bool((ends - starts == min(size, num_pieces)).all())
    assert bool((starts.diff() >= 1).all())
    assert bool((ends[:-1] - starts[1:] >= stride).all())
    assert bool((first <= past).all())
    assert int(first[0]) == 0
    assert int(past[-1]) == num_pieces
    assert torch.equal(past[:-1], first[1:])
    generator = random.Random(seed)
    near_borders = [int(p) + d for p in generator.choices(past.tolist(), k=8) for d in (-1, 0)]
    for piece in [p for p in near_borders if p < num_pieces] + generator.choices(
        range(num_pieces), k=8
    ):
        to_edge = torch.minimum(piece - starts, ends - 1 - piece)
        owner = int(to_edge.argmax())  # the first one of several
        assert int(to_edge[owner]) >= 0
        assert plan[owner].owned_start <= piece < plan[owner].owned_end
        assert window_of(plan, piece, piece + 1) == plan[owner][:2]


@settings(max_examples=100)
@given(texts(), st.data())
def test_a_span_is_read_whole_and_far_from_the_edges(
    shape: tuple[int, int, int], data: st.DataObject
) -> None:
    num_pieces, size, stride = shape
    plan = plan_windows(num_pieces, size, stride)
    length = data.draw(st.integers(1, min(size, num_pieces)))
    first = data.draw(st.integers(0, num_pieces - length))
    start, end = window_of(plan, first, first + length)
    assert 0 <= start <= first
    assert first + length <= end <= num_pieces
    assert end - start == min(size, num_pieces)
    holding = [w for w in plan if w.start <= first and first + length <= w.end]
    assert holding or length > stride + 1
    if holding:
        edges = [min(first - w.start, w.end - first - length) for w in holding]
        assert start == holding[edges.index(max(edges))].start
    else:
        assert abs((first - start) - (end - first - length)) <= 1


def test_a_small_plan_by_hand() -> None:
    # Centres at 2, 5, 8 and 9: no piece is as near to two of them.
    assert [tuple(window) for window in plan_windows(12, 5, 2)] == [
        (0, 5, 0, 4),
        (3, 8, 4, 7),
        (6, 11, 7, 9),
        (7, 12, 9, 12),
    ]
    # Centres at 2, 4 and 6: pieces 3 and 5 lie in the middle and go to the left.
    assert [tuple(window) for window in plan_windows(9, 5, 3)] == [
        (0, 5, 0, 4),
        (2, 7, 4, 6),
        (4, 9, 6, 9),
    ]
    assert window_of(plan_windows(12, 5, 0), 3, 7) == (2, 7)
    assert [tuple(window) for window in plan_windows(0, 5, 2)] == [(0, 0, 0, 0)]
    with pytest.raises(ValueError, match="got num_pieces=3, size=2, stride=2"):
        plan_windows(3, 2, 2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([SENTENCE] * 3, 90)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Model:
    torch.manual_seed(0)
    config = Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=LIMIT,
        initializer_range=0.3,
    )
    return Model(config).eval()


@pytest.fixture(scope="module")
def words() -> list[str]:
    """Words that are one piece each or several."""
    generator = random.Random(3)
    return generator.choices(re.sub("[,:.]", "", SENTENCE).split(), k=60)


def pieces_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def states_of(model: Model, tokenizer: Any, pieces: list[int]) -> Tensor:
    """Last hidden states [pieces, D] of a window that stands alone."""
    ids = [tokenizer.cls_token_id, *pieces, tokenizer.sep_token_id]
    with torch.no_grad():
        return model.bert(torch.tensor([ids])).last_hidden_state[0, 1:-1]


@pytest.mark.parametrize("stride", [None, 0, 5, 21])
def test_vectors_are_those_of_the_window_alone(
    model: Model, tokenizer: Any, words: list[str], stride: int | None
) -> None:
    text = " ".join(words)
    pieces = pieces_of(tokenizer, text)
    assert len(pieces) > 4 * HEART
    generator = random.Random(0)
    starts = [generator.randrange(len(text) - 40) for _ in range(30)]
    spans = [(start, start + generator.randrange(2, 30)) for start in starts]
    windows = Windows(stride=stride)
    (found,) = span_embeddings(
        model, tokenizer, text, spans, pooling="mean", windows=windows, batch_tokens=60
    )
    plan = plan_windows(len(pieces), HEART, HEART // 2 if stride is None else stride)
    for vector, (first, past) in zip(found.vectors, found.pieces, strict=True):
        start, end = window_of(plan, first - 1, past - 1)
        states = states_of(model, tokenizer, pieces[start:end])
        expected = states[first - 1 - start : past - 1 - start].mean(0)
        torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-5)
    places = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    for (start, end), (first, past) in zip(spans, found.pieces, strict=True):
        assert places[first][1] > start
        assert places[past - 1][0] < end


def test_fillings_are_those_of_the_window_alone(
    model: Model, tokenizer: Any, words: list[str]
) -> None:
    masked = list(words)
    for place in (0, 1, 7, 20, 21, 22, 40, len(words) - 1):
        masked[place] = "[MASK]"
    text = " ".join(masked)
    found = fill_span(model, tokenizer, ["We [MASK] work", text], windows=True, top_k=3)
    assert [spans[0].text_index for spans in found] == [0, *[1] * 5]
    pieces = pieces_of(tokenizer, text)
    plan = plan_windows(len(pieces), HEART, HEART // 2)
    runs = []
    for place, piece in enumerate(pieces):
        if piece == tokenizer.mask_token_id and pieces[place - 1 : place] != [piece]:
            runs.append(place)
    heads = []
    for first, spans in zip(runs, found[1:], strict=True):
        length = len(spans[0].token_ids)
        window = window_of(plan, max(first - 1, 0), min(first + length + 1, len(pieces)))
        states = states_of(model, tokenizer, pieces[slice(*window)])
        heads.append(spans[0].head)
        assert text[spans[0].start : spans[0].end] == " ".join(["[MASK]"] * length)
        rows = states[first - window[0] : first - window[0] + length]
        with torch.no_grad():
            scores = model.cls.mlm_logits(rows).log_softmax(-1)
        if spans[0].head == "mlm":
            total = sum(float(scores[i, t]) for i, t in enumerate(spans[0].token_ids))
            assert spans[0].log_probability == pytest.approx(total, abs=1e-4)
    # The ends of the text have no neighbour; all other runs keep theirs, whatever the window.
    assert heads == ["mlm", *["mlm+sbo"] * 3, "mlm"]


def test_heads_in_windows_are_those_of_the_window_alone(
    model: Model, tokenizer: Any, words: list[str]
) -> None:
    text = " ".join([*words[:30], "[MASK]", "[MASK]", *words[30:]])
    (spans,) = fill_span(model, tokenizer, text, windows=True, top_k=5)
    pieces = pieces_of(tokenizer, text)
    first = pieces.index(tokenizer.mask_token_id)
    start, end = window_of(plan_windows(len(pieces), HEART, HEART // 2), first - 1, first + 3)
    ids = [tokenizer.cls_token_id, *pieces[start:end], tokenizer.sep_token_id]
    edges = torch.tensor([[[first - start, first - start + 3]]])
    with torch.no_grad():
        output = model(torch.tensor([ids]), sbo_spans=edges)
    mlm = output.logits[0, first - start + 1 : first - start + 3].log_softmax(-1)
    both = (mlm + output.sbo_logits.log_softmax(-1)).log_softmax(-1)
    for span in spans:
        total = sum(float(both[i, t]) for i, t in enumerate(span.token_ids))
        assert span.log_probability == pytest.approx(total, abs=1e-4)
    lengths = fill_span(
        model, tokenizer, text.replace("[MASK] [MASK]", "[MASK]"), length=(1, 3), windows=True
    )
    assert {span.text_index for span in lengths[0]} == {0}


@pytest.mark.parametrize("stride", [None, 3])
def test_words_are_read_with_their_neighbours_in_one_window(
    model: Model, tokenizer: Any, words: list[str], stride: int | None
) -> None:
    text, scoring = " ".join(words), SpanScoring(max_words=2)
    windows = Windows(stride=stride)
    with torch.no_grad():
        found = read_words(model, tokenizer, ["so", text, "", "We must"], scoring, windows, 50)
    assert found.words.cu_words.tolist() == [0, 1, 61, 61, 63]
    assert [text[slice(*place)] for place in found.offsets[1]] == words
    counts = [len(pieces_of(tokenizer, word)) for word in words]
    borders = [sum(counts[:number]) for number in range(len(counts) + 1)]
    plan = plan_windows(borders[-1], HEART, HEART // 2 if stride is None else stride)
    for number in range(0, len(words), 3):
        low, high = max(number - 2, 0), min(number + 3, len(words))
        start, end = window_of(plan, borders[low], borders[high])
        inside = [n for n in range(len(words)) if start <= borders[n] and borders[n + 1] <= end]
        # Pieces of words that are cut stand in the window, too, but count for none.
        with torch.no_grad():
            attention, rows = read_alone(model, tokenizer, text, start, end, counts, inside)
        place = inside.index(number)
        torch.testing.assert_close(found.attention[1 + number], attention[place], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.rows[1 + number], rows[place], atol=1e-4, rtol=1e-4)


def read_alone(
    model: Model,
    tokenizer: Any,
    text: str,
    start: int,
    end: int,
    counts: list[int],
    inside: list[int],
) -> tuple[Tensor, Tensor]:
    """Attention and rows of the whole words of a window, from dense probabilities."""
    pieces = pieces_of(tokenizer, text)[start:end]
    ids = torch.tensor([[tokenizer.cls_token_id, *pieces, tokenizer.sep_token_id]])
    output = model.bert(ids, output_attentions=True)
    dense = torch.stack(output.attentions)[:, 0].mean((0, 1))[1:-1, 1:-1]
    first = sum(counts[: inside[0]]) - start
    attention = torch.zeros(len(inside), 5)
    rows = []
    begins = [first + sum(counts[inside[0] : number]) for number in inside]
    spans = [slice(b, b + counts[n]) for b, n in zip(begins, inside, strict=True)]
    for i, own in enumerate(spans):
        rows.append(output.last_hidden_state[0, 1:-1][own].mean(0))
        for j in range(max(0, i - 2), min(len(inside), i + 3)):
            attention[i, j - i + 2] = dense[own, spans[j]].sum(1).mean()
    return attention, torch.stack(rows)


def test_segments_tile_a_long_text(model: Model, tokenizer: Any, words: list[str]) -> None:
    text = " ".join(words) + ". " + " ".join(words[:20]) + "."
    torch.manual_seed(1)
    segmenter = SpanSegmenter(32, max_words=3)
    scoring = SpanScoring(max_words=3, stop_probability=0.05)
    for trained in (None, segmenter):
        (spans,) = segment(
            model,
            tokenizer,
            text,
            scoring=scoring,
            segmenter=trained,
            windows=True,
            respect_sentences=True,
        )
        place, border = 0, text.index(".") + 1
        for span in spans:
            assert text[place : span.start].strip() == ""
            assert span.end <= border or span.start >= border
            place = span.end
        assert place == len(text)
        assert trained or {span.num_words for span in spans} > {1}


def test_a_text_that_fits_is_read_as_without_windows(model: Model, tokenizer: Any) -> None:
    text = ["the quiet [MASK] follows", "We [MASK]"]
    assert fill_span(model, tokenizer, text, windows=True) == fill_span(model, tokenizer, text)
    plain, cut = (
        span_embeddings(model, tokenizer, text, [[(0, 9)], [(0, 2)]], windows=on)
        for on in (False, True)
    )
    assert all(torch.equal(a.vectors, b.vectors) for a, b in zip(plain, cut, strict=True))
    for one, two in zip(
        segment(model, tokenizer, text), segment(model, tokenizer, text, windows=True), strict=True
    ):
        assert [span[:7] for span in one] == [span[:7] for span in two]
        assert all(torch.equal(a.vector, b.vector) for a, b in zip(one, two, strict=True))
    scoring = SpanScoring()
    found = find_words(model, tokenizer, text)
    with torch.no_grad():
        states = model.bert.encode_packed(found.batch, output_hidden_states=True).hidden_states
        assert states is not None
        read = read_words(model, tokenizer, text, scoring, None, None)
        direct = attention_of_words(model.bert, found.batch, states, found.words, scoring)
        assert torch.equal(read.attention, direct)
        assert torch.equal(read.rows, mean_of_words(states[-1], found.words))


def test_passes_are_bounded_and_skip_what_nobody_asks_for(
    model: Model, tokenizer: Any, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = model.bert.encode_packed

    def counted(batch: Any, **kwargs: Any) -> Any:
        seen.append(batch.num_tokens)
        return original(batch, **kwargs)

    monkeypatch.setattr(model.bert, "encode_packed", counted)
    text = " ".join(words * 3)
    num_windows = len(plan_windows(len(pieces_of(tokenizer, text)), HEART, HEART // 2))
    near = SpanScoring(max_words=2)
    segment(model, tokenizer, text, windows=True, batch_tokens=3 * LIMIT, scoring=near)
    assert max(seen) == 3 * LIMIT
    assert sum(seen) == num_windows * LIMIT
    seen.clear()
    segment(model, tokenizer, text, windows=True, batch_tokens=1, scoring=near)
    assert set(seen) == {LIMIT}
    seen.clear()
    fill_span(model, tokenizer, f"{text} [MASK] {text}", windows=True)
    span_embeddings(model, tokenizer, text, [(50, 60)], windows=True)
    assert seen == [LIMIT, LIMIT]
    (nothing,) = span_embeddings(model, tokenizer, text, [], windows=True)
    assert nothing.vectors.shape == (0, 64)
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        fill_span(model, tokenizer, "the [MASK]", batch_tokens=0)


def test_a_text_that_is_too_long_names_the_three_ways(
    model: Model, tokenizer: Any, words: list[str]
) -> None:
    text = " ".join(words)
    calls: list[Any] = [
        lambda: fill_span(model, tokenizer, text + " [MASK]"),
        lambda: segment(model, tokenizer, text),
        lambda: span_embeddings(model, tokenizer, text, [(0, 2)]),
        lambda: model(**tokenizer(text, return_tensors="pt")),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"{LIMIT}") as caught:
            call()
        for way in ("windows=True", "max_position_embeddings=", "attention_window="):
            assert way in str(caught.value)


@pytest.mark.parametrize(
    ("windows", "error", "message"),
    [
        (Windows(max_length=25), ValueError, r"max_length must be in \[3, 24\].* got 25"),
        (Windows(max_length=2), ValueError, r"in \[3, 24\] for this model .* got 2"),
        (Windows(stride=22), ValueError, "stride must be below the 22 pieces .* got 22"),
        (Windows(max_length=10, stride=8), ValueError, "below the 8 pieces"),
        (3, TypeError, r"windows must be True, False or Windows\(...\), got 3"),
        (None, TypeError, "got None"),
    ],
)
def test_windows_that_cannot_be_are_refused(
    model: Model, tokenizer: Any, windows: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fill_span(model, tokenizer, "the [MASK]", windows=windows)
    with pytest.raises(error, match=message):
        segment(model, tokenizer, "the", windows=windows)
    with pytest.raises(error, match=message):
        span_embeddings(model, tokenizer, "the", [(0, 1)], windows=windows)


@pytest.mark.parametrize(
    ("max_length", "expected"), [(None, (510, 128)), (258, (256, 128)), (128, (126, 63))]
)
def test_neighbours_share_half_and_at_most_128(
    max_length: int | None, expected: tuple[int, int]
) -> None:
    assert Windows(max_length=max_length).sizes(512, 2) == expected
    assert Windows(max_length=max_length, stride=0).sizes(512, 2) == (expected[0], 0)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        Windows(max_length=0)
    with pytest.raises(ValueError, match="stride must be at least 0, got -1"):
        Windows(stride=-1)
    with pytest.raises(TypeError, match=r"stride must be an int, got 2\.0"):
        Windows(stride=2.0)  # type: ignore[arg-type]


def test_what_is_longer_than_a_window_raises(
    model: Model, tokenizer: Any, words: list[str]
) -> None:
    text = " ".join(words)
    with pytest.raises(ValueError, match=r"of text 0 must be read at once and are \d+; .* 22 "):
        span_embeddings(model, tokenizer, text, [(0, len(text))], windows=True)
    with pytest.raises(ValueError, match=r"of text 0 must be read at once and are 23; .* holds 22"):
        fill_span(model, tokenizer, f"so {'[MASK]' * 21} so {text}", windows=True)
    with pytest.raises(ValueError, match=r"are \d+; a window holds 8 beside 2 special tokens"):
        segment(model, tokenizer, text, windows=Windows(max_length=10))


def test_commands_read_long_texts_in_windows(
    model: Model,
    tokenizer: Any,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, text = str(tmp_path / "model"), " ".join([*words, "[MASK]", "so"])
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, Path(folder))
    for command in (["fill", folder, text], ["segment", folder, text, "--max-words", "2"]):
        assert main(command) == 2
        assert "--windows on the command line" in capsys.readouterr().err
        for flags in (["--windows"], ["--stride", "9"], ["--max-length", "20"]):
            assert main([*command, "--json", *flags]) == 0
            found = json.loads(capsys.readouterr().out)
            assert found
    assert main(["fill", folder, text, "--stride", "22"]) == 2
    assert "stride must be below the 22 pieces" in capsys.readouterr().err
