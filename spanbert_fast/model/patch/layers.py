"""Hugging Face's BERT layers on packed rows.

Each class stands in front of Hugging Face's own (see `packed`), whose attributes it uses, and hands
on to it what is not packed. Rows have the shape [1, T, D], so that hooks, adapters and recorders
see the usual three dimensions. A module that does more than its kind, or whose tensors are not
ordinary ones, is called; the others take part in fused operations.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from spanbert_fast.model.eager_attention import mix_values
from spanbert_fast.model.encoder import joined_products
from spanbert_fast.model.patch.packed import (
    Packed,
    PackedCall,
    call_packed,
    called_modules,
    dropout_of,
    is_exact_gelu,
    is_fusable,
    window_of,
)
from spanbert_fast.ops.activation import bias_gelu
from spanbert_fast.ops.dropout import hidden_dropout
from spanbert_fast.ops.embedding import bert_embedding
from spanbert_fast.ops.norm import dropout_add_layer_norm

_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def _drop(dropout: nn.Module, rows: Tensor, call: PackedCall, site: int) -> Tensor:
    """`dropout` applied to [1, T, D]."""
    p = dropout_of(dropout)
    if p is None:
        dropped: Tensor = dropout(rows)
        return dropped
    arguments = call.layout.dropout(p, site)
    return hidden_dropout(rows[0], cu_seqlens=call.layout.cu_seqlens, **arguments)[None]


class PackedEmbeddings(Packed, serves="BertEmbeddings"):
    """`BertEmbeddings`; ids and positions are [1, T]."""

    def runs(self) -> str:
        """See `Packed.runs`."""
        kinds = dict.fromkeys(_TABLES, nn.Embedding) | {"LayerNorm": nn.LayerNorm}
        return "bert_embedding" + called_modules(self, **kinds)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
        packed_call: PackedCall | None = None,
    ) -> Tensor:
        """The rows that enter the first layer, [1, T, D]."""
        if packed_call is None:
            rows: Tensor = super().forward(
                input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length
            )
            return rows
        assert position_ids is not None
        assert token_type_ids is not None
        words = inputs_embeds
        # The vector of the padding token has no gradient: its table sees to that, when called.
        must_call = packed_call.has_padding_token or not _is_plain_table(self.word_embeddings)
        if words is None and must_call:
            words = self.word_embeddings(input_ids)
        p = dropout_of(self.dropout)
        norm = self.LayerNorm
        others = (self.position_embeddings, self.token_type_embeddings)
        is_fused = all(map(_is_plain_table, others)) and is_fusable(norm, nn.LayerNorm)
        if not is_fused or p is None:
            words = self.word_embeddings(input_ids) if words is None else words
            total = words + self.token_type_embeddings(token_type_ids)
            rows = norm(total + self.position_embeddings(position_ids))
            return _drop(self.dropout, rows, packed_call, 0)
        if words is None:
            assert input_ids is not None
            ids, table = input_ids[0], self.word_embeddings.weight
        else:
            # Given vectors are a table in which token t stands in row t.
            ids, table = torch.arange(words.shape[1], device=words.device), words[0]
        rows = bert_embedding(
            ids,
            position_ids[0],
            token_type_ids[0],
            table,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            norm.weight,
            norm.bias,
            norm.eps,
            cu_seqlens=packed_call.layout.cu_seqlens,
            **packed_call.layout.dropout(p, 0),
        )
        return rows[None]


def _is_plain_table(table: nn.Module) -> bool:
    return (
        is_fusable(table, nn.Embedding)
        and table.max_norm is None
        and not table.scale_grad_by_freq
        and not table.sparse
    )


class PackedSelfAttention(Packed, serves="BertSelfAttention"):
    """`BertSelfAttention` inside each sequence."""

    def runs(self) -> str:
        """See `Packed.runs`."""
        op = "eager_attention" if self._is_eager() else "varlen_attention"
        op += "" if (window := window_of(self.config)) is None else f", window {window}"
        return op + called_modules(self, query=nn.Linear, key=nn.Linear, value=nn.Linear)

    def _is_eager(self) -> bool:
        return bool(self.config._attn_implementation == "eager")

    def _project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        owners = (self.query, self.key, self.value)
        # Joining the weights costs a copy of them, which only many rows pay back.
        pays = hidden.shape[1] >= hidden.shape[2]
        if pays and all(is_fusable(owner, nn.Linear) for owner in owners):
            return joined_products(owners, hidden)
        return tuple(owner(hidden) for owner in owners)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        packed_call: PackedCall | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed values [1, T, D] and, if eager, probabilities [B, H, S, S]."""
        if packed_call is None:
            given: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, past_key_values, **kwargs
            )
            return given
        shape = (-1, self.num_attention_heads, self.attention_head_size)
        query, key, value = (rows.reshape(shape) for rows in self._project(hidden_states))
        layout, inputs = packed_call.layout, packed_call.inputs
        place = (layout.cu_seqlens, layout.max_seqlen)
        p = float(self.dropout.p) if self.training else 0.0
        arguments = layout.dropout(p, 1 + 3 * packed_call.layer) | {"scale": self.scaling}
        arguments["window"] = window_of(self.config)
        mixed, probabilities = mix_values(
            query, key, value, *place, is_eager=self._is_eager(), inputs=inputs, **arguments
        )
        return mixed.flatten(-2)[None], probabilities


