"""The table of bars: what each comparison should reach on a CPU, and what it aims at.

Parts of a row have a letter. A row that compares out-of-the-box settings says so and is never the
headline; all others have the same dtype and the same dropout on both sides. `(fp32)` counterparts
of bf16 rows are measured too and have no bar.
"""

from __future__ import annotations

from typing import NamedTuple


class Bar(NamedTuple):
    """A row, or a part of one."""

    title: str
    bar: float
    aim: float
    is_upper: bool = False
    """The figure has to stay below."""
    is_percent: bool = False


BARS = {
    "1": Bar("`full-512` step vs Hugging Face default; ours at its default precision", 1.9, 2.4),
    "2": Bar("`full-512` step vs Hugging Face bf16 autocast", 1.2, 1.45),
    "3": Bar("`full-512` step vs Hugging Face compiled bf16", 1.4, 1.8),
    "4a": Bar("`ragged-50` step vs Hugging Face padded fp32; ours at its default", 4.5, 5.2),
    "4b": Bar("`ragged-50` step vs Hugging Face padded bf16", 2.8, 3.3),
    "5": Bar("`ragged-50` step vs Hugging Face bf16 looped over single sequences", 1.35, 1.6),
    "6": Bar("MLM + SBO heads, forward + backward, vs the reference's layout", 4.5, 5.2),
    "7": Bar("`ragged-50` whole step vs the reference's layout", 5, 8),
    "8a": Bar("ragged inference vs Hugging Face padded fp32; ours at its default", 4, 4.3),
    "8b": Bar("ragged inference vs Hugging Face padded bf16", 2, 2.2),
    "8c": Bar("ragged inference vs ONNX Runtime fp32; ours at its default", 3.7, 4.1),
    "9a": Bar("ragged inference and `sentences` vs bf16 one by one", 1.1, 1.3),
    "9b": Bar("ragged inference and `sentences` vs length-sorted batches", 1.3, 2),
    "10a": Bar("ragged inference, int8, vs ONNX Runtime int8 padded", 2, 2.4),
    "10b": Bar("ragged inference, int8, vs ONNX Runtime int8 one by one", 1, 1.2),
    "11": Bar("dropout vs `F.dropout`", 2.5, 10),
    "12": Bar("attention with dropout, training, vs SDPA's math fallback", 1.5, 2.3),
    "13": Bar("peak memory of a `ragged-50` step vs Hugging Face padded", 2, 3),
    "14a": Bar("`full-512` step over the floor, bf16, dropout 0", 1.3, 1.12, is_upper=True),
    "14b": Bar("`full-512` step over the floor, bf16, dropout 0.1", 1.45, 1.2, is_upper=True),
    "15a": Bar("sampler vs Hugging Face MLM collator", 40, 80),
    "15b": Bar("sampler vs Hugging Face whole-word collator", 100, 200),
    "15c": Bar("sampler vs the reference's Python rule", 100, 200),
    "16": Bar("pre-training: share outside forward, backward, optimizer", 3, 1, True, True),
}
