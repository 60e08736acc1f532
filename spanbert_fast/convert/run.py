"""One conversion, in either direction, as its options ask for it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from spanbert_fast.convert.departure import Written
from spanbert_fast.convert.fairseq import convert_fairseq, write_fairseq
from spanbert_fast.convert.folder import Conversion
from spanbert_fast.convert.huggingface import convert_huggingface, write_huggingface
from spanbert_fast.convert.options import ConvertOptions
from spanbert_fast.convert.tensorflow import convert_tensorflow, write_tensorflow


def convert(
    options: ConvertOptions, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> Conversion | Written:
    """Write what the options ask for; raises what the converter of the format raises.

    Args:
        options: source, output and direction.
        tokenizer: saved along, if a foreign checkpoint comes in.
    """
    paths = (options.source, options.output)
    if options.source_format is not None:
        settings: dict[str, Any] = {"config": options.config, "tokenizer": tokenizer}
        settings["timeout_seconds"] = options.timeout_seconds
        if options.source_format == "fairseq":
            return convert_fairseq(*paths, **settings)
        if options.source_format == "hf":
            return convert_huggingface(*paths, **settings)
        return convert_tensorflow(*paths, **settings)
    if options.target_format == "tensorflow":
        return write_tensorflow(
            *paths, encoder_only=options.encoder_only, timeout_seconds=options.timeout_seconds
        )
    write = write_fairseq if options.target_format == "fairseq" else write_huggingface
    return write(*paths, encoder_only=options.encoder_only, dtype=options.dtype)
