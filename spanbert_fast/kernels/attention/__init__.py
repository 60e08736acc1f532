"""Triton twin of `ops.attention`: variable-length attention, forward and deterministic backward.

Bytes per token and head in a 16-bit dtype, K the head size: forward 8 K (query, key, value in,
output out), backward 20 K (query, key, value, output and the output's gradient in for one kernel,
all but the output for the other; three gradients out), besides 4 to 16 for the statistics. Keys
and values that several blocks of one head read come from the cache.
"""

from spanbert_fast.kernels.attention.operators import AttentionResult as AttentionResult
from spanbert_fast.kernels.attention.operators import varlen_attention as varlen_attention
from spanbert_fast.kernels.attention.operators import (
    varlen_attention_with_lse as varlen_attention_with_lse,
)
