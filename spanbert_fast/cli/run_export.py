"""`spanbert-fast export`: loads the model, writes its graph, says what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def run_export(options: Any, as_json: bool) -> int:
    """Runs the command; its exit status."""
    from transformers.utils import logging

    from spanbert_fast.cli import render
    from spanbert_fast.convert.export import export_model
    from spanbert_fast.data.tokenizer import load_tokenizer
    from spanbert_fast.model.pretrained import Model

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = Path(options.model)
    if not source.is_dir() and (source.is_absolute() or options.model.startswith(".")):
        raise FileNotFoundError(f"no such folder: {source}")
    vocabularies = (source / name for name in ("tokenizer.json", "vocab.txt"))
    has_tokenizer = not source.is_dir() or any(path.is_file() for path in vocabularies)
    tokenizer = options.tokenizer or (options.model if has_tokenizer else None)
    done = export_model(
        Model.from_pretrained(options.model, dtype="float32"),
        options.output,
        to=options.to,
        outputs=options.outputs,
        quantize=options.quantize,
        tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
        allow_untrained_heads=options.allow_untrained_heads,
    )
    if as_json:
        render.print_json(done)
        return 0
    facts = [
        ("graph", done.output / done.file),
        ("inputs", ", ".join(done.inputs)),
        ("outputs", ", ".join(done.outputs)),
        ("weights", done.quantization or "float32"),
        ("size", f"{done.num_bytes / 1e6:,.1f} MB"),
        ("tokenizer", tokenizer or "none"),
    ]
    if done.opset is not None:
        facts.insert(1, ("ONNX opset", done.opset))
    render.facts(render.new_console(), facts, title=options.model)
    return 0
