"""Peak memory of a training step, counted on the real step with tensors that hold no data."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.model.pretrained import Model
from spanbert_fast.ops.attention_planes import backward_bytes
from spanbert_fast.ops.cross_entropy_reference import CHUNK_BYTES
from spanbert_fast.train.optim import build_optimizer, step_unless

MLM_SHARE, SBO_SHARE, SPANS_SHARE = 0.15, 0.148, 0.029
"""MLM labels, SBO targets and spans per token at the default masking; the sampler's means."""


# Logits of a chunk, their slopes, and parts of both: measured on a CPU, whatever the size.
_LOGIT_COPIES = 2.3


class StepMemory(NamedTuple):
    """Bytes of tensors."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What a micro-batch adds at the peak: saved for backward, and in use."""

    @property
    def total(self) -> int:
        """The peak: everything at one time."""
        return sum(self)


def step_memory(
    config: Config,
    *,
    num_sequences: int,
    length: int,
    autocast: torch.dtype | None,
    accumulates: bool,
    activation_checkpointing: bool = False,
    is_fused: bool = False,
) -> StepMemory:
    """Bytes of the tensors of a training step, forward, backward and AdamW.

    The step runs on fake tensors: every operation gives shapes and dtypes, none computes. What
    operations use inside is not seen, except the logits of the cross-entropy and the scores of the
    attention, which are added; nor is what the allocator loses.

    Args:
        config: Of the model.
        num_sequences: Sequences of a micro-batch.
        length: Tokens of each.
        autocast: dtype of matrix products; None: no autocast.
        accumulates: Whether gradients of an earlier micro-batch are there already.
        activation_checkpointing: Whether layers are computed again in the backward pass.
        is_fused: Whether attention is a fused kernel, which holds no scores.
    """
    with FakeTensorMode(), _LiveBytes() as live:
        model = Model(config).train()
        if activation_checkpointing:
            model.activation_checkpointing_enable()
        weights = live.now
        optimizer = build_optimizer(model, weight_decay=0.01)
        batch = sample_batch(num_sequences, length)
        seed = torch.zeros((), dtype=torch.int64)
        enabled = autocast is not None

        def learn() -> None:
            with torch.autocast("cpu", autocast, enabled=enabled):
                loss = model.forward_packed(batch, dropout_seed=seed).loss
            assert loss is not None
            loss.backward()

        before = live.now
        learn()
        gradients = live.now - before
        step_unless(optimizer, torch.zeros(()))
        moments = live.now - before - gradients
        if not accumulates:
            optimizer.zero_grad()
        live.peak = live.now
        learn()
        # The update comes when the activations are gone, and adds nothing that lasts.
        activations = live.peak - weights - gradients - moments
    logits = len(batch.mlm_labels) + len(batch.sbo_targets)
    inside = round(_LOGIT_COPIES * min(CHUNK_BYTES, 4 * logits * config.vocab_size))
    if not is_fused:
        # Not at one time, but the allocator keeps what the logits took.
        inside += _attention_bytes(config, num_sequences, length, autocast)
    return StepMemory(weights, gradients, moments, max(0, activations) + inside)


def _attention_bytes(
    config: Config, num_sequences: int, length: int, autocast: torch.dtype | None
) -> int:
    heads, dropout = int(config.num_attention_heads), float(config.attention_probs_dropout_prob)
    planes = (num_sequences, heads, length, int(config.hidden_size) // heads)
    dtype, window = autocast or torch.float32, config.attention_window
    if dropout == 0.0 and (window is None or window >= length - 1):
        # PyTorch's tiled kernel: gradients alone.
        return 3 * dtype.itemsize * num_sequences * length * int(config.hidden_size)
    return backward_bytes(planes, dtype, window, dropout > 0.0)


def sample_batch(num_sequences: int, length: int) -> PackedBatch:
    """A packed batch with as many targets as the sampler draws on average; all ids are 0."""
    tokens = num_sequences * length
    mlm, sbo = (max(1, round(share * tokens)) for share in (MLM_SHARE, SBO_SHARE))
    spans = max(1, round(SPANS_SHARE * tokens))
    zeros = torch.zeros(tokens, dtype=torch.int64)
    return PackedBatch(
        input_ids=zeros,
        position_ids=torch.arange(length).repeat(num_sequences),
        token_type_ids=zeros,
        cu_seqlens=torch.arange(num_sequences + 1, dtype=torch.int32) * length,
        max_seqlen=length,
        sequence_ids=torch.arange(num_sequences),
        mlm_positions=torch.arange(mlm),
        mlm_labels=zeros[:mlm],
        sbo_left=torch.arange(spans),
        sbo_right=torch.arange(spans) + 1,
        sbo_cu=(torch.arange(spans + 1) * sbo // spans).int(),
        sbo_targets=zeros[:sbo],
        num_items=mlm,
    )


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations made and that are still referred to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
