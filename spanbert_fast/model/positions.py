"""The position table: what a model says to a text beyond it, and how it is made longer.

Shapes: P positions of a table, Q of a longer one, D hidden size.
"""

from __future__ import annotations

LONGER_TEXTS = (
    "Three ways lead to longer texts: overlapping windows (windows=True of fill_span, segment and "
    "span_embeddings, --windows on the command line); a longer position table "
    "(Model.from_pretrained(..., max_position_embeddings=4096, position_extension='interpolate')); "
    "and with such a table a local attention window, for time and memory linear in the length "
    "(attention_window=512 beside it, or in the configuration)"
)
"""The end of a message that refuses a text for its length."""
