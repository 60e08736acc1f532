"""The input embedding of BERT."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from spanbert_fast.ops.dispatch import accelerated
from spanbert_fast.ops.dropout import hidden_dropout
from spanbert_fast.ops.norm import wide_layer_norm
from spanbert_fast.ops.precision import product_dtype, wide_dtype


@accelerated
def bert_embedding(
    ids: Tensor,
    positions: Tensor,
    types: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    type_table: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """dropout(LayerNorm(word + position + type)): [T, D], dtype of the tables or autocast's.

    Args:
        ids: int64 [T].
        positions: int64 [T].
        types: int64 [T].
        word_table: [V, D].
        position_table: [positions, D].
        type_table: [types, D].
        ln_weight: [D].
        ln_bias: [D].
        eps: Added to the variance.
        dropout_p: Probability of dropping an element; 0 needs none of the following.
        seed: int64 scalar.
        sequence_ids: int64 [B].
        cu_seqlens: int32 [B + 1].
        site: Which dropout of the model this is.

    Raises:
        ValueError: `dropout_p` is out of range, or what it needs is missing.
    """
    wide = wide_dtype(word_table.dtype)
    # F.embedding, not indexing: the latter's backward on the CPU is not deterministic.
    total = functional.embedding(ids, word_table).to(wide)
    total = total + functional.embedding(positions, position_table).to(wide)
    total = total + functional.embedding(types, type_table).to(wide)
    rows = wide_layer_norm(total, ln_weight, ln_bias, eps)
    rows = hidden_dropout(rows, dropout_p, seed, sequence_ids, cu_seqlens, site)
    return rows.to(product_dtype(word_table))
