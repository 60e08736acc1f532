"""Filling spans: exact against the model's own logits, and loud about misuse."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AddedToken, BertTokenizer

from spanbert_fast.config import Config
from spanbert_fast.model.pretrained import Model
from spanbert_fast.tasks.fill import FilledSpan, fill_span

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = ["the", "The", "cat", "Cat", "play", "##ing", "##ed", "sat", "on", "mat", "é", "do"]
WORDS = [*SPECIALS, *PIECES, "not", ".", ","]
SPECIAL = len(SPECIALS)
SLOTS = 4


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    return BertTokenizer(vocab=vocabulary, do_lower_case=False)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    config = Config.preset(
        "tiny",
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        max_position_embeddings=24,
        max_span_targets=SLOTS,
        initializer_range=0.3,
    )
    return Model(config).eval()


def run_scores(model: Model, tokenizer: Any, text: str, head: str) -> list[Tensor]:
    """Log-probabilities of each run of masks, from the public forward pass."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    is_mask = [False, *(ids[0] == tokenizer.mask_token_id).tolist(), False]
    firsts = [i for i in range(ids.shape[1]) if is_mask[i + 1] and not is_mask[i]]
    pasts = [i for i in range(1, ids.shape[1] + 1) if is_mask[i] and not is_mask[i + 1]]
    with torch.no_grad():
        if head == "mlm":
            logits = model(ids).logits[0]
            return [logits[a:b].log_softmax(-1) for a, b in zip(firsts, pasts, strict=True)]
        edges = torch.tensor([[[a - 1, b] for a, b in zip(firsts, pasts, strict=True)]])
        logits = model(ids, sbo_spans=edges).sbo_logits
    sizes = [b - a for a, b in zip(firsts, pasts, strict=True)]
    return [part.log_softmax(-1) for part in logits.split(sizes)]


def brute_force(scores: Tensor, k: int) -> list[tuple[float, tuple[int, ...]]]:
    entries = range(SPECIAL, len(WORDS))
    tries = itertools.product(entries, repeat=len(scores))
    scored = [(float(sum(row[i] for row, i in zip(scores, t, strict=True))), t) for t in tries]
    return sorted(scored, reverse=True)[:k]


def assert_exact(spans: list[FilledSpan], scores: Tensor, k: int) -> None:
    expected = brute_force(scores, k)
    assert [span.token_ids for span in spans] == [ids for _, ids in expected]
    for span, (score, ids) in zip(spans, expected, strict=True):
        assert span.log_probability == pytest.approx(score, abs=1e-5)
        each = [math.exp(float(row[i])) for row, i in zip(scores, ids, strict=True)]
        assert span.token_probabilities == pytest.approx(each, rel=1e-4)


TEXT = "The cat [MASK] [MASK] on [MASK] mat ."


@pytest.mark.parametrize("head", ["mlm", "sbo"])
def test_one_head_is_exact(model: Model, tokenizer: Any, head: str) -> None:
    found = fill_span(model, tokenizer, TEXT, top_k=7, head=head)
    scores = run_scores(model, tokenizer, TEXT, head)
    assert len(found) == len(scores) == 2
    for spans, expected in zip(found, scores, strict=True):
        assert_exact(spans, expected, 7)
        assert {span.head for span in spans} == {head}


def test_auto_adds_log_probabilities(model: Model, tokenizer: Any) -> None:
    found = fill_span(model, tokenizer, TEXT, top_k=7)
    both = [run_scores(model, tokenizer, TEXT, head) for head in ("mlm", "sbo")]
    for spans, mlm, sbo in zip(found, *both, strict=True):
        assert_exact(spans, (mlm + sbo).log_softmax(-1), 7)
        assert {span.head for span in spans} == {"mlm+sbo"}


@pytest.mark.parametrize("text", ["[MASK] cat .", "the [MASK]", "the [MASK] [SEP] cat"])
def test_auto_leaves_sbo_out_at_an_edge(model: Model, tokenizer: Any, text: str) -> None:
    [spans] = fill_span(model, tokenizer, text)
    assert {span.head for span in spans} == {"mlm"}
    with pytest.raises(ValueError, match=r"no ordinary token to its (left|right) \(position"):
        fill_span(model, tokenizer, text, head="sbo")


def test_sbo_beyond_its_slots_raises_with_both_numbers(model: Model, tokenizer: Any) -> None:
    text = "the " + "[MASK]" * (SLOTS + 1) + " ."
    with pytest.raises(ValueError, match=rf"is {SLOTS + 1} tokens long.* at most {SLOTS} "):
        fill_span(model, tokenizer, text, head="sbo")
    assert fill_span(model, tokenizer, text)[0][0].head == "mlm"
    exact = "the " + "[MASK]" * SLOTS + " ."
    assert fill_span(model, tokenizer, exact)[0][0].head == "mlm+sbo"


