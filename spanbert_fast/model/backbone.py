"""The encoder with `BertModel`'s signature, and what all our Hugging Face classes share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.model.encoder import Embeddings, Encoder, EncoderOutput, Layer, has_hooks
from spanbert_fast.model.inputs import PackedInputs, pack_inputs
from spanbert_fast.model.layout import Layout, ReadRows
from spanbert_fast.model.parts import PART_BYTES, split_by_length
from spanbert_fast.model.rows import Boundaries

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")


class SpanBertPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Initialisation, attention choice and activation checkpointing of our models."""

    config: Config
    config_class = Config
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Embeddings", "Layer"]  # noqa: RUF012  (Hugging Face's attribute)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        # The output biases are parameters of their own, which Hugging Face's rule does not reach.
        if isinstance(bias := module._parameters.get("bias"), Tensor) and not hasattr(
            module, "weight"
        ):
            init.zeros_(bias)

    def save_pretrained(  # type: ignore[override]  # the rarer arguments by keyword only
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Writes configuration and weights, as safetensors; arguments as in Hugging Face."""
        parent: Any = super()
        parent.save_pretrained(save_directory, is_main_process, **kwargs)
        if kwargs.get("variant") or not is_main_process:
            return
        # Hugging Face leaves a single file beside new shards, and would load it in their place.
        folder = Path(save_directory)
        is_sharded = any(folder.glob("model-*-of-*.safetensors"))
        stale = folder / ("model.safetensors" if is_sharded else "model.safetensors.index.json")
        stale.unlink(missing_ok=True)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *_: Any, **__: Any
    ) -> str:
        # Never a silent fallback: what we do not have is refused before Hugging Face looks for it.
        return self.get_correct_attn_implementation(attn_implementation)

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """The name of the attention to use.

        Raises:
            ValueError: It is neither "sdpa" nor "eager".
        """
        requested = requested_attention or "sdpa"
        if requested not in ATTENTION_IMPLEMENTATIONS:
            # The first words are Hugging Face's, for whoever looks for them.
            raise ValueError(
                f'Specified `attn_implementation="{requested}"` is not supported: it must be one '
                f"of {ATTENTION_IMPLEMENTATIONS}"
            )
        return requested

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recomputes activations in the backward pass; arguments as in Hugging Face."""
        # transformers 5.22 knows this switch by its old name only.
        parent: Any = super()
        old = parent.gradient_checkpointing_enable
        getattr(parent, "activation_checkpointing_enable", old)(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keeps activations for the backward pass."""
        parent: Any = super()
        old = parent.gradient_checkpointing_disable
        getattr(parent, "activation_checkpointing_disable", old)()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = torch.utils.checkpoint.checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        layers = [module for module in self.modules() if isinstance(module, Layer)]
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = enable and index % every_n_layers == 0
            layer._gradient_checkpointing_func = gradient_checkpointing_func


class Backbone(SpanBertPreTrainedModel):  # type: ignore[no-untyped-call]
    """Embeddings and layers, without a pooler: `model.bert`, a stand-in for `BertModel`."""

    base_model_prefix = "bert"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of word vectors."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the table of word vectors."""
        self.embeddings.word_embeddings = cast(nn.Embedding, value)

    def encode_packed(
        self,
        batch: PackedBatch,
        *,
        inputs: PackedInputs | None = None,
        dropout_seed: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        for_targets: bool = False,
    ) -> EncoderOutput:
        """Hidden states of the packed rows; no host synchronisation, except for probabilities.

        Args:
            batch: The rows; its targets count with `for_targets` alone.
            inputs: Where the rows come from: then states and probabilities are returned in their
                padded shape, and `inputs.inputs_embeds` counts, if given, not `batch.input_ids`.
            dropout_seed: int64 scalar; None: drawn from torch's default generator, if there is
                dropout.
            output_hidden_states: Whether to return all of them; None: as the configuration says.
            output_attentions: Whether to return probabilities. They are computed one sequence at a
                time, as with the "eager" attention, and the rest with them: the same numbers.
            for_targets: Only the rows where the batch's targets are scored will be read. The last
                layer may leave the others without meaning, which saves most of its work; it does so
                unless all states or probabilities are asked for or a hook sees them.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        is_shown = output_hidden_states or output_attentions or self.encoder.is_watched()
        layout = Layout(
            batch.cu_seqlens,
            batch.max_seqlen,
            batch.sequence_ids,
            self._dropout_seed(dropout_seed, batch.cu_seqlens.device),
            inputs,
            bool(output_attentions),
            ReadRows.of(batch) if for_targets and not is_shown else None,
        )
        if self._goes_by_parts(batch, layout):
            return self._encode_parts(batch, layout, bool(output_hidden_states))
        return self._encode(batch, layout, bool(output_hidden_states))

    def _encode(self, batch: PackedBatch, layout: Layout, wants_states: bool) -> EncoderOutput:
        embeds = None if layout.inputs is None else layout.inputs.inputs_embeds
        hidden = self.embeddings(
            batch.input_ids, batch.position_ids, batch.token_type_ids, layout, embeds
        )
        output: EncoderOutput = self.encoder(hidden, layout, wants_states)
        return output

    def _part_tokens(self) -> int:
        return PART_BYTES // (4 * max(self.config.intermediate_size, self.config.hidden_size))

    def _goes_by_parts(self, batch: PackedBatch, layout: Layout) -> bool:
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or batch.input_ids.device.type != "cpu"
            or batch.num_tokens <= self._part_tokens()
            or batch.num_sequences < 2
        ):
            return False
        if layout.wants_probabilities or layout.read is not None:
            return False
        is_given = layout.inputs is not None and layout.inputs.inputs_embeds is not None
        # Who watches a module expects to see the batch, once.
        return not is_given and not any(has_hooks(module) for module in self.modules())

    def _encode_parts(
        self, batch: PackedBatch, layout: Layout, wants_states: bool
    ) -> EncoderOutput:
        whole: list[Tensor] = []
        for rows, part in split_by_length(batch, self._part_tokens()):
            own = Layout(part.cu_seqlens, part.max_seqlen, part.sequence_ids, layout.seed)
            encoded = self._encode(part, own, wants_states)
            found = (encoded.last_hidden_state, *(encoded.hidden_states or ()))
            if not whole:
                whole = [each.new_empty(batch.num_tokens, each.shape[1]) for each in found]
            for full, each in zip(whole, found, strict=True):
                full.index_copy_(0, rows, each)
        last, *states = whole
        if wants_states:
            # As without parts, the last one is the last hidden state itself.
            states[-1] = last
        if layout.inputs is not None:
            states = [layout.inputs.unpack(state) for state in states]
        return EncoderOutput(last, tuple(states) if wants_states else None, None)

    def _dropout_seed(self, seed: Tensor | None, device: torch.device) -> Tensor | None:
        config = self.config
        if not self.training or not (
            config.hidden_dropout_prob or config.attention_probs_dropout_prob
        ):
            return None
        if seed is None:
            return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
        if seed.shape != () or seed.dtype != torch.int64:
            raise ValueError(
                f"dropout_seed must be an int64 scalar, got {seed.dtype} {tuple(seed.shape)}"
            )
        return seed.to(device, non_blocking=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: object | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        dropout_seed: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Any, ...]:
        """The last hidden state [B, S, D], zero in the padding; `pooler_output` is None.

        The arguments are those of `BertModel`; see `pack_inputs` for the shapes, padded and packed.

        Raises:
            ValueError: A shape or a value does not fit, or a decoder's argument is given.
        """
        refuse_decoder_arguments(
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache or None,
        )
        inputs = pack_inputs(
            self.config,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            boundaries=Boundaries(
                cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx
            ),
        )
        encoded = self.encode_packed(
            inputs.batch,
            inputs=inputs,
            dropout_seed=dropout_seed,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=inputs.unpack(encoded.last_hidden_state),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


def refuse_decoder_arguments(**arguments: object) -> None:
    """Raises ValueError if any argument is given: this is an encoder."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} must be None: this encoder has no decoder and no cache")
