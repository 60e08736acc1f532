"""Cut texts into spans: by a model's attention alone, or by a trained `SpanSegmenter`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spanbert_fast.data.sentences import split_sentences
from spanbert_fast.model.pretrained import Model
from spanbert_fast.model.segmentation import best_segmentation, span_probabilities
from spanbert_fast.model.span_scores import SpanScoring, attention_span_scores
from spanbert_fast.model.span_segmenter import SpanSegmenter
from spanbert_fast.tasks.inference import inference
from spanbert_fast.tasks.texts import check_texts
from spanbert_fast.tasks.windows import Windows, windows_of_choice
from spanbert_fast.tasks.words import read_words


class Segment(NamedTuple):
    """One span of a segmentation."""

    text: str
    start: int
    """Character offset in the given text."""
    end: int
    """Character offset just past the span."""
    num_words: int
    score: float
    marginal: float
    """Probability of the span over all segmentations."""
    label: int
    """Of a trained segmenter; 0 by attention alone."""
    vector: Tensor
    """[D], mean of its words' last hidden states, weighted by the attention that they get inside
    of the span; float32 or wider, on the CPU."""


def segment(
    model: Model,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    scoring: SpanScoring | None = None,
    segmenter: SpanSegmenter | None = None,
    respect_sentences: bool = False,
    language: str = "en",
    num_threads: int = 1,
    windows: Windows | bool = False,
    batch_tokens: int | None = None,
) -> list[list[Segment]]:
    """The best segmentation of each text into spans of whole words.

    Words begin where the tokenizer's vocabulary says so, and punctuation marks are words. Each text
    is segmented as if it stood alone, and as a whole, also where it is read in windows.

    Args:
        model: its training mode is left as it was; dropout is off meanwhile.
        tokenizer: a fast Hugging Face tokenizer, as `load_tokenizer` gives it.
        text: one text or several.
        scoring: how attention becomes scores; by default all layers and heads.
        segmenter: scores spans in the attention's place; `scoring` then only weighs `vector`.
        respect_sentences: no span crosses the border of a sentence.
        language: of the sentences, a code such as `en`; `sentencex` reads those that it does not
            know by its general rules.
        num_threads: of the search for the best segmentation.
        windows: True, or `Windows(...)`: a longer text than the model allows is read in windows
            that overlap, each word with `scoring.max_words` words on either side of it in the one
            where they are farthest from an edge.
        batch_tokens: of one pass through the encoder, at most, unless one text or window has more;
            without it all texts go through one pass, windows through passes of 8,192.

    Returns:
        For each text its spans from left to right. They leave out white space, and what the
        tokenizer drops where it stands between spans, such as a zero-width or combining mark.

    Raises:
        TypeError: an argument has the wrong type, or the tokenizer knows no character offsets.
        ValueError: a text is longer than the model allows (without windows), a word with those
            around it longer than a window, a setting is out of range, or the model's attention is
            not finite.
    """
    texts = check_texts(model, tokenizer, text)
    scoring = SpanScoring() if scoring is None else scoring
    _check_choices(model, scoring, segmenter, num_threads)
    cutting = windows_of_choice(windows)
    with inference(model):
        found = read_words(model, tokenizer, texts, scoring, cutting, batch_tokens)
        if segmenter is None:
            every = attention_span_scores(found.attention, found.words, scoring)[..., None]
        else:
            with inference(segmenter):
                every = segmenter(found.rows, found.words)
    wide, attention, rows = _on_cpu(every), _on_cpu(found.attention), _on_cpu(found.rows)
    # Standardisation would turn attention that is not a number into no evidence at all.
    if not (attention.isfinite().all() and rows.isfinite().all()):
        raise ValueError(
            "attention and hidden states must be finite, got some that are not: the model's "
            "weights are damaged, or their dtype is too narrow for them"
        )
    borders = found.words.cu_words.cpu()
    if respect_sentences:
        borders = _sentence_borders(texts, found.offsets, borders, language)
    scores = wide.amax(-1)
    best = best_segmentation(scores, borders, num_threads=num_threads)
    # Labels are summed over for the probability of a span and chosen for its score.
    marginals = span_probabilities(wide.logsumexp(-1), borders, num_threads=num_threads).marginals
    labels = wide.argmax(-1)
    places = [(index, *place) for index, own in enumerate(found.offsets) for place in own]
    result: list[list[Segment]] = [[] for _ in texts]
    for first, size in zip(best.starts.tolist(), best.lengths.tolist(), strict=True):
        index, start, _ = places[first]
        end = places[first + size - 1][2]
        at = (first, size - 1)
        result[index].append(
            Segment(
                text=texts[index][start:end],
                start=start,
                end=end,
                num_words=size,
                score=float(scores[at]),
                marginal=float(marginals[at]),
                label=int(labels[at]),
                vector=_pool(rows, attention, first, size),
            )
        )
    return result


def _check_choices(model: Model, scoring: object, segmenter: object, num_threads: object) -> None:
    if not isinstance(scoring, SpanScoring):
        raise TypeError(f"scoring must be a SpanScoring, got {scoring!r:.80}")
    if type(num_threads) is not int:
        raise TypeError(f"num_threads must be an int, got {num_threads!r}")
    if segmenter is None:
        return
    if not isinstance(segmenter, SpanSegmenter):
        raise TypeError(f"segmenter must be a SpanSegmenter, got {segmenter!r:.80}")
    if segmenter.max_words > scoring.max_words:
        raise ValueError(
            f"the segmenter's max_words is {segmenter.max_words}, scoring.max_words allows "
            f"{scoring.max_words}"
        )
    size = model.config.hidden_size
    if segmenter.first.in_features != size:
        raise ValueError(
            f"the segmenter's hidden_size is {segmenter.first.in_features}, the model's is {size}"
        )


def _on_cpu(rows: Tensor) -> Tensor:
    return rows.to("cpu", torch.promote_types(rows.dtype, torch.float32))


def _sentence_borders(
    texts: Sequence[str], offsets: Sequence[list[tuple[int, int]]], borders: Tensor, language: str
) -> Tensor:
    """The given borders and the first word of every sentence, int32."""
    found = set(borders.tolist())
    for text, own, first in zip(texts, offsets, borders.tolist(), strict=False):
        place = 0
        for sentence in split_sentences(text, language):
            place = text.index(sentence, place)
            inside = bisect_left(own, (place,))
            found |= {first + inside} if inside < len(own) else set()
            place += len(sentence)
    return torch.tensor(sorted(found), dtype=torch.int32)


def _pool(rows: Tensor, attention: Tensor, first: int, size: int) -> Tensor:
    """Mean of `size` words [D], weighted by the attention that each gets from all of them."""
    reach = attention.shape[1] // 2
    weights = attention.new_zeros(size)
    for query in range(size):
        weights += attention[first + query, reach - query : reach - query + size]
    total = weights.sum()
    # Attention may leave a span altogether: then its words count alike.
    weights = weights / total if total > 0 else torch.full_like(weights, 1 / size)
    return weights.to(rows) @ rows[first : first + size]
