"""A two-layer model with dropout on a small ragged batch, forward and backward."""

from __future__ import annotations

import numpy as np
import torch
from ops.tolerance import BACKWARD, FORWARD, assert_as_accurate
from torch import Tensor

from spanbert_fast import Config, Model, SpanMasker, use_backend
from spanbert_fast.batch import PackedBatch

VOCAB_SIZE, LENGTHS = 101, (23, 1, 14)


def make_model() -> Model:
    """Two layers, two heads of 32, dropout 0.1, in training mode."""
    torch.manual_seed(0)
    config = Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=32,
    )
    return Model(config).train()


def make_batch(lengths: tuple[int, ...] = LENGTHS, vocab_size: int = VOCAB_SIZE) -> PackedBatch:
    """Sequences of random tokens with MLM and, where they are long enough, SBO targets."""
    rng = np.random.default_rng(sum(lengths))
    ids = rng.integers(5, vocab_size, sum(lengths), dtype=np.int32)
    cu = np.cumsum((0, *lengths), dtype=np.int32)
    masker = SpanMasker(
        np.ones(vocab_size, bool),
        mask_token_id=4,
        special_token_ids=[0, 1, 2, 3],
        replacement_ids=ids.copy(),
        mask_ratio=0.3,
    )
    masked = masker(ids, cu, np.arange(len(lengths)))._asdict()
    # Each in an allocation of its own, as on a GPU.
    tensors = {name: torch.from_numpy(array).clone() for name, array in masked.items()}
    tensors["input_ids"] = tensors["input_ids"].long()
    return PackedBatch(
        **tensors,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        token_type_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        cu_seqlens=torch.from_numpy(cu).clone(),
        max_seqlen=max(lengths),
        sequence_ids=torch.arange(len(lengths)) + 7,
    )


def step(
    backend: str, precision: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a training step; `precision` is autocast's, `dtype` the parameters'."""
    model = make_model().to(dtype)
    autocast = torch.autocast("cpu", precision, enabled=precision is not torch.float32)
    with use_backend(backend):
        batch = make_batch()
        assert len(batch.sbo_targets)
        with autocast:
            loss = model.forward_packed(batch, dropout_seed=torch.tensor(3)).loss
        loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def assert_twins_agree() -> None:
    """The Triton step gives the reference's loss and gradients."""
    loss, gradients = step("torch")
    twin_loss, twin_gradients = step("triton")
    assert abs(twin_loss - loss) < 1e-5 * abs(loss)
    for name, expected in gradients.items():
        found = twin_gradients[name]
        assert expected is not None, name
        assert found is not None, name
        # Key biases move no probability: their gradient is zero but for rounding.
        scale = 1.0 if name.endswith("self.key.bias") else float(expected.abs().max())
        assert float((found - expected).abs().max()) <= 1e-5 * scale, name
    assert sum(float(gradient.abs().sum()) > 0 for gradient in gradients.values()) > 40


def assert_autocast_is_as_accurate(precision: torch.dtype) -> None:
    """Under autocast the Triton step errs as the reference does, by the rule of `ops.tolerance`."""
    exact_loss, exact = step("torch", dtype=torch.float64)
    plain_loss, plain = step("torch", precision)
    loss, ours = step("triton", precision)
    spread = float(torch.finfo(precision).eps) * exact_loss
    assert abs(loss - exact_loss) <= max(FORWARD * abs(plain_loss - exact_loss), spread)
    for name, truth in exact.items():
        if not name.endswith("self.key.bias"):
            assert_as_accurate(ours[name], plain[name], truth, BACKWARD, name)
