"""Texts for a model: checked, encoded whole, cut into windows on request, and packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from spanbert_fast.batch import PackedBatch
from spanbert_fast.model.positions import LONGER_TEXTS
from spanbert_fast.model.pretrained import Model
from spanbert_fast.tasks.windows import Window, Windows, plan_windows, window_of

WINDOW_TOKENS = 8_192
"""Of one pass through the encoder, where a text is read in windows and nothing else is said."""


class Extent(NamedTuple):
    """Tokens of a sequence that are to be read in one window."""

    sequence: int
    first: int
    """Special tokens counted, as in all sequences; but none is part of an extent."""
    past: int


class Excerpt(NamedTuple):
    """What is read at once of a sequence: all of it, or a window between its special tokens."""

    sequence: int
    first: int
    """First piece, in the sequence."""
    past: int
    """The piece past its last one."""
    shift: int
    """Place of a piece in the sequence less its place here."""
    ids: list[int]
    extents: list[int]
    """Indices of the extents that are read here."""


def check_texts(model: object, tokenizer: Any, text: object) -> list[str]:
    """The texts as a list.

    Raises:
        TypeError: an argument has the wrong type, or the tokenizer knows no character offsets.
        ValueError: there is no text, or one holds a lone surrogate.
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"model must be a spanbert_fast Model (Model.from_pretrained reads Hugging Face "
            f"folders too), not {type(model).__name__}"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"tokenizer must be a fast tokenizer, which knows character offsets, "
            f"not {type(tokenizer).__name__}"
        )
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or not all(isinstance(item, str) for item in texts):
        raise TypeError(f"text must be a str or a sequence of str, not {text!r:.80}")
    if not texts:
        raise ValueError("text holds no text")
    for index, item in enumerate(texts):
        # A lone half of a UTF-16 pair is no character; tokenizers would speak of a wrong type.
        if not item.isascii() and (place := _lone_surrogate(item)) is not None:
            raise ValueError(
                f"text {index} has the lone surrogate {item[place]!r} at character {place}, which "
                "stands for no character"
            )
    return list(texts)


def _lone_surrogate(text: str) -> int | None:
    """Place of the first lone surrogate, None without one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def encode_texts(model: Model, tokenizer: Any, texts: Sequence[str]) -> Any:
    """Ids, `offset_mapping` and `special_tokens_mask` of each text, nothing cut.

    Raises:
        ValueError: the tokenizer is another model's.
    """
    encoded = tokenizer(
        list(texts),
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    entries = model.config.vocab_size
    for index, ids in enumerate(encoded["input_ids"]):
        if ids and max(ids) >= entries:
            raise ValueError(
                f"text {index} has token id {max(ids)}, the model knows ids below {entries}: the "
                "tokenizer is not this model's"
            )
    return encoded


def special_edges(encoded: Any) -> tuple[int, int]:
    """How many special tokens the tokenizer puts before a text and after it."""
    for marks in encoded["special_tokens_mask"]:
        if 0 in marks:
            return marks.index(0), marks[::-1].index(0)
    return 0, 0


def cut(
    model: Model,
    sequences: Sequence[list[int]],
    edges: tuple[int, int],
    extents: Sequence[Extent],
    windows: Windows | None,
    text_of: Mapping[int, int] | None = None,
) -> list[Excerpt]:
    """What has to be read so that each extent stands whole in one excerpt.

    A sequence that fits is read whole, whatever is asked of it; of a longer one, the windows that
    own an extent.

    Args:
        model: Its positions are the limit.
        sequences: Ids, special tokens included.
        edges: Special tokens before and after a text.
        extents: What is asked for.
        windows: How a longer sequence is cut; None: it is refused.
        text_of: Number of the text of each sequence, for the messages; its own unless given.

    Raises:
        ValueError: A sequence is longer than the model allows and there are no windows, or an
            extent is longer than a window.
    """
    limit: int = model.config.max_position_embeddings
    names = text_of or dict(enumerate(range(len(sequences))))
    wanted: list[list[int]] = [[] for _ in sequences]
    for index, extent in enumerate(extents):
        wanted[extent.sequence].append(index)
    size, stride = (limit - sum(edges), 0) if windows is None else windows.sizes(limit, sum(edges))
    excerpts: list[Excerpt] = []
    for index, ids in enumerate(sequences):
        if len(ids) <= size + sum(edges):
            past = len(ids) - edges[1]
            excerpts.append(Excerpt(index, edges[0], past, 0, ids, wanted[index]))
        elif windows is None:
            raise ValueError(
                f"text {names[index]} has {len(ids)} tokens with its special tokens, the model "
                f"allows {limit}. {LONGER_TEXTS}"
            )
        else:
            plan = plan_windows(len(ids) - sum(edges), size, stride)
            own = [(number, extents[number]) for number in wanted[index]]
            excerpts += _windows(index, ids, edges, plan, own, names[index])
    return excerpts


def _windows(
    index: int,
    ids: list[int],
    edges: tuple[int, int],
    plan: Sequence[Window],
    extents: Sequence[tuple[int, Extent]],
    text: int,
) -> Iterator[Excerpt]:
    """The windows of a long sequence that own one of its (number, extent), from left to right."""
    before, after = edges
    size = plan[0].end - plan[0].start
    found: dict[int, list[int]] = {}
    for number, (_, first, past) in extents:
        if past - first > size:
            raise ValueError(
                f"tokens {first} to {past} of text {text} must be read at once and are "
                f"{past - first}; a window holds {size} beside {before + after} special tokens"
            )
        found.setdefault(window_of(plan, first - before, past - before)[0], []).append(number)
    for start in sorted(found):
        low, high = before + start, before + start + size
        whole = [*ids[:before], *ids[low:high], *ids[len(ids) - after :]]
        yield Excerpt(index, low, high, start, whole, found[start])


def passes(
    excerpts: Sequence[Excerpt], most: int | None, windows: Windows | None
) -> Iterator[Sequence[Excerpt]]:
    """Neighbouring excerpts for one pass through the encoder: at most so many tokens.

    Args:
        excerpts: One with more tokens has a pass of its own.
        most: None: all in one pass, or with windows `WINDOW_TOKENS`.
        windows: As they were cut.

    Raises:
        TypeError: The number is no int.
        ValueError: The number is less than 1.
    """
    if most is not None and type(most) is not int:
        raise TypeError(f"batch_tokens must be an int, got {most!r}")
    if most is not None and most < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {most}")
    if most is None and windows is not None:
        most = WINDOW_TOKENS
    first, total = 0, 0
    for index, excerpt in enumerate(excerpts):
        if most is not None and index > first and total + len(excerpt.ids) > most:
            yield excerpts[first:index]
            first, total = index, 0
        total += len(excerpt.ids)
    if excerpts:
        yield excerpts[first:]


def pack(sequences: Sequence[Sequence[int]]) -> PackedBatch:
    """Sequences of ids as one batch without targets, on the CPU."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    input_ids = torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.cat([torch.arange(len(ids)) for ids in sequences]),
        token_type_ids=torch.zeros_like(input_ids),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        max_seqlen=int(lengths.max()),
        sequence_ids=torch.arange(len(sequences)),
        mlm_positions=none,
        mlm_labels=none,
        sbo_left=none,
        sbo_right=none,
        sbo_cu=torch.zeros(1, dtype=torch.int32),
        sbo_targets=none,
    )
