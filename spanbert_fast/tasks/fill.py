"""Fill runs of [MASK] with their most probable spans, by the MLM head, the SBO head, or both.

Shapes: M masked tokens that the MLM head scores, N that the span boundary head (SBO) scores,
V vocabulary, W entries that may fill, n length of a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch
from spanbert_fast.data.tokenizer import check_case
from spanbert_fast.model.pretrained import Model
from spanbert_fast.tasks.inference import inference
from spanbert_fast.tasks.mask_runs import (
    HeadChoice,
    HeadName,
    MaskRun,
    choose_heads,
    find_runs,
    try_lengths,
)
from spanbert_fast.tasks.ranking import k_best
from spanbert_fast.tasks.texts import (
    Extent,
    check_texts,
    cut,
    encode_texts,
    pack,
    passes,
    special_edges,
)
from spanbert_fast.tasks.windows import Windows, windows_of_choice


class FilledSpan(NamedTuple):
    """One candidate for one run of [MASK]."""

    text: str
    """The candidate; a leading `##` is kept, it says that the word before goes on."""
    token_ids: tuple[int, ...]
    log_probability: float
    """Sum over the tokens of the logarithm of `token_probabilities`."""
    token_probabilities: tuple[float, ...]
    start: int
    """Character offset, in the given text, of the first [MASK] of the run."""
    end: int
    """Character offset just past the last [MASK] of the run."""
    head: HeadName
    """The heads that gave the probabilities."""
    text_index: int = 0
    """Which of the given texts the offsets belong to."""


def fill_span(
    model: Model,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    top_k: int = 5,
    head: HeadChoice = "auto",
    length: tuple[int, int] | None = None,
    allow_untrained_heads: bool = False,
    windows: Windows | bool = False,
    batch_tokens: int | None = None,
) -> list[list[FilledSpan]]:
    """The `top_k` most probable fillings of every run of [MASK], best first.

    A run is a maximal sequence of mask tokens. Each position of a run has one distribution over the
    vocabulary, and the score of a candidate is the product over the positions. The `top_k` best of
    all sequences of ordinary vocabulary entries (special tokens never fill) are found exactly.

    `head="mlm"` and `"sbo"` use one head. `"auto"` uses every trained head that applies to the run;
    where both do, their log-probabilities are added at each position and normalised again over the
    vocabulary, so that a score stays a probability and lengths stay comparable. The span boundary
    head (SBO) applies where the run has an ordinary token on either side and at most
    `config.max_span_targets` tokens.

    Args:
        model: its training mode is left as it was; dropout is off meanwhile.
        tokenizer: a fast Hugging Face tokenizer with a mask token, as `load_tokenizer` gives it.
        text: one text or several.
        top_k: candidates per run; fewer come back only where fewer exist.
        head: "auto", "mlm" or "sbo".
        length: shortest and longest filling, in tokens. Each text must then hold a single [MASK];
            every length is tried, all with the same heads, and candidates are ranked by the mean of
            their tokens' log-probabilities.
        allow_untrained_heads: use heads listed in `config.untrained_heads`, too; they are random.
        windows: True, or `Windows(...)`: a longer text than the model allows is read in windows
            that overlap, each run with its neighbours in the one where it is farthest from an edge.
        batch_tokens: of one pass through the encoder, at most, unless one text or window has more;
            without it all texts go through one pass, windows through passes of 8,192.

    Returns:
        One list per run, in the order of the texts and, in a text, from left to right.
        `FilledSpan.text_index`, `start` and `end` say which characters a candidate replaces.

    Raises:
        TypeError: an argument has the wrong type, or the tokenizer knows no character offsets.
        ValueError: a text without [MASK] or longer than the model allows (without windows), a run
            longer than a window, an argument out of range, an untrained head, or `head="sbo"` where
            that head does not apply.
    """
    texts = _check_arguments(model, tokenizer, text, top_k, head, length)
    cutting = windows_of_choice(windows)
    encoded = encode_texts(model, tokenizer, texts)
    sequences, runs = find_runs(tokenizer, texts, encoded)
    if length is not None:
        sequences, runs = try_lengths(sequences, runs, length, tokenizer.mask_token_id)
    edges = special_edges(encoded)
    extents = [_extent(run, len(sequences[run.sequence]), edges) for run in runs]
    text_of = {run.sequence: run.text_index for run in runs}
    excerpts = cut(model, sequences, edges, extents, cutting, text_of)
    special_ids = set(tokenizer.all_special_ids)
    heads = choose_heads(
        model.config,
        sequences,
        runs,
        head,
        special_ids=special_ids,
        allow_untrained=allow_untrained_heads,
    )
    known = range(min(len(tokenizer), model.config.vocab_size))
    fillers = torch.tensor([entry for entry in known if entry not in special_ids])
    found: list[list[FilledSpan]] = [[] for _ in heads]
    for part in passes(excerpts, batch_tokens, cutting):
        own = [
            replace(runs[index], sequence=place, first=runs[index].first - excerpt.shift)
            for place, excerpt in enumerate(part)
            for index in excerpt.extents
        ]
        scored = _score(model, [excerpt.ids for excerpt in part], own, heads)
        for run, scores in zip(own, scored, strict=True):
            name = heads[run.group]
            found[run.group] += _candidates(tokenizer, run, name, scores, fillers, top_k)
    return [sorted(spans, key=_mean_log_probability, reverse=True)[:top_k] for spans in found]


def _check_arguments(
    model: object, tokenizer: Any, text: object, top_k: object, head: object, length: object
) -> list[str]:
    """The texts as a list, once every argument has been found valid."""
    texts = check_texts(model, tokenizer, text)
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token")
    check_case(tokenizer)
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k must be an int, not {top_k!r}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if head not in get_args(HeadChoice):
        raise ValueError(f"head must be one of {', '.join(get_args(HeadChoice))}, not {head!r}")
    _check_length(length)
    return texts


def _check_length(length: object) -> None:
    if length is None:
        return
    bounds = list(length) if isinstance(length, tuple | list) else []
    if len(bounds) != 2 or not all(type(bound) is int for bound in bounds):
        raise TypeError(f"length must be (shortest, longest), two ints, not {length!r}")
    if not 1 <= bounds[0] <= bounds[1]:
        raise ValueError(f"length must satisfy 1 <= shortest <= longest, not {length!r}")


def _extent(run: MaskRun, num_tokens: int, edges: tuple[int, int]) -> Extent:
    """The run and, where the text has them, its neighbours, which the SBO head looks at."""
    first = max(run.first - 1, edges[0])
    past = min(run.first + run.length + 1, num_tokens - edges[1])
    return Extent(run.sequence, first, past)


def _pack(
    model: Model,
    sequences: Sequence[list[int]],
    runs: Sequence[MaskRun],
    heads: Sequence[HeadName],
) -> PackedBatch:
    """All sequences end to end, with the positions that each head is asked about."""
    batch = pack(sequences)
    starts = batch.cu_seqlens.tolist()
    firsts = [starts[run.sequence] + run.first for run in runs]
    by_mlm = [
        position
        for run, first in zip(runs, firsts, strict=True)
        if "mlm" in heads[run.group]
        for position in range(first, first + run.length)
    ]
    by_sbo = [(f, r.length) for f, r in zip(firsts, runs, strict=True) if "sbo" in heads[r.group]]
    sizes = torch.tensor([size for _, size in by_sbo], dtype=torch.int64)
    targeted = replace(
        batch,
        mlm_positions=torch.tensor(by_mlm, dtype=torch.int64),
        mlm_labels=torch.zeros(len(by_mlm), dtype=torch.int64),
        sbo_left=torch.tensor([first - 1 for first, _ in by_sbo], dtype=torch.int64),
        sbo_right=torch.tensor([first + size for first, size in by_sbo], dtype=torch.int64),
        sbo_cu=torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int(),
        sbo_targets=torch.zeros(int(sizes.sum()), dtype=torch.int64),
    )
    return targeted.to(model.device)


def _score(
    model: Model,
    sequences: Sequence[list[int]],
    runs: Sequence[MaskRun],
    heads: Sequence[HeadName],
) -> list[Tensor]:
    """Log-probabilities [n, V] of each run; only masked rows meet a decoder."""
    batch = _pack(model, sequences, runs, heads)
    scores: dict[str, Iterator[Tensor]] = {}
    with inference(model):
        hidden = model.bert.encode_packed(batch, for_targets=True).last_hidden_state
        for name in ("mlm", "sbo"):
            sizes = [run.length for run in runs if name in heads[run.group]]
            if not sizes:
                continue
            if name == "mlm":
                logits = model.cls.mlm_logits(hidden.index_select(0, batch.mlm_positions))
            else:
                logits = model.cls.sbo_logits(hidden, batch)
            scores[name] = iter(torch.split(_log_softmax(logits), sizes))
    result = []
    for run in runs:
        parts = [next(rows) for name, rows in scores.items() if name in heads[run.group]]
        result.append(parts[0] if len(parts) == 1 else _log_softmax(parts[0] + parts[1]))
    return result


def _log_softmax(logits: Tensor) -> Tensor:
    """Over the last dimension, in fp32 or better, on the CPU."""
    wide = logits.to("cpu", torch.promote_types(logits.dtype, torch.float32))
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("the model's predictions are not finite: its weights are damaged")
    return wide.log_softmax(-1)


def _candidates(
    tokenizer: Any, run: MaskRun, head: HeadName, scores: Tensor, fillers: Tensor, top_k: int
) -> list[FilledSpan]:
    """The `top_k` best sequences for a run with log-probabilities [n, V]; fillers int64 [W]."""
    # A sequence among the k best takes each token from the k best of its position.
    best = scores[:, fillers].double().topk(min(top_k, len(fillers)), dim=1)
    values, entries = best.values.tolist(), fillers[best.indices].tolist()
    spans = []
    for log_probability, ranks in k_best(values, top_k):
        token_ids = tuple(row[rank] for row, rank in zip(entries, ranks, strict=True))
        logs = [row[rank] for row, rank in zip(values, ranks, strict=True)]
        spans.append(
            FilledSpan(
                text=_surface(tokenizer, token_ids),
                token_ids=token_ids,
                log_probability=log_probability,
                token_probabilities=tuple(math.exp(log) for log in logs),
                start=run.start,
                end=run.end,
                head=head,
                text_index=run.text_index,
            )
        )
    return spans


def _surface(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The tokens as text, joined where the tokenizer joins them and otherwise unchanged."""
    tokens = tokenizer.convert_ids_to_tokens(list(token_ids))
    decoder = tokenizer.backend_tokenizer.decoder
    prefix = getattr(decoder, "prefix", None)
    if prefix is None:
        return str(tokenizer.convert_tokens_to_string(tokens))
    # WordPiece's own decoder also rewrites spaces around punctuation, which the text may have.
    words = tokens[:1] + [
        token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
        for token in tokens[1:]
    ]
    return "".join(words)


def _mean_log_probability(span: FilledSpan) -> float:
    return span.log_probability / len(span.token_ids)
