"""`Model`: encoder, MLM head and SBO head behind Hugging Face's interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.model.backbone import (
    Backbone,
    SpanBertPreTrainedModel,
    refuse_decoder_arguments,
)
from spanbert_fast.model.heads import Heads, RowScores, combine_losses
from spanbert_fast.model.inputs import PackedInputs, pack_inputs
from spanbert_fast.model.loading import ReportedLoading
from spanbert_fast.model.outputs import Request, SpanBertOutput
from spanbert_fast.model.rows import Boundaries
from spanbert_fast.model.targets import without_spans


class Model(ReportedLoading, SpanBertPreTrainedModel):  # type: ignore[no-untyped-call]
    """SpanBERT with both heads; a drop-in for `BertForMaskedLM`.

    `forward` takes Hugging Face's shapes, `forward_packed` a `PackedBatch`; both compute the same
    numbers.
    """

    # The loss divides by num_items_in_batch itself, so the Trainer must not divide again.
    accepts_loss_kwargs = True
    _tied_weights_keys = {  # noqa: RUF012  (Hugging Face's attribute)
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.bert = Backbone(config)
        self.cls = Heads(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of word vectors."""
        return self.bert.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the table of word vectors."""
        self.bert.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder; its matrix is the table of word vectors."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the decoder and, with it, the bias of the MLM head."""
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    def _resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        resize: Any = super()._resize_token_embeddings
        embeddings: nn.Embedding = resize(*args, **kwargs)
        old = self.cls.span_boundary.bias
        added = embeddings.weight.shape[0] - old.shape[0]
        if added:
            # As Hugging Face fills the MLM bias: a new token is as likely as the average one.
            fill = old.detach().mean().expand(max(added, 0))
            resized = torch.cat([old.detach()[: old.shape[0] + added], fill])
            self.cls.span_boundary.bias = nn.Parameter(resized, requires_grad=old.requires_grad)
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        sbo_spans: Tensor | None = None,
        sbo_targets: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        num_sbo_items_in_batch: int | Tensor | None = None,
        dropout_seed: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        return_logits: bool | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> SpanBertOutput | tuple[Any, ...]:
        """Losses and logits of a batch in Hugging Face's shapes.

        Args:
            input_ids: Integer [B, S]; or packed rows without a mask: one row [1, T] with
                `cu_seq_lens_q`, or any with `seq_idx` or with `position_ids` that restart.
            attention_mask: [B, S] of zeros and ones.
            token_type_ids: Integer [B, S], zeros by default.
            position_ids: Integer [B, S], the column by default.
            inputs_embeds: [B, S, D] instead of `input_ids`.
            labels: [B, S] ids to predict, -100 = none.
            sbo_spans: [B, R, 2] columns left and right of each span, -1 = padding.
            sbo_targets: [B, R, up to K] ids of each span, -100 = padding. Spans without targets are
                predicted.
            cu_seq_lens_q: Integer [sequences + 1], boundaries in a packed row.
            cu_seq_lens_k: Equal to `cu_seq_lens_q`, if given.
            max_length_q: Length of the longest sequence of a packed row.
            max_length_k: Equal to `max_length_q`, if given.
            seq_idx: Integer [B, S], which sequence of its row a token belongs to.
            num_items_in_batch: MLM labels of the whole step; by default those of this batch.
            num_sbo_items_in_batch: SBO targets of the whole step; only
                `loss_normalization="reference"` reads it.
            dropout_seed: int64 scalar; drawn from torch's default generator if not given.
            sequence_ids: int64 [sequences] that name the sequences in the dropout stream; the index
                by default.
            return_logits: True: also in training, and of untrained heads. False: never. By default
                in evaluation, or if there is nothing to learn; but never of an untrained head
                without targets.
            encoder_hidden_states: Not supported.
            encoder_attention_mask: Not supported.
            output_hidden_states: Whether to return all hidden states.
            output_attentions: Whether to return probabilities; see `Backbone.encode_packed`.
            return_dict: False for a tuple of what is not None.

        Raises:
            ValueError: A shape or a value does not fit, or a decoder's argument is given.
            TypeError: A tensor of ids does not hold integers.
        """
        refuse_decoder_arguments(
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
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
            labels=labels,
            sbo_spans=sbo_spans,
            sbo_targets=sbo_targets,
            sequence_ids=sequence_ids,
        )
        request = Request(
            learns=labels is not None or sbo_targets is not None,
            has_sbo_targets=sbo_spans is None or sbo_targets is not None,
            num_items=num_items_in_batch,
            num_sbo_items=num_sbo_items_in_batch,
            dropout_seed=dropout_seed,
            return_logits=return_logits,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        output = self._answer(inputs.batch, request, inputs)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def forward_packed(
        self,
        batch: PackedBatch,
        *,
        dropout_seed: Tensor | None = None,
        return_logits: bool | None = None,
        num_sbo_items: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SpanBertOutput:
        """Losses and logits of a packed batch, without any host synchronisation.

        There is always a loss: 0, attached to the graph, if the batch has no targets.

        Args:
            batch: Rows and targets; `batch.num_items` divides the loss, if set.
            dropout_seed: int64 scalar; drawn from torch's default generator if not given.
            return_logits: True: logits [T, V] and [N, V] also in training, and of untrained heads.
                False: never. By default in evaluation, except of an untrained head without targets.
            num_sbo_items: SBO targets of the whole step; `loss_normalization="reference"` needs it
                if `batch.num_items` is set.
            output_hidden_states: Whether to return all hidden states, [T, D] each.
            output_attentions: Whether to return probabilities; see `Backbone.encode_packed`.
        """
        request = Request(
            num_items=batch.num_items,
            num_sbo_items=num_sbo_items,
            dropout_seed=dropout_seed,
            return_logits=return_logits,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        return self._answer(batch, request)

    def score_packed(self, batch: PackedBatch, *, dropout_seed: Tensor | None = None) -> RowScores:
        """Loss and hit of every target of a packed batch, for evaluation by offset or length."""
        encoded = self.bert.encode_packed(batch, dropout_seed=dropout_seed, for_targets=True)
        return self.cls.score(encoded.last_hidden_state, batch)

    def _answer(
        self, batch: PackedBatch, request: Request, inputs: PackedInputs | None = None
    ) -> SpanBertOutput:
        has_targets = {
            "mlm": batch.mlm_labels.shape[0] > 0,
            "sbo": batch.sbo_targets.shape[0] > 0 and request.has_sbo_targets,
        }
        gives_mlm = self._gives_logits("mlm", request, has_targets["mlm"])
        gives_sbo = self._gives_logits("sbo", request, has_targets["sbo"])
        encoded = self.bert.encode_packed(
            batch,
            inputs=inputs,
            dropout_seed=request.dropout_seed,
            output_hidden_states=request.output_hidden_states,
            output_attentions=request.output_attentions,
            for_targets=not gives_mlm,
        )
        hidden = encoded.last_hidden_state
        for head in [head for head in self.config.untrained_heads if has_targets[head]]:
            if self.training:
                self.config.untrained_heads.remove(head)
        loss = mlm_loss = sbo_loss = None
        if request.learns:
            learned = batch if request.has_sbo_targets else without_spans(batch)
            loss, mlm_loss, sbo_loss = combine_losses(
                self.cls.score(hidden, learned),
                self.config,
                request.num_items,
                request.num_sbo_items,
                batch.row_weights,
            )
        logits = sbo_logits = None
        if gives_mlm:
            logits = self.cls.mlm_logits(hidden)
        if gives_sbo and batch.sbo_targets.shape[0]:
            sbo_logits = self.cls.sbo_logits(hidden, batch)
        if inputs is not None and logits is not None:
            logits = inputs.unpack(logits)
        states, attentions = encoded.hidden_states, encoded.attentions
        return SpanBertOutput(loss, logits, states, attentions, mlm_loss, sbo_loss, sbo_logits)

    def _gives_logits(self, head: str, request: Request, has_targets: bool) -> bool:
        if request.return_logits is not None:
            return request.return_logits
        if self.training and request.learns:
            return False
        return has_targets or head not in self.config.untrained_heads