def test_texts_share_one_unpadded_pass(
    model: Model, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [TEXT, "[MASK]", "the [MASK] , do not [MASK]"]
    seen: list[int] = []
    original = model.bert.encode_packed

    def counted(batch: Any, **kwargs: Any) -> Any:
        seen.append(batch.num_tokens)
        return original(batch, **kwargs)

    monkeypatch.setattr(model.bert, "encode_packed", counted)
    together = fill_span(model, tokenizer, texts)
    assert seen == [sum(len(tokenizer(text)["input_ids"]) for text in texts)]
    apart = [spans for text in texts for spans in fill_span(model, tokenizer, text)]
    assert [spans[0].text_index for spans in together] == [0, 0, 1, 2, 2]
    for one, other in zip(together, apart, strict=True):
        assert [span.token_ids for span in one] == [span.token_ids for span in other]
        logs = [span.log_probability for span in other]
        assert [span.log_probability for span in one] == pytest.approx(logs, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (TEXT, ["[MASK] [MASK]", "[MASK]"]),
        ("é é [MASK][MASK]play[MASK], \U0001f600[MASK]", ["[MASK][MASK]", "[MASK]", "[MASK]"]),
        ("[MASK]\n\t [MASK] the [SEP] [MASK]", ["[MASK]\n\t [MASK]", "[MASK]"]),
    ],
)
def test_offsets_are_those_of_the_text(
    model: Model, tokenizer: Any, text: str, pieces: list[str]
) -> None:
    found = fill_span(model, tokenizer, [".[MASK]", text], top_k=2)[1:]
    assert [text[spans[0].start : spans[0].end] for spans in found] == pieces
    assert all(span.text_index == 1 for spans in found for span in spans)


def test_spaces_around_a_mask_are_not_part_of_it(model: Model, tokenizer: Any) -> None:
    greedy = BertTokenizer(vocab=dict(tokenizer.get_vocab()), do_lower_case=False)
    greedy.add_special_tokens({"mask_token": AddedToken("[MASK]", lstrip=True, rstrip=True)})
    text = "the  [MASK]  [MASK] mat"
    [spans] = fill_span(model, greedy, text)
    assert (spans[0].start, spans[0].end) == (5, 19)


def force(model: Model, ids: list[int]) -> None:
    """Makes the MLM head prefer these ids, in this order, everywhere."""
    with torch.no_grad():
        model.cls.predictions.bias.zero_()
        for rank, index in enumerate(ids):
            model.cls.predictions.bias[index] = 100.0 - 5 * rank


def test_text_joins_pieces(model: Model, tokenizer: Any) -> None:
    play, ing = WORDS.index("play"), WORDS.index("##ing")
    force(model, [ing, play])
    spans = fill_span(model, tokenizer, "the [MASK] [MASK] .", top_k=400, head="mlm")[0]
    texts = {span.token_ids: span.text for span in spans}
    assert texts[play, ing] == "playing"
    assert texts[ing, play] == "##ing play"
    assert texts[WORDS.index("do"), WORDS.index(".")] == "do ."
    assert texts[WORDS.index("The"), WORDS.index("Cat")] == "The Cat"


def test_special_tokens_never_fill(model: Model, tokenizer: Any) -> None:
    force(model, [0, 4, 2, 3, 1, 7])
    [spans] = fill_span(model, tokenizer, "the [MASK] .", top_k=1000, head="mlm")
    assert spans[0].token_ids == (7,)
    assert spans[0].log_probability < -20  # of the whole vocabulary, special tokens included
    assert {span.token_ids[0] for span in spans} == set(range(SPECIAL, len(WORDS)))


def test_model_with_more_entries_than_the_tokenizer(tokenizer: Any, model: Model) -> None:
    model.resize_token_embeddings(len(WORDS) + 6)
    [spans] = fill_span(model, tokenizer, "the [MASK] .", top_k=1000)
    assert len(spans) == len(WORDS) - SPECIAL


def test_lengths_compete_by_mean_log_probability(model: Model, tokenizer: Any) -> None:
    template = "the {} on the mat"
    [spans] = fill_span(model, tokenizer, template.format("[MASK]"), top_k=9, length=(1, 3))
    single = [
        span
        for size in (1, 2, 3)
        for span in fill_span(model, tokenizer, template.format("[MASK]" * size), top_k=9)[0]
    ]
    single.sort(key=lambda span: span.log_probability / len(span.token_ids), reverse=True)
    assert [span.token_ids for span in spans] == [span.token_ids for span in single[:9]]
    assert {(span.start, span.end) for span in spans} == {(4, 10)}


def test_lengths_use_the_same_heads_and_group_by_text(model: Model, tokenizer: Any) -> None:
    texts = ["the [MASK] mat", "[MASK]"]
    found = fill_span(model, tokenizer, texts, top_k=3, length=(1, SLOTS + 1))
    assert [len(spans) for spans in found] == [3, 3]
    assert [{span.text_index for span in spans} for spans in found] == [{0}, {1}]
    assert {span.head for spans in found for span in spans} == {"mlm"}
    with pytest.raises(ValueError, match=f"is {SLOTS + 1} tokens long"):
        fill_span(model, tokenizer, texts[0], length=(1, SLOTS + 1), head="sbo")


