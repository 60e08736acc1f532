"""`BertModel` with a door: packed once, all layers on packed rows, unpacked at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils.output_capturing import capture_outputs

from spanbert_fast.model.backbone import refuse_decoder_arguments
from spanbert_fast.model.inputs import PackedInputs, pack_inputs
from spanbert_fast.model.layout import Layout
from spanbert_fast.model.patch.packed import (
    ATTENTIONS,
    Packed,
    PackedCall,
    call_packed,
    dropout_of,
)
from spanbert_fast.model.rows import Boundaries

Output = BaseModelOutputWithPoolingAndCrossAttentions


class _TableSizes(NamedTuple):
    """The ranges of ids, from the tables themselves: they may have been replaced."""

    vocab_size: int
    type_vocab_size: int
    max_position_embeddings: int
    max_span_targets: int = 0

    @classmethod
    def of(cls, model: Packed) -> _TableSizes:
        config = model.config
        tables = model.embeddings
        return cls(
            _size(tables.word_embeddings, config.vocab_size),
            _size(tables.token_type_embeddings, config.type_vocab_size),
            _size(tables.position_embeddings, config.max_position_embeddings),
        )


def _size(table: nn.Module, otherwise: int) -> int:
    weight = getattr(table, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) else otherwise


class PackedModel(Packed, serves="BertModel"):
    """`BertModel`; see `docs/patching.md` for what differs."""

    def runs(self) -> str:
        """See `Packed.runs`."""
        return "packs, runs the layers on packed rows, unpacks"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> Output | tuple[Any, ...]:
        """Hidden states [B, S, D], zero in the padding, and each sequence's first token, pooled.

        The arguments are those of `BertModel` and Hugging Face's padding-free ones.

        Raises:
            ValueError: A shape or a value does not fit, or a decoder's argument is given.
            TypeError: A tensor of ids does not hold integers.
        """
        refuse_decoder_arguments(
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache or None,
            is_causal=kwargs.get("is_causal") or None,
        )
        self._check_config()
        return_dict = kwargs.pop("return_dict", getattr(self.config, "return_dict", True))
        inputs = pack_inputs(
            _TableSizes.of(self),
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            boundaries=Boundaries(
                cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx
            ),
        )
        # Here, not in `_encode`: what a compiler cannot trace comes before the layers.
        call = self._packed_call(inputs)
        if kwargs.get("output_hidden_states", self.config.output_hidden_states):
            call = call._replace(states=[])
        encoded: Output = self._encode(call, return_dict=True, **kwargs)
        output = self._unpack(call, encoded)
        return output.to_tuple() if return_dict is False else output

    @capture_outputs  # type: ignore[untyped-decorator]
    def _encode(self, call: PackedCall, **_: Any) -> Output:
        """The last hidden state [1, T, D]; Hugging Face's decorator adds what it recorded."""
        batch, embeds = call.inputs.batch, call.inputs.inputs_embeds
        ids = None if embeds is not None else batch.input_ids[None]
        given = None if embeds is None else embeds[None]
        types, positions = batch.token_type_ids[None], batch.position_ids[None]
        rows = call_packed(self.embeddings, ids, types, positions, given, packed_call=call)
        encoded = call_packed(self.encoder, rows, packed_call=call)
        return Output(last_hidden_state=encoded.last_hidden_state)

    def _unpack(self, call: PackedCall, encoded: Output) -> Output:
        rows, inputs = encoded.last_hidden_state, call.inputs
        assert rows is not None
        last = inputs.unpack(rows[0])
        pooled = None if self.pooler is None else self.pooler(inputs.first_rows(rows[0])[:, None])
        output = Output(last_hidden_state=last, pooler_output=pooled)
        for name in [name for name in encoded if name != "last_hidden_state"]:
            output[name] = encoded[name]
        if call.states is not None:
            # Which states are kept is the decorator's decision; some versions leave out the first.
            states, recorded = [*call.states, last], encoded.hidden_states or ()
            chosen = zip(recorded, states[len(states) - len(recorded) :], strict=True)
            output.hidden_states = tuple(
                None if record is None else state for record, state in chosen
            )
        return output

    def _packed_call(self, inputs: PackedInputs) -> PackedCall:
        batch = inputs.batch
        layout = Layout(
            batch.cu_seqlens, batch.max_seqlen, batch.sequence_ids, self._seed(batch.cu_seqlens)
        )
        padding = getattr(self.embeddings.word_embeddings, "padding_idx", None)
        if padding is None or inputs.inputs_embeds is not None or not torch.is_grad_enabled():
            return PackedCall(layout, inputs)
        return PackedCall(
            layout, inputs, has_padding_token=bool((batch.input_ids == padding).any())
        )

    def _seed(self, like: Tensor) -> Tensor | None:
        """From torch's default generator, int64 scalar; None if nothing is dropped."""
        if not any(self._dropout_probabilities()):
            return None
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=like.device)

    def _dropout_probabilities(self) -> Iterator[float]:
        yield dropout_of(self.embeddings.dropout) or 0.0
        for layer in self.encoder.layer:
            attention = layer.attention.self
            yield float(attention.dropout.p) if attention.training else 0.0
            yield dropout_of(layer.attention.output.dropout) or 0.0
            yield dropout_of(layer.output.dropout) or 0.0

    def _check_config(self) -> None:
        config = self.config
        if config.is_decoder or getattr(config, "is_causal", False):
            raise ValueError(
                "a patched BERT is an encoder: is_decoder and is_causal must be False, got "
                f"{config.is_decoder} and {getattr(config, 'is_causal', False)}"
            )
        if config._attn_implementation not in ATTENTIONS:
            raise ValueError(
                f"attn_implementation of a patched BERT must be one of {ATTENTIONS}, "
                f"got {config._attn_implementation!r}"
            )
