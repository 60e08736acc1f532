"""What a user may choose when converting a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Turn a foreign checkpoint into one of our folders."""

    source: Path
    """The original model.pt (fairseq), or a folder with pytorch_model.bin (hf)."""
    output: Path
    """New folder."""
    source_format: Literal["fairseq", "hf"]
    """What wrote the checkpoint."""
    config: Path | None = None
    """BERT config.json with the sizes; needed for fairseq, the folder's own for hf unless given."""
    vocab: str | None = None
    """vocab.txt, folder or hub name of the tokenizer to save along; for hf the folder's own."""

    def __post_init__(self) -> None:
        if self.source_format == "fairseq" and self.config is None:
            raise ValueError("--config is needed: the original checkpoint does not tell its sizes")
