"""The first layer of the span boundary head (Joshi et al. 2020, section 3.2), factored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from spanbert_fast.ops.dispatch import accelerated
from spanbert_fast.ops.norm import wide_layer_norm
from spanbert_fast.ops.precision import wide_dtype
from spanbert_fast.ops.random import token_places


@accelerated
def span_boundary_hidden(
    hidden: Tensor,
    left: Tensor,
    right: Tensor,
    cu: Tensor,
    position_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    *,
    num_rows: int,
) -> Tensor:
    """LayerNorm(GELU(W [h_left; h_right; p_offset] + b)) for each target: [N, D].

    The product is split: its boundary part is computed once per span, its position part once per
    offset, and a row is their sum. The result has the dtype of the products.

    Args:
        hidden: [T, D], last hidden states.
        left: int64 [R], row of the token before each span.
        right: int64 [R], row of the token after each span.
        cu: int32 [R + 1]: targets of span r are rows `cu[r]:cu[r + 1]`; the offset of a row is
            `row - cu[r]`.
        position_table: [K, P], K slots of a span.
        weight: [D, 2D + P].
        bias: [D].
        ln_weight: [D].
        ln_bias: [D].
        eps: Added to the variance.
        num_rows: N, equal to the last boundary in `cu`; given so that no one has to ask the GPU.
    """
    size = 2 * hidden.shape[1]
    num_spans = left.shape[0]
    # index_select, not indexing: the latter's backward on the CPU is not deterministic.
    both = hidden.index_select(0, torch.stack([left, right], dim=1).flatten())
    by_span = functional.linear(both.view(num_spans, size), weight[:, :size])
    by_offset = functional.linear(position_table, weight[:, size:])
    spans, offsets = token_places(cu, num_rows)
    wide = wide_dtype(by_span.dtype)
    slots = by_offset.to(wide) + bias.to(wide)
    total = by_span.to(wide).index_select(0, spans) + slots.index_select(0, offsets)
    return wide_layer_norm(functional.gelu(total), ln_weight, ln_bias, eps).to(by_span.dtype)
