"""Vectors of spans that are given by character offsets."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from spanbert_fast.model.pretrained import Model
from spanbert_fast.tasks.inference import inference
from spanbert_fast.tasks.texts import (
    WINDOW_TOKENS,
    Extent,
    check_texts,
    cut,
    encode_texts,
    pack,
    passes,
    special_edges,
)
from spanbert_fast.tasks.windows import Windows, windows_of_choice

Pooling = Literal["endpoints", "mean", "attention"]
Scorer = Callable[[Tensor], Tensor]


class SpanEmbeddings(NamedTuple):
    """The spans of one text."""

    vectors: Tensor
    """[spans, D], or [spans, 2 D] for "endpoints"; on the model's device, in its dtype."""
    pieces: list[tuple[int, int]]
    """Of each span: its first piece and the one past its last, special tokens counted."""


def span_embeddings(
    model: Model,
    tokenizer: Any,
    text: str | Sequence[str],
    spans: Sequence[tuple[int, int]] | Sequence[Sequence[tuple[int, int]]],
    *,
    pooling: Pooling = "endpoints",
    scorer: Scorer | Tensor | None = None,
    layer: int = -1,
    batch_tokens: int = WINDOW_TOKENS,
    windows: Windows | bool = False,
) -> list[SpanEmbeddings]:
    """One vector for each span of each text.

    A span covers every piece that it shares a character with: one that begins or ends inside of a
    piece takes the whole piece, white space at its ends takes none. Texts are packed, so padding
    costs nothing, and a text gets the same vectors in any company.

    - "endpoints": the states of the first and the last piece, one after the other, as in SpanBERT's
      coreference model (Joshi et al. 2019, 2020).
    - "mean": of the states of all its pieces.
    - "attention": their mean weighted by a softmax of scores (Lee et al. 2017, section 3.2). The
      scores are the `scorer`'s. Without one, nothing is learned for it, so the score of a piece is
      x . m / sqrt(D), x its state and m the mean of the span's: pieces that agree with the span
      weigh more.

    Args:
        model: in training mode gradients flow and dropout acts, so that something can be trained on
            top; in evaluation mode there is no gradient.
        tokenizer: a fast Hugging Face tokenizer, as `load_tokenizer` gives it.
        text: one text or several.
        spans: (start, end) characters, end exclusive: a list for one text, a list of lists for
            several.
        pooling: "endpoints", "mean" or "attention".
        scorer: for "attention" only: a vector [D], or a module or function from states [..., D] to
            scores [...] or [..., 1].
        layer: whose output; -1 is the last, 0 the embedding.
        batch_tokens: of one pass through the encoder, at most, unless one text or window has more.
        windows: True, or `Windows(...)`: a longer text than the model allows is read in windows
            that overlap, each span whole in the one where it is farthest from an edge.

    Returns:
        In the order of the texts, each with its spans in their order.

    Raises:
        TypeError: an argument has the wrong type, or the tokenizer knows no character offsets.
        ValueError: a span is empty, reaches out of its text or has white space alone; a text is
            longer than the model allows (without windows), a span longer than a window; a setting
            is out of range.
    """
    texts = check_texts(model, tokenizer, text)
    wanted: Any = [spans] if isinstance(text, str) else spans
    if not isinstance(wanted, Sequence) or len(wanted) != len(texts):
        raise ValueError(f"spans must hold one list for each of {len(texts)} texts")
    _check_settings(model, pooling, scorer, layer)
    cutting = windows_of_choice(windows)
    encoded = encode_texts(model, tokenizer, texts)
    pieces = [_pieces_of(index, texts[index], own, encoded) for index, own in enumerate(wanted)]
    extents = [Extent(index, *place) for index, own in enumerate(pieces) for place in own]
    excerpts = cut(model, encoded["input_ids"], special_edges(encoded), extents, cutting)
    found: list[list[Tensor]] = [[] for _ in texts]
    order: list[list[int]] = [[] for _ in texts]
    for part in passes(excerpts, batch_tokens, cutting):
        states = _states(model, [excerpt.ids for excerpt in part], layer)
        for rows, excerpt in zip(states, part, strict=True):
            own = [extents[number] for number in excerpt.extents]
            places = [(first - excerpt.shift, past - excerpt.shift) for _, first, past in own]
            found[excerpt.sequence].append(_vectors(rows, places, pooling, scorer))
            order[excerpt.sequence] += excerpt.extents
    size = int(model.config.hidden_size) * (2 if pooling == "endpoints" else 1)
    empty = torch.zeros((0, size), dtype=model.dtype, device=model.device)
    return [
        SpanEmbeddings(_in_order(vectors or [empty], numbers), own)
        for vectors, numbers, own in zip(found, order, pieces, strict=True)
    ]


