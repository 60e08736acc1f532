"""The BERT encoder on packed rows, under the tensor names that every BERT checkpoint uses.

The modules own parameters; the arithmetic is in `ops`. Shapes: T packed tokens, B sequences, D
hidden size, H heads, K head size, F feed-forward size, S length of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from spanbert_fast.config import Config
from spanbert_fast.model.eager_attention import mix_values
from spanbert_fast.model.inputs import PackedInputs
from spanbert_fast.model.layout import Layout
from spanbert_fast.ops.activation import bias_gelu
from spanbert_fast.ops.embedding import bert_embedding
from spanbert_fast.ops.norm import dropout_add_layer_norm


class EncoderOutput(NamedTuple):
    """What the encoder computed for the packed rows."""

    last_hidden_state: Tensor
    """[T, D]."""
    hidden_states: tuple[Tensor, ...] | None
    """The embedding and the output of each layer, [T, D] or [B, S, D] each, if asked for."""
    attentions: tuple[Tensor, ...] | None
    """Attention probabilities of each layer, [B, H, S, S], zero in the padding, if asked for."""


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind` does and nothing else.

    Adapters replace a module, parametrizations its class, quantizers the kind of tensor that its
    weight is, and hooks or a patched `forward` act when it is called. In all these cases it has to
    be called; otherwise its weight may go to a fused operation directly.
    """
    wraps = any(hasattr(tensor, "__tensor_flatten__") for tensor in module._parameters.values())
    is_called = has_hooks(module) or wraps or "forward" in vars(module)
    return type(module) is kind and not is_called


