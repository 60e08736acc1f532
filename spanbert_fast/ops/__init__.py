"""Plain mathematical functions; the body of each is its PyTorch reference."""

from spanbert_fast.ops.activation import bias_gelu as bias_gelu
from spanbert_fast.ops.activation import bias_gelu_layer_norm as bias_gelu_layer_norm
from spanbert_fast.ops.attention import AttentionResult as AttentionResult
from spanbert_fast.ops.attention import varlen_attention as varlen_attention
from spanbert_fast.ops.attention import varlen_attention_with_lse as varlen_attention_with_lse
from spanbert_fast.ops.banded_attention import banded_attention as banded_attention
from spanbert_fast.ops.cross_entropy import CrossEntropy as CrossEntropy
from spanbert_fast.ops.cross_entropy import linear_cross_entropy as linear_cross_entropy
from spanbert_fast.ops.dispatch import BackendChoice as BackendChoice
from spanbert_fast.ops.dispatch import backend_of as backend_of
from spanbert_fast.ops.dispatch import get_backend as get_backend
from spanbert_fast.ops.dispatch import op_names as op_names
from spanbert_fast.ops.dispatch import set_backend as set_backend
from spanbert_fast.ops.dispatch import use_backend as use_backend
from spanbert_fast.ops.embedding import bert_embedding as bert_embedding
from spanbert_fast.ops.norm import dropout_add_layer_norm as dropout_add_layer_norm
from spanbert_fast.ops.random import attention_keep_mask as attention_keep_mask
from spanbert_fast.ops.random import dropout_threshold as dropout_threshold
from spanbert_fast.ops.random import hidden_keep_mask as hidden_keep_mask
from spanbert_fast.ops.span_boundary import span_boundary_hidden as span_boundary_hidden
