"""The training peers, with the weights of ours: Hugging Face's BERT, whole or in parts.

A kind names a peer: `eager`, `sdpa`; with `masked`, only words that have a label meet the
vocabulary, as in ours; with `compiled`, under `torch.compile`; with `looped`, one sequence
after the other without padding, gradients accumulated. Hugging Face's default is `sdpa`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM
from workload import Setting, places

from spanbert_fast import Model
from spanbert_fast.batch import PackedBatch

Step = Callable[[], Tensor]
MODERN = "Hugging Face ModernBERT (other weights: shapes and finiteness compared only)"


def without_spans(batch: PackedBatch) -> PackedBatch:
    """The same batch with MLM targets only: what a peer can learn."""
    return dataclasses.replace(
        batch,
        sbo_left=batch.sbo_left[:0],
        sbo_right=batch.sbo_right[:0],
        sbo_cu=batch.sbo_cu[:1],
        sbo_targets=batch.sbo_targets[:0],
    )


def padded(batch: PackedBatch) -> dict[str, Tensor]:
    """The batch in Hugging Face's shapes; without padding there is no mask to slow a peer down."""
    shape = (batch.num_sequences, batch.max_seqlen)
    where = places(batch.cu_seqlens, batch.max_seqlen)
    ids = torch.zeros(shape, dtype=torch.int64, device=where.device)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    ids.view(-1)[where], mask.view(-1)[where] = batch.input_ids, 1
    labels.view(-1)[where[batch.mlm_positions]] = batch.mlm_labels
    inputs = {"input_ids": ids, "labels": labels}
    return inputs if len(where) == ids.numel() else {**inputs, "attention_mask": mask}


def make_model(setting: Setting, dropout: float) -> Model:
    torch.manual_seed(0)
    return Model(setting.config(dropout)).to(setting.device).train()


def make_peer(model: Model, attention: str) -> BertForMaskedLM:
    """Hugging Face's model with the weights of ours."""
    names = BertConfig().to_dict().keys() - {"architectures", "transformers_version"}
    values = {k: v for k, v in model.config.to_dict().items() if k in names}
    peer = BertForMaskedLM._from_config(BertConfig(**values), attn_implementation=attention)
    missing, unexpected = peer.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith("cls.span_boundary.") for name in unexpected)
    return peer.to(model.device).train()


def make_modern(setting: Setting, attention: str) -> ModernBertForMaskedLM:
    """Hugging Face's ModernBERT with as many layers of the same width; its gated feed-forward
    has as many weights as ours.
    """
    sizes = setting.sizes
    config = ModernBertConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=8 * sizes.hidden_size // 3,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.hidden_size // 64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    peer = ModernBertForMaskedLM._from_config(config, attn_implementation=attention)
    return peer.to(setting.device).train()


def autocast(setting: Setting) -> torch.autocast:
    is_mixed = setting.dtype is not torch.float32
    return torch.autocast(setting.device.type, setting.dtype, enabled=is_mixed)


def step_of(setting: Setting, module: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Forward and backward, to fresh gradients; returns the loss, still on the device."""

    def step() -> Tensor:
        module.zero_grad(set_to_none=True)
        with autocast(setting):
            value = loss()
        value.backward()
        return value.detach()

    return step


def our_step(setting: Setting, model: Model, batch: PackedBatch) -> Step:
    return step_of(setting, model, lambda: model.forward_packed(batch).loss)


def masked_loss(peer: BertForMaskedLM, rows: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Loss of the words that have a label, which alone meet the vocabulary."""
    labels = inputs["labels"].flatten().index_select(0, rows)
    others = {name: value for name, value in inputs.items() if name != "labels"}
    hidden = peer.bert(**others).last_hidden_state.flatten(0, 1).index_select(0, rows)
    return functional.cross_entropy(peer.cls(hidden).float(), labels)


def single(batch: PackedBatch) -> list[dict[str, Tensor]]:
    """Each sequence as a batch of its own, in Hugging Face's shapes."""
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.mlm_positions] = batch.mlm_labels
    lengths = batch.cu_seqlens.diff().tolist()
    pairs = zip(batch.input_ids.split(lengths), labels.split(lengths), strict=True)
    return [{"input_ids": ids[None], "labels": targets[None]} for ids, targets in pairs]


def looped_step(setting: Setting, peer: BertForMaskedLM, batch: PackedBatch, kind: str) -> Step:
    """Gradients of all sequences, accumulated; the mean over all labels, as of a batch."""
    parts = single(batch)
    rows = [part["labels"].flatten().ne(-100).nonzero().flatten() for part in parts]
    shares = [len(row) / len(batch.mlm_positions) for row in rows]

    def step() -> Tensor:
        peer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=peer.device)
        for inputs, row, share in zip(parts, rows, shares, strict=True):
            with autocast(setting):
                is_masked = "masked" in kind
                loss = masked_loss(peer, row, inputs) if is_masked else peer(**inputs).loss
                loss = loss * share
            loss.backward()
            total += loss.detach()
        return total

    return step


def peer_step(setting: Setting, model: Model, batch: PackedBatch, kind: str) -> Step:
    """A step of the peer called `kind`."""
    peer = make_peer(model, kind.split()[0])
    if "looped" in kind:
        return looped_step(setting, peer, batch, kind)
    inputs = padded(batch)
    rows = places(batch.cu_seqlens, batch.max_seqlen).index_select(0, batch.mlm_positions)

    def loss() -> Tensor:
        if "masked" in kind:
            return masked_loss(peer, rows, inputs)
        value: Tensor = peer(**inputs).loss
        return value

    if "compiled" in kind:
        torch._dynamo.reset()
        loss = torch.compile(loss, backend=setting.sizes.compiler, dynamic=False)
    return step_of(setting, peer, loss)
