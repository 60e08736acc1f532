"""What a user may choose when converting a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Format = Literal["fairseq", "hf", "tensorflow"]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Turn a foreign checkpoint into one of our folders (--from), or one of ours into it (--to)."""

    source: Path
    """--from fairseq: the original model.pt; hf: a folder; tensorflow: a folder or a checkpoint.
    --to: one of our folders."""
    output: Path
    """New folder."""
    source_format: Format | None = None
    """What wrote the checkpoint."""
    target_format: Format | None = None
    """What is to read it: the original SpanBERT, Hugging Face's BERT, or Google's."""
    config: Path | None = None
    """BERT config.json with the sizes; needed for fairseq, else the one beside the weights."""
    vocab: str | None = None
    """vocab.txt, folder or hub name of the tokenizer to save along; by default the one beside the
    weights."""
    encoder_only: bool = False
    """With --to: leave the heads out."""
    dtype: Literal["float32", "float16"] | None = None
    """With --to fairseq or hf: precision of the weights. By default as stored for hf; for fairseq
    float16, as released, if that changes no value."""
    timeout_seconds: float = 600.0
    """How long the separate process that reads or writes foreign files may take."""

    def __post_init__(self) -> None:
        if (self.source_format is None) == (self.target_format is None):
            raise ValueError("give one of --from and --to: one side is always one of our folders")
        if self.target_format is not None:
            if self.config is not None or self.vocab is not None:
                raise ValueError("--config and --vocab go with --from; --to takes the folder's own")
            if self.target_format == "tensorflow" and self.dtype == "float16":
                raise ValueError(
                    "--dtype float16 does not go with --to tensorflow: its readers "
                    "declare float32 variables"
                )
        elif self.encoder_only or self.dtype is not None:
            raise ValueError(
                "--encoder-only and --dtype go with --to; --from writes everything "
                "that it finds, in float32"
            )
        if self.source_format == "fairseq" and self.config is None:
            raise ValueError("--config is needed: the original checkpoint does not tell its sizes")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be positive, got {self.timeout_seconds}")


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