def _in_order(vectors: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    """The vectors of a text, as its spans are numbered."""
    if len(vectors) == 1:
        return vectors[0]
    rows = torch.cat(list(vectors))
    return rows.index_select(0, torch.tensor(numbers, device=rows.device).argsort())


def _check_settings(model: Model, pooling: str, scorer: object, layer: int) -> None:
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
    if scorer is not None and pooling != "attention":
        raise ValueError(f"scorer is for pooling='attention', got pooling={pooling!r}")
    size, count = model.config.hidden_size, model.config.num_hidden_layers
    if isinstance(scorer, Tensor) and tuple(scorer.shape) != (size,):
        raise ValueError(f"scorer must have shape ({size},), got {tuple(scorer.shape)}")
    if not (scorer is None or isinstance(scorer, Tensor) or callable(scorer)):
        raise TypeError(f"scorer must be a tensor or callable, not {type(scorer).__name__}")
    if not -count - 1 <= layer <= count:
        raise ValueError(f"layer must be in [{-count - 1}, {count}], got {layer}")


def _pieces_of(index: int, text: str, spans: Any, encoded: Any) -> list[tuple[int, int]]:
    """First piece and past the last one of every span."""
    # Special tokens have the empty offset (0, 0), and so share no character with any span. A
    # byte-level piece holds the space before it, which a span need not.
    places = [_stripped(text, *place) for place in encoded["offset_mapping"][index]]
    numbers = [number for number, (first, past) in enumerate(places) if first < past]
    firsts, pasts = [places[n][0] for n in numbers], [places[n][1] for n in numbers]
    found = []
    for span in spans:
        if not isinstance(span, Sequence) or len(span) != 2 or {*map(type, span)} != {int}:
            raise TypeError(f"a span must be two ints (start, end), text {index} has {span!r:.60}")
        start, end = span
        if not 0 <= start < end <= len(text):
            raise ValueError(
                f"span {(start, end)} of text {index} must have 0 <= start < end <= {len(text)}"
            )
        # Both ends of pieces ascend, so that a text of any length is searched at once.
        covered = numbers[bisect_right(pasts, start) : bisect_left(firsts, end)]
        if not covered:
            raise ValueError(
                f"span {(start, end)} of text {index} holds no piece of the text: "
                f"{text[start:end]!r:.60}"
            )
        found.append((covered[0], covered[-1] + 1))
    return found


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return (start + len(piece) - len(piece.lstrip()), end) if piece.strip() else (start, start)


def _states(model: Model, sequences: Sequence[Sequence[int]], layer: int) -> Sequence[Tensor]:
    """The states of each sequence, [length, D]."""
    batch = pack(sequences).to(model.device)

    def encode() -> Tensor:
        is_last = layer in (-1, int(model.config.num_hidden_layers))
        output = model.bert.encode_packed(batch, output_hidden_states=not is_last)
        if is_last:
            return output.last_hidden_state
        assert output.hidden_states is not None
        return output.hidden_states[layer]

    lengths = [len(ids) for ids in sequences]
    if model.training:
        return torch.split(encode(), lengths)
    with inference(model):
        return torch.split(encode(), lengths)


def _vectors(
    rows: Tensor, pieces: Sequence[tuple[int, int]], pooling: str, scorer: Scorer | Tensor | None
) -> Tensor:
    """[spans, D] or [spans, 2 D]."""
    if not pieces:
        return rows.new_zeros((0, rows.shape[1] * (2 if pooling == "endpoints" else 1)))
    if pooling == "endpoints":
        ends = torch.tensor([[first, past - 1] for first, past in pieces], device=rows.device)
        return rows.index_select(0, ends.flatten()).view(len(pieces), -1)
    return torch.stack([_pool(rows[slice(*place)], pooling, scorer) for place in pieces])


def _pool(rows: Tensor, pooling: str, scorer: Scorer | Tensor | None) -> Tensor:
    """[pieces, D] -> [D], summed up in float32 or wider."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    mean = wide.mean(0)
    if pooling == "mean":
        return mean.to(rows.dtype)
    if scorer is None:
        scores = wide @ mean / rows.shape[1] ** 0.5
    elif isinstance(scorer, Tensor):
        scores = wide @ scorer.to(wide)
    else:
        scores = scorer(rows)
    if scores.numel() != len(rows):
        raise ValueError(
            f"scorer must give one score for each of {len(rows)} pieces, got shape "
            f"{tuple(scores.shape)}"
        )
    weights: Tensor = scores.reshape(-1).to(wide.dtype).softmax(0)
    return (weights @ wide).to(rows.dtype)
