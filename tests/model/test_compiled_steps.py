"""torch.compile of a packed step: one graph without a break, and no recompilation storm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from spanbert_fast.batch import PackedBatch
from spanbert_fast.config import Config
from spanbert_fast.model.pretrained import Model


@pytest.fixture
def dropping(config: Config) -> Model:
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.2
    config.num_hidden_layers = 1
    torch._dynamo.reset()
    return Model(config).double().train()


def random_batch(seed: int, max_targets: int = 5) -> PackedBatch:
    """Sequences of random number and length, with random numbers of labels and spans."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    lengths = draw(8, 33, int(draw(2, 9)))
    num_tokens = int(lengths.sum())
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    starts = cu[:-1][: int(draw(2, len(lengths) + 1))]
    sizes = draw(1, max_targets + 1, len(starts))
    num_labels = int(draw(2, num_tokens // 2))
    return PackedBatch(
        input_ids=draw(5, 64, num_tokens),
        position_ids=torch.cat([torch.arange(length) for length in lengths.tolist()]),
        token_type_ids=draw(0, 2, num_tokens),
        cu_seqlens=cu.int(),
        max_seqlen=int(lengths.max()),
        sequence_ids=draw(0, 1000, len(lengths)),
        mlm_positions=torch.randperm(num_tokens, generator=generator)[:num_labels],
        mlm_labels=draw(5, 64, num_labels),
        sbo_left=starts,
        sbo_right=starts + sizes + 1,
        sbo_cu=torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int(),
        sbo_targets=draw(5, 64, int(sizes.sum())),
        num_items=num_labels,
    )


def gradient_of(model: Model, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_dynamo_explains_no_break(dropping: Model) -> None:
    seed = torch.tensor(3)
    explain = torch._dynamo.explain(dropping.forward_packed)
    found = explain(random_batch(0), dropout_seed=seed, output_hidden_states=True)
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1


def test_twenty_batches_need_two_graphs(dropping: Model) -> None:
    """Counts of tokens, sequences, labels and spans change in every batch."""
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(dropping.forward_packed, fullgraph=True, backend=counter)
    graphs = []
    for number in range(20):
        batch, seed = random_batch(number), torch.tensor(number)
        # Both the losses and a use of an inner state reach the weights.
        results = []
        for run in (step, dropping.forward_packed):
            output = run(batch, dropout_seed=seed, output_hidden_states=True)
            loss = output.loss + output.hidden_states[0].square().mean()
            results.append([loss, *output.hidden_states, *gradient_of(dropping, loss)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        graphs.append(counter.frame_count)
    assert graphs == [1, *[2] * 19]
