"""`SBOHead` on the states of any encoder: equal to the head of `Model`, and it learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spanbert_fast.model.heads import SpanBoundary
from spanbert_fast.model.pretrained import Model
from spanbert_fast.model.sbo_head import SBOHead


@pytest.fixture
def head(model: Model) -> SBOHead:
    """The SBO head of `model`, on its own."""
    config = model.config
    head = SBOHead(
        config.hidden_size,
        config.vocab_size,
        max_span_targets=config.max_span_targets,
        span_position_embedding_size=config.span_position_embedding_size,
    ).double()
    head.span_boundary.load_state_dict(model.cls.span_boundary.state_dict())
    return head.eval()


def test_it_is_the_head_of_the_model(
    model: Model, head: SBOHead, padded: dict[str, Tensor]
) -> None:
    expected = model(**padded, output_hidden_states=True)
    hidden = expected.hidden_states[-1]
    weight = model.cls.predictions.decoder.weight
    spans, targets = padded["sbo_spans"], padded["sbo_targets"]
    found = head(hidden, spans, targets, decoder_weight=weight)
    torch.testing.assert_close(found.loss, expected.sbo_loss)
    torch.testing.assert_close(found.logits, expected.sbo_logits)
    predicted = head(hidden, spans, decoder_weight=weight)
    assert predicted.loss is None
    torch.testing.assert_close(predicted.logits[:2], found.logits[:2])
    num_targets = int((targets != -100).sum())
    per_label = head(hidden, spans, targets, decoder_weight=weight, num_items=10)
    torch.testing.assert_close(per_label.loss * 10, found.loss * num_targets)


def test_packed_states_give_the_same_numbers(
    model: Model, head: SBOHead, padded: dict[str, Tensor]
) -> None:
    hidden = model(**padded, output_hidden_states=True).hidden_states[-1].detach()
    weight = model.cls.predictions.decoder.weight
    spans, targets = padded["sbo_spans"], padded["sbo_targets"]
    expected = head(hidden, spans, targets, decoder_weight=weight)
    is_span = spans[..., 0] >= 0
    rows = is_span.nonzero()[:, :1]
    packed = head(
        hidden.flatten(0, 1),
        spans[is_span] + rows * hidden.shape[1],
        targets[is_span],
        decoder_weight=weight,
    )
    torch.testing.assert_close(packed.loss, expected.loss)
    torch.testing.assert_close(packed.logits, expected.logits)


def test_everything_has_a_gradient_and_no_spans_are_no_loss(
    head: SBOHead, padded: dict[str, Tensor]
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 14, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(64, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    head.train()
    found = head(hidden, padded["sbo_spans"], padded["sbo_targets"], decoder_weight=weight)
    assert found.logits is None
    found.loss.backward()
    for tensor in (hidden, weight, *head.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0
    head.zero_grad()
    none = head(
        hidden,
        torch.full((4, 2, 2), -1),
        torch.full((4, 2, 5), -100),
        decoder_weight=weight,
    )
    none.loss.backward()
    assert none.loss == 0
    assert all(parameter.grad.abs().sum() == 0 for parameter in head.parameters())


def test_it_learns(head: SBOHead, padded: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    head = SBOHead(32, 64, max_span_targets=5, span_position_embedding_size=8)
    assert isinstance(head.span_boundary, SpanBoundary)
    assert 0.015 < float(head.span_boundary.transform2.dense.weight.detach().std()) < 0.025
    hidden, weight = torch.randn(4, 14, 32), torch.randn(64, 32)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = head(hidden, padded["sbo_spans"], padded["sbo_targets"], decoder_weight=weight).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_wrong_inputs_are_named(head: SBOHead, padded: dict[str, Tensor]) -> None:
    hidden, weight = torch.zeros(4, 14, 32).double(), torch.zeros(64, 32).double()
    spans, targets = padded["sbo_spans"], padded["sbo_targets"]
    with pytest.raises(ValueError, match=r"decoder_weight must have shape \(64, 32\)"):
        head(hidden, spans, targets, decoder_weight=weight[:, :16])
    with pytest.raises(ValueError, match=r"hidden must have shape \(rows, columns, 32\)"):
        head(hidden[..., :8], spans, targets, decoder_weight=weight)
    with pytest.raises(ValueError, match=r"0 <= left < right < 10"):
        head(hidden[:, :10], spans, targets, decoder_weight=weight)
    with pytest.raises(ValueError, match="1 to 5 targets"):
        head(hidden[:1], spans[:1], torch.ones(1, 3, 6, dtype=torch.int64), decoder_weight=weight)
    with pytest.raises(ValueError, match="hidden_size must be at least 1"):
        SBOHead(0, 64)
