"""The masking scheme `segments` among the options of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Scheme = Literal["spanbert", "whole_word", "token", "segments"]
SEGMENTS = "segments"


def masking_table(values: Mapping[str, Any]) -> dict[str, Any]:
    """The table `masking` of some options, with their `scheme` in it.

    Raises:
        ValueError: The table has another scheme.
    """
    table = dict(values.get("masking") or {})
    scheme = values.get("scheme")
    if scheme is not None and table.setdefault("scheme", scheme) != scheme:
        raise ValueError(
            f"scheme is {scheme!r} and masking scheme is {table['scheme']!r}; give one of them"
        )
    return table


def check_scheme(
    masking: Mapping[str, Any], segment_every: int | None, *, freeze_encoder: bool
) -> None:
    """Refuse what does not go with the scheme.

    Raises:
        ValueError: The scheme is `segments` and something that it needs is missing or wrong, or it
            is another one and has a setting of `segments`.
    """
    scheme = masking.get("scheme", "spanbert")
    if scheme != SEGMENTS:
        if segment_every is not None:
            raise ValueError(
                f"segment_every is {segment_every}, but the scheme is {scheme!r}: only "
                f"{SEGMENTS!r} segments"
            )
        return
    if freeze_encoder:
        raise ValueError(
            "the scheme is 'segments', must be another one where the encoder is frozen: what it "
            "predicts would never change"
        )
    if segment_every is None:
        raise ValueError(
            "segment_every must be given with the scheme 'segments': the steps between two "
            "segmentations"
        )
    if isinstance(segment_every, bool) or not isinstance(segment_every, int) or segment_every < 1:
        raise ValueError(f"segment_every must be an integer of at least 1, got {segment_every!r}")
    if masking.get("min_span_words", 1) != 1:
        raise ValueError(
            f"min_span_words is {masking['min_span_words']}, must be 1 with the scheme 'segments': "
            "spans of one word are among the predicted ones"
        )