def has_hooks(module: nn.Module) -> bool:
    """Whether something is told when `module` is called."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks)


class Embeddings(nn.Module):
    """Sum of word, position and token type vectors, normalised."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.vocab_size, size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout_p = float(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        token_type_ids: Tensor,
        layout: Layout,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The hidden states [T, D] that enter the first layer.

        Args:
            input_ids: int64 [T]; None with `inputs_embeds`.
            position_ids: int64 [T].
            token_type_ids: int64 [T].
            layout: Boundaries and dropout.
            inputs_embeds: [T, D] instead of word vectors.
        """
        words: Tensor | None = inputs_embeds
        if words is None and not is_plain(self.word_embeddings, nn.Embedding):
            words = self.word_embeddings(input_ids)
        if words is None:
            assert input_ids is not None
            ids, table = input_ids, self.word_embeddings.weight
        else:
            # Given vectors are a table in which token t stands in row t.
            ids, table = torch.arange(words.shape[0], device=words.device), words
        return bert_embedding(
            ids,
            position_ids,
            token_type_ids,
            table,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
            cu_seqlens=layout.cu_seqlens,
            **layout.dropout(self.dropout_p, 0),
        )


class SelfAttention(nn.Module):
    """Multi-head attention inside each sequence."""

    def __init__(self, config: Config, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout_p = float(config.attention_probs_dropout_prob)
        self.site = 1 + 3 * layer_index

    def _project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        owners = (self.query, self.key, self.value)
        # Joining the weights costs a copy of them, which only many rows pay back. An exported graph
        # serves any number of rows, so it must not depend on it.
        pays = not torch.compiler.is_exporting() and hidden.shape[0] >= hidden.shape[1]
        if pays and all(is_plain(owner, nn.Linear) for owner in owners):
            return joined_products(owners, hidden)
        return tuple(owner(hidden) for owner in owners)

    def forward(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """Mixed values [T, D] and, if wanted, probabilities [B, H, S, S]."""
        shape = (-1, self.num_heads, self.head_size)
        query, key, value = (rows.reshape(shape) for rows in self._project(hidden))
        mixed, probabilities = mix_values(
            query,
            key,
            value,
            layout.cu_seqlens,
            layout.max_seqlen,
            scale=self.head_size**-0.5,
            window=self.config.attention_window,
            is_eager=layout.wants_probabilities or self.config._attn_implementation == "eager",
            inputs=layout.inputs,
            **layout.dropout(self.dropout_p, self.site),
        )
        return mixed.flatten(-2), probabilities


def joined_products(owners: tuple[nn.Linear, ...], rows: Tensor) -> tuple[Tensor, ...]:
    """What each of `owners` makes of `rows` [..., D], as one product."""
    weight = torch.cat([owner.weight for owner in owners])
    bias = torch.cat([owner.bias for owner in owners])
    return functional.linear(rows, weight, bias).chunk(len(owners), dim=-1)


class ResidualOutput(nn.Module):
    """A product whose result is dropped out, added to the residual stream and normalised."""

    def __init__(self, config: Config, input_size: int, site: int) -> None:
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_p = float(config.hidden_dropout_prob)
        self.site = site

    def forward(self, rows: Tensor, residual: Tensor, layout: Layout) -> Tensor:
        """Rows [T, input size] and the residual stream [T, D] -> the new residual stream [T, D].

        Of the rows, those alone that `layout` reads.
        """
        return dropout_add_layer_norm(
            layout.put(self.dense(rows), residual.shape[0]),
            residual,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            self.LayerNorm.eps,
            cu_seqlens=layout.cu_seqlens,
            **layout.dropout(self.dropout_p, self.site),
        )


class Attention(nn.Module):
    """Self-attention and its output; `self` is BERT's own name for the former."""

    def __init__(self, config: Config, layer_index: int) -> None:
        super().__init__()
        self.self = SelfAttention(config, layer_index)
        self.output = ResidualOutput(config, config.hidden_size, site=2 + 3 * layer_index)

    def forward(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """The residual stream [T, D] after attention, and the probabilities, if there are any."""
        mixed, probabilities = self.self(hidden, layout)
        return self.output(layout.take(mixed), hidden, layout), probabilities


class Intermediate(nn.Module):
    """The wide half of the feed-forward block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, F]."""
        return bias_gelu(*split_bias(self.dense, hidden))


def split_bias(dense: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`dense(rows)` as a product and a bias still to be added: zeros unless `dense` is plain."""
    if is_plain(dense, nn.Linear):
        assert isinstance(dense, nn.Linear)
        return functional.linear(rows, dense.weight), dense.bias
    product: Tensor = dense(rows)
    return product, product.new_zeros(product.shape[-1])


class Layer(nn.Module):
    """One post-norm transformer layer."""

    # Hugging Face's switch sets both; its base class for layers would tie this file to it.
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, config: Config, layer_index: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer_index)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config, config.intermediate_size, site=3 + 3 * layer_index)

    def _compute(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        hidden, probabilities = self.attention(hidden, layout)
        wide = self.intermediate(layout.take(hidden))
        return self.output(wide, hidden, layout), probabilities

    def forward(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """The residual stream [T, D] after this layer, and the probabilities, if there are any."""
        if self.gradient_checkpointing and self.training:
            # Not around __call__: hooks of the layer (FSDP2's, for one) must not run a second time.
            result: tuple[Tensor, Tensor | None] = self._gradient_checkpointing_func(
                self._compute, hidden, layout
            )
            return result
        return self._compute(hidden, layout)


class Encoder(nn.Module):
    """All layers, one after another; of the last, only the rows that `Layout.read` names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))

    def is_watched(self) -> bool:
        """Whether hooks see what the last layer computes: then all of it has to be there."""
        return any(has_hooks(module) for module in (self, *self.layer[-1].modules()))

    def forward(self, hidden: Tensor, layout: Layout, wants_states: bool) -> EncoderOutput:
        """The embedding [T, D] -> the last hidden state and what else was asked for."""
        states: list[Tensor] = []
        attentions = []
        whole = layout._replace(read=None)
        for number, layer in enumerate(self.layer, 1):
            if wants_states:
                hidden = _show(hidden, layout.inputs, states)
            is_last = number == len(self.layer)
            hidden, probabilities = layer(hidden, layout if is_last else whole)
            attentions.append(probabilities)
        if wants_states:
            hidden = _show(hidden, layout.inputs, states)
        return EncoderOutput(
            hidden,
            tuple(states) if wants_states else None,
            tuple(attentions) if layout.wants_probabilities else None,
        )


def _show(hidden: Tensor, inputs: PackedInputs | None, states: list[Tensor]) -> Tensor:
    """Appends [T, D] to `states`, in the shape of `inputs`, and returns [T, D] made from that.

    What comes after reads the state that the user gets, so that `retain_grad` on it works.
    """
    states.append(hidden if inputs is None else inputs.unpack(hidden))
    return hidden if inputs is None else inputs.pack(states[-1])
