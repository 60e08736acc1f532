"""Sentences: found in running text, and how a file is recognised that has one on every line."""

from __future__ import annotations

from typing import Final, Literal

import sentencex

SAMPLE_BYTES: Final = 65_536
_SENTENCE_ENDS: Final = tuple(".!?:;\u2026\u3002\uff01\uff1f\"')]\u201d\u2019\u00bb")
_SENTENCE_SHARE: Final = 0.75
_LINES_PER_DOCUMENT: Final = 2.0


def split_sentences(paragraph: str, language: str) -> list[str]:
    """The sentences of one paragraph, without surrounding white space.

    Args:
        paragraph: text whose white space is single spaces.
        language: code such as `en`.
    """
    return [s for sentence in sentencex.segment(language, paragraph) if (s := sentence.strip())]


def recognise_format(sample: str, language: str) -> Literal["lines", "running"]:
    """Whether a text has one sentence per line, judged by its beginning.

    It has, if at least three quarters of its non-blank lines are exactly one sentence with a mark
    at its end, and runs of such lines between blank lines are at least two lines long on average.
    The second condition tells documents of sentences from paragraphs of one sentence.

    Args:
        sample: the first 65,536 bytes of the text, decoded; the last line may be incomplete.
        language: code such as `en`.
    """
    lines = sample.split("\n")
    if len(lines) > 1:
        lines.pop()  # Perhaps cut off by the end of the sample.
    collapsed = [" ".join(line.split()) for line in lines]
    filled = [line for line in collapsed if line]
    if not filled:
        return "running"
    runs = sum(
        bool(line) and (index == 0 or not collapsed[index - 1])
        for index, line in enumerate(collapsed)
    )
    single = sum(
        line.endswith(_SENTENCE_ENDS) and len(split_sentences(line, language)) == 1
        for line in filled
    )
    is_lines = single >= _SENTENCE_SHARE * len(filled) and len(filled) >= _LINES_PER_DOCUMENT * runs
    return "lines" if is_lines else "running"
