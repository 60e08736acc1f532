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


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a model as one graph that other runtimes serve."""

    model: str
    """Folder or hub name."""
    to: Literal["onnx", "torch"]
    """onnx: model.onnx; torch: model.pt2, a program of torch.export."""
    output: Path
    """New folder, for the graph, config.json and tokenizer."""
    outputs: tuple[Literal["last_hidden_state", "logits", "sbo_logits"], ...] = ("logits",)
    """What the graph returns: hidden states, logits of the MLM head, logits of the SBO head."""
    quantize: Literal["int8"] | None = None
    """Compute products with 8-bit weights and activations (onnx only)."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer to save along; the model's own unless given."""
    allow_untrained_heads: bool = False
    """Export heads with random weights, too."""
