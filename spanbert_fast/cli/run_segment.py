"""The command `segment`: loads a model, cuts the texts, and shows the spans."""

from __future__ import annotations

import sys
from typing import Any


def run_segment(options: Any, as_json: bool) -> int:
    """Runs the command; its options are a `SegmentOptions`."""
    from spanbert_fast.cli import segment_view as view
    from spanbert_fast.data.tokenizer import load_tokenizer
    from spanbert_fast.model.pretrained import Model
    from spanbert_fast.model.span_scores import SpanScoring
    from spanbert_fast.tasks.options import chosen_windows
    from spanbert_fast.tasks.segment import segment

    texts = list(options.text) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("no text was given, neither as an argument nor on the standard input")
    scoring = SpanScoring(
        max_words=options.max_words,
        layers=options.layers,
        heads=options.heads,
        border_weight=options.border_weight,
        sharpness=options.sharpness,
        stop_probability=options.stop_probability,
    )
    for picture in (options.html, options.png):
        if picture is not None and not picture.parent.is_dir():
            raise ValueError(f"the folder of {picture} does not exist")
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    found = segment(
        Model.from_pretrained(options.model),
        tokenizer,
        texts,
        scoring=scoring,
        respect_sentences=options.respect_sentences,
        windows=chosen_windows(options),
    )
    view.segmented(texts, found, as_json)
    if options.html is not None:
        view.write_page(options.html, texts, found)
    if options.png is not None:
        view.write_picture(options.png, texts, found)
    return 0
