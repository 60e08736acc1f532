"""What `spanbert-fast segment` shows: a table, JSON, a page and a picture of underlined spans."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spanbert_fast.cli.render import new_console, print_json, table

if TYPE_CHECKING:
    from spanbert_fast.tasks.segment import Segment

# Neighbouring spans differ in colour; dark enough to be seen on white.
COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3")
_LINE_CHARACTERS = 88
_MOST_LINES = 1_000
"""Of a picture, which is 50 pixels high for each and 65,535 at most."""
_STYLE = """body { font: 18px/2 serif; max-width: 46em; margin: 2em auto; padding: 0 1em }
p { white-space: pre-wrap } span { border-bottom: 3px solid; padding-bottom: 2px }
"""


def segmented(texts: Sequence[str], found: Sequence[Sequence[Segment]], as_json: bool) -> None:
    """Every span with its offsets, score and marginal; JSON holds its vector as well."""
    if as_json:
        print_json([[_values(span) for span in spans] for spans in found])
        return
    console = new_console()
    for index, (text, spans) in enumerate(zip(texts, found, strict=True), 1):
        rows = [
            (span.text, span.start, span.end, f"{span.score:.3f}", f"{span.marginal:.3f}")
            for span in spans
        ]
        columns = ("span", "start", "end", "score", "marginal")
        table(console, columns, rows, title=f"text {index}: {text[:60]}", numbers=4)


def _values(span: Segment) -> dict[str, Any]:
    return {**span._asdict(), "vector": span.vector.tolist()}


def write_page(path: Path, texts: Sequence[str], found: Sequence[Sequence[Segment]]) -> None:
    """The texts as HTML, each span underlined in a colour; its marginal is the line's opacity."""
    paragraphs = []
    for text, spans in zip(texts, found, strict=True):
        parts, place = [], 0
        for index, span in enumerate(spans):
            colour = COLOURS[index % len(COLOURS)]
            alpha = round(255 * (0.3 + 0.7 * min(1.0, span.marginal)))
            title = f"score {span.score:.3f}, marginal {span.marginal:.3f}"
            parts.append(html.escape(text[place : span.start]))
            parts.append(f'<span style="border-color: {colour}{alpha:02x}" title="{title}">')
            parts.append(f"{html.escape(text[span.start : span.end])}</span>")
            place = span.end
        parts.append(html.escape(text[place:]))
        paragraphs.append(f"<p>{''.join(parts)}</p>\n")
    page = (
        '<!doctype html>\n<html><head><meta charset="utf-8"><title>Spans</title>\n'
        f"<style>\n{_STYLE}</style></head><body>\n{''.join(paragraphs)}</body></html>\n"
    )
    path.write_text(page, "utf-8")


def write_picture(path: Path, texts: Sequence[str], found: Sequence[Sequence[Segment]]) -> None:
    """The same as a PNG: fixed-width lines, broken between words, each span underlined."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [line for each in zip(texts, found, strict=True) for line in _lines(*each)]
    if len(lines) > _MOST_LINES:
        raise ValueError(
            f"a picture shows at most {_MOST_LINES:,} lines, the texts have {len(lines):,}: a page "
            "(--html) has no limit"
        )
    height = 0.42 * max(len(lines), 1) + 0.3
    figure = Figure(figsize=(10.5, height), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0.0, 0.96, 1.0))
    axes.set(xlim=(0, _LINE_CHARACTERS), ylim=(height / 0.42, 0))
    axes.axis("off")
    for row, characters in enumerate(lines):
        for column, (character, owner, marginal) in enumerate(characters):
            # "$" would begin a formula.
            axes.text(
                column + 0.5, row + 0.8, character.replace("$", r"\$"),
                family="monospace", size=11, ha="center", va="baseline",
            )  # fmt: skip
            if owner is not None:
                colour = _on_white(COLOURS[owner % len(COLOURS)], marginal)
                edges = [column + 0.1, column + 0.9]
                if column and characters[column - 1][1] == owner:
                    edges[0] = column - 0.1
                axes.plot(
                    edges, [row + 0.98] * 2, color=colour, linewidth=2.5, solid_capstyle="butt"
                )
    figure.savefig(path)


def _on_white(colour: str, marginal: float) -> tuple[float, ...]:
    """The colour that the page's transparency gives on white: pieces of a line may overlap."""
    strength = 0.3 + 0.7 * min(1.0, marginal)
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return tuple(1 - strength * (1 - part) for part in parts)


_Character = tuple[str, int | None, float]
"""A character, the number of its span if it is in one, and that span's marginal."""


def _lines(text: str, spans: Sequence[Segment]) -> list[list[_Character]]:
    """The characters of a text in lines that fit the picture; white space becomes a blank."""
    owners: list[tuple[int | None, float]] = [(None, 0.0)] * len(text)
    for index, span in enumerate(spans):
        owners[span.start : span.end] = [(index, span.marginal)] * (span.end - span.start)
    lines: list[list[_Character]] = [[]]
    place = 0
    for word in text.split(" "):
        own = [
            (" " if text[i].isspace() else text[i], *owners[i])
            for i in range(place, min(place + len(word) + 1, len(text)))
        ]
        place += len(word) + 1
        if lines[-1] and len(lines[-1]) + len(word) > _LINE_CHARACTERS:
            lines.append([])
        while len(own) > _LINE_CHARACTERS:
            lines[-1] += own[: _LINE_CHARACTERS - len(lines[-1])]
            own = own[_LINE_CHARACTERS:]
            lines.append([])
        lines[-1] += own
    return lines