class _PackedResidual(Packed):
    """A product that is dropped out, added to the residual stream and normalised."""

    site: ClassVar[int]
    """Of layer 0; three more for each layer."""

    def runs(self) -> str:
        """See `Packed.runs`."""
        return "dropout_add_layer_norm" + called_modules(self, LayerNorm=nn.LayerNorm)

    def forward(
        self, hidden_states: Tensor, input_tensor: Tensor, packed_call: PackedCall | None = None
    ) -> Tensor:
        """The new residual stream [1, T, D]."""
        if packed_call is None:
            given: Tensor = super().forward(hidden_states, input_tensor)
            return given
        rows = self.dense(hidden_states)
        site = self.site + 3 * packed_call.layer
        p, norm = dropout_of(self.dropout), self.LayerNorm
        if p is None or not is_fusable(norm, nn.LayerNorm):
            added: Tensor = norm(_drop(self.dropout, rows, packed_call, site) + input_tensor)
            return added
        layout = packed_call.layout
        return dropout_add_layer_norm(
            rows[0],
            input_tensor[0],
            norm.weight,
            norm.bias,
            norm.eps,
            cu_seqlens=layout.cu_seqlens,
            **layout.dropout(p, site),
        )[None]


class PackedSelfOutput(_PackedResidual, serves="BertSelfOutput"):
    """`BertSelfOutput`."""

    site = 2


class PackedOutput(_PackedResidual, serves="BertOutput"):
    """`BertOutput`."""

    site = 3


class PackedAttention(Packed, serves="BertAttention"):
    """`BertAttention`."""

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_call: PackedCall | None = None, **kw: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream [1, T, D] and the probabilities, if there are any."""
        if packed_call is None:
            given: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *args, **kw)
            return given
        mixed, probabilities = call_packed(self.self, hidden_states, packed_call=packed_call)
        rows = call_packed(self.output, mixed, hidden_states, packed_call=packed_call)
        return rows, probabilities


class PackedIntermediate(Packed, serves="BertIntermediate"):
    """`BertIntermediate`."""

    def _is_fused(self) -> bool:
        return is_fusable(self.dense, nn.Linear) and is_exact_gelu(self.intermediate_act_fn)

    def runs(self) -> str:
        """See `Packed.runs`."""
        if is_exact_gelu(self.intermediate_act_fn):
            return "bias_gelu" + called_modules(self, dense=nn.Linear)
        return "the modules one by one"

    def forward(self, hidden_states: Tensor, packed_call: PackedCall | None = None) -> Tensor:
        """[1, T, F]."""
        if packed_call is None or not self._is_fused():
            given: Tensor = super().forward(hidden_states)
            return given
        dense = self.dense
        return bias_gelu(functional.linear(hidden_states[0], dense.weight), dense.bias)[None]


class PackedLayer(Packed, serves="BertLayer"):
    """`BertLayer`; recomputation in the backward pass is its base class's."""

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_call: PackedCall | None = None, **kw: Any
    ) -> Tensor:
        """The residual stream [1, T, D]."""
        if packed_call is None:
            given: Tensor = super().forward(hidden_states, *args, **kw)
            return given
        rows, _ = call_packed(self.attention, hidden_states, packed_call=packed_call)
        wide = call_packed(self.intermediate, rows, packed_call=packed_call)
        output: Tensor = call_packed(self.output, wide, rows, packed_call=packed_call)
        return output


class PackedEncoder(Packed, serves="BertEncoder"):
    """`BertEncoder`."""

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_call: PackedCall | None = None, **kw: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The last hidden state [1, T, D]."""
        if packed_call is None:
            given: BaseModelOutputWithPastAndCrossAttentions = super().forward(
                hidden_states, *args, **kw
            )
            return given
        inputs, states = packed_call.inputs, packed_call.states
        for index, layer in enumerate(self.layer):
            if states is not None:
                # The layer reads what is returned, so that `retain_grad` works on it.
                states.append(inputs.unpack(hidden_states[0]))
                hidden_states = inputs.pack(states[-1])[None]
            hidden_states = call_packed(
                layer, hidden_states, packed_call=packed_call._replace(layer=index)
            )
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)
