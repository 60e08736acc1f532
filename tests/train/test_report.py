"""What people look at: the picture, the examples, the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

import spanbert_fast as sf
from spanbert_fast.train.report import draw_report, span_examples, write_examples
from spanbert_fast.train.source import open_source


def lines(num_steps: int, *, evaluated: bool, sbo: bool = True) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        found.append(
            {
                "kind": "train",
                "step": step,
                "mlm_loss": 7.0 - step / 10,
                "sbo_loss": 7.2 - step / 12,
                "learning_rate": 1e-3 / step,
                "tokens_per_second": 1e4 + step,
            }
        )
        if evaluated and step % 5 == 0:
            found.append(
                {
                    "kind": "evaluation",
                    "step": step,
                    "mlm_loss": 7.1 - step / 10,
                    "sbo_loss": 7.3 - step / 12 if sbo else None,
                    "mlm_accuracy": step / 100,
                    "sbo_accuracy": step / 120 if sbo else None,
                    "baselines": {
                        "unigram_cross_entropy": 6.6,
                        "majority_token": "the",
                        "majority_accuracy": 0.04,
                    },
                }
            )
    return found


@pytest.mark.parametrize(
    "metrics",
    [
        lines(20, evaluated=True),
        lines(20, evaluated=True, sbo=False),
        lines(3, evaluated=False),
        [],
    ],
    ids=["all", "without SBO", "without evaluation", "nothing yet"],
)
def test_report_is_a_picture_of_some_size(tmp_path: Path, metrics: list[dict[str, Any]]) -> None:
    draw_report(metrics, tmp_path / "report.png", "tiny on shards")
    picture = imread(tmp_path / "report.png")
    assert picture.shape[0] > 800
    assert picture.shape[1] > 1200
    ink = (picture[..., :3] < 0.9).any(-1)
    assert 0.003 < ink.mean() < 0.3


@pytest.mark.parametrize("untrained", [[], ["sbo"]])
def test_examples_show_hidden_spans_with_their_truth(
    shards: Path, tmp_path: Path, untrained: list[str]
) -> None:
    source = open_source(shards)
    torch.manual_seed(0)
    model = sf.Model(
        sf.Config.preset("tiny", vocab_size=len(source.tokenizer), max_position_embeddings=32)
    )
    model.config.untrained_heads = untrained
    batch = next(source.evaluation_batches("validation", max_span_targets=15))
    examples = span_examples(model, source.tokenizer, batch, limit=5)
    assert model.training
    assert len(examples) == 5
    truths = [
        source.tokenizer.decode(batch.sbo_targets[first:last])
        for first, last in zip(batch.sbo_cu[:-1], batch.sbo_cu[1:], strict=True)
    ]
    for example in examples:
        assert example.truth in truths
        assert example.mlm
        assert (example.sbo is None) == bool(untrained)
    write_examples(examples, tmp_path / "examples.json")
    written = json.loads((tmp_path / "examples.json").read_text())
    assert [entry["left"] for entry in written] == [example.left for example in examples]


def test_examples_are_right_where_the_model_is(shards: Path) -> None:
    """A model that knows every answer at a masked position is shown to know it."""
    source = open_source(shards)
    batch = next(source.evaluation_batches("validation", max_span_targets=15))
    vocabulary = len(source.tokenizer)

    class Oracle(sf.Model):
        def forward_packed(self, *_: Any, **__: Any) -> Any:
            from spanbert_fast.model.outputs import SpanBertOutput

            logits = torch.zeros(batch.num_tokens, vocabulary)
            logits[batch.mlm_positions, batch.mlm_labels] = 1.0
            sbo_logits = torch.zeros(len(batch.sbo_targets), vocabulary)
            sbo_logits[torch.arange(len(batch.sbo_targets)), batch.sbo_targets] = 1.0
            return SpanBertOutput(logits=logits, sbo_logits=sbo_logits)

    model = Oracle(sf.Config.preset("tiny", vocab_size=vocabulary, hidden_size=32))
    for example in span_examples(model, source.tokenizer, batch):
        assert example.truth == example.mlm == example.sbo