def test_untrained_heads_are_refused(model: Model, tokenizer: Any) -> None:
    model.config.untrained_heads = ["sbo"]
    assert fill_span(model, tokenizer, "the [MASK] .")[0][0].head == "mlm"
    with pytest.raises(ValueError, match="head='sbo' would give random predictions"):
        fill_span(model, tokenizer, "the [MASK] .", head="sbo")
    model.config.untrained_heads = ["mlm"]
    assert fill_span(model, tokenizer, "the [MASK] .")[0][0].head == "sbo"
    with pytest.raises(ValueError, match="no ordinary token to its right"):
        fill_span(model, tokenizer, "the [MASK]")
    model.config.untrained_heads = ["mlm", "sbo"]
    with pytest.raises(ValueError, match="untrained heads of this model are mlm, sbo"):
        fill_span(model, tokenizer, "the [MASK] .")
    allowed = fill_span(model, tokenizer, "the [MASK] .", allow_untrained_heads=True)
    assert allowed[0][0].head == "mlm+sbo"


def test_dropout_is_off_and_the_mode_is_left_alone(model: Model, tokenizer: Any) -> None:
    quiet = fill_span(model, tokenizer, TEXT)
    model.train()
    model.bert.embeddings.eval()
    assert fill_span(model, tokenizer, TEXT) == quiet
    assert model.training
    assert model.cls.training
    assert not model.bert.embeddings.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(model: Model, tokenizer: Any, dtype: torch.dtype) -> None:
    expected = fill_span(model, tokenizer, TEXT, top_k=1)
    found = fill_span(model.to(dtype), tokenizer, TEXT, top_k=1)
    for one, other in zip(found, expected, strict=True):
        assert one[0].log_probability == pytest.approx(other[0].log_probability, abs=0.3)


def test_text_longer_than_the_model_raises(model: Model, tokenizer: Any) -> None:
    fits = "the " * 21 + "[MASK]"
    assert len(fill_span(model, tokenizer, fits)) == 1
    with pytest.raises(ValueError, match=r"text 1 has 25 tokens .* the model allows 24"):
        fill_span(model, tokenizer, [fits, "the " + fits])
    with pytest.raises(ValueError, match="text 0 has 25 tokens"):
        fill_span(model, tokenizer, fits, length=(1, 2))


def test_foreign_tokenizer_raises(model: Model) -> None:
    vocabulary = {word: index for index, word in enumerate([*WORDS, "extra"])}
    foreign = BertTokenizer(vocab=vocabulary, do_lower_case=False)
    with pytest.raises(ValueError, match="the tokenizer is not this model's"):
        fill_span(model, foreign, "extra [MASK]")


def test_damaged_weights_raise(model: Model, tokenizer: Any) -> None:
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        fill_span(model, tokenizer, "the [MASK]")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": "no mask"}, ValueError, r"text 0 has no \[MASK\]: 'no mask'"),
        ({"text": ["the [MASK]", ""]}, ValueError, r"text 1 has no \[MASK\]"),
        ({"text": []}, ValueError, "no text"),
        ({"text": 3}, TypeError, "not 3"),
        ({"text": ["the [MASK]", None]}, TypeError, "str"),
        ({"text": b"[MASK]"}, TypeError, "str"),
        ({"top_k": 0}, ValueError, "at least 1, not 0"),
        ({"top_k": 2.0}, TypeError, "not 2.0"),
        ({"top_k": True}, TypeError, "not True"),
        ({"head": "MLM"}, ValueError, "auto, mlm, sbo, not 'MLM'"),
        ({"length": 3}, TypeError, "not 3"),
        ({"length": (1, 2, 3)}, TypeError, "two ints"),
        ({"length": (1.0, 2)}, TypeError, "two ints"),
        ({"length": (0, 2)}, ValueError, "1 <= shortest"),
        ({"length": (3, 2)}, ValueError, "1 <= shortest"),
        ({"text": TEXT, "length": (1, 2)}, ValueError, "text 0 has 3"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "not Linear"),
        ({"tokenizer": "bert"}, TypeError, "not str"),
    ],
)
def test_misuse_is_named(
    model: Model, tokenizer: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"model": model, "tokenizer": tokenizer, "text": "the [MASK] .", **arguments}
    with pytest.raises(error, match=message):
        fill_span(**given)


def test_tokenizer_without_a_mask_raises(model: Model, tokenizer: Any) -> None:
    bare = BertTokenizer(vocab=dict(tokenizer.get_vocab()), do_lower_case=False)
    bare.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        fill_span(model, bare, "the [MASK]")
