"""Losses and accuracies on held-out blocks, under masks that are the same for every model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from spanbert_fast.batch import PackedBatch
from spanbert_fast.model.pretrained import Model
from spanbert_fast.train.events import Baselines, Bucket, EvaluationResult
from spanbert_fast.train.machine import choose_device, machine_settings, without_progress_bars
from spanbert_fast.train.options import EvaluateOptions
from spanbert_fast.train.source import Source, open_source

__all__ = ["EvaluateOptions", "EvaluationResult", "evaluate", "evaluate_model"]


class _Scores(NamedTuple):
    """Of one batch, on the host."""

    losses: Tensor
    """fp64 [rows], cross-entropy of each target."""
    correct: Tensor
    """bool [rows], whether the target has the highest logit."""


def evaluate(options: EvaluateOptions) -> EvaluationResult:
    """The quality of a saved model on the blocks of a split.

    Raises:
        ValueError: The split is empty, or the model has another vocabulary or too few positions.
    """
    source = open_source(options.data)
    device = choose_device(options.device)
    with without_progress_bars():
        model = Model.from_pretrained(options.model, dtype=torch.float32)
    source.check_vocabulary(options.model, int(model.config.vocab_size))
    source.check_positions(int(model.config.max_position_embeddings))
    with machine_settings(options.threads):
        batches = source.evaluation_batches(
            options.split,
            max_span_targets=model.config.max_span_targets,
            max_blocks=options.max_blocks,
        )
        return evaluate_model(model.to(device), source, batches)


@torch.no_grad()
def evaluate_model(
    model: Model, source: Source, batches: Iterable[PackedBatch]
) -> EvaluationResult:
    """The quality of a model on masked blocks, and what the unigram law reaches on them.

    Args:
        model: Its mode is left as it was.
        source: Where the batches come from.
        batches: On the host.

    Raises:
        ValueError: There is no batch.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train(False)
    device = next(model.parameters()).device
    mlm: list[_Scores] = []
    sbo: list[_Scores] = []
    labels: list[Tensor] = []
    places: list[Tensor] = []
    blocks = tokens = 0
    for batch in batches:
        blocks, tokens = blocks + batch.num_sequences, tokens + batch.num_tokens
        scores = model.score_packed(batch.to(device))
        mlm.append(_Scores(scores.mlm_loss.double().cpu(), scores.mlm_correct.cpu()))
        sbo.append(_Scores(scores.sbo_loss.double().cpu(), scores.sbo_correct.cpu()))
        labels.append(batch.mlm_labels)
        places.append(_places(batch.sbo_cu))
    for module, mode in modes:  # a frozen encoder has a mode of its own
        module.training = mode
    if not blocks:
        raise ValueError(f"{source.path} has no blocks to evaluate on")
    trained = {"mlm", "sbo"} - set(model.config.untrained_heads)
    mlm_scores, sbo_scores = _join(mlm), _join(sbo)
    offsets, lengths = torch.cat(places, dim=1) if "sbo" in trained else torch.zeros(2, 0)
    return EvaluationResult(
        blocks=blocks,
        tokens=tokens,
        mlm_targets=len(mlm_scores.losses),
        mlm_loss=_mean(mlm_scores.losses) if "mlm" in trained else None,
        mlm_accuracy=_mean(mlm_scores.correct) if "mlm" in trained else None,
        sbo_targets=len(sbo_scores.losses),
        sbo_loss=_mean(sbo_scores.losses) if "sbo" in trained else None,
        sbo_accuracy=_mean(sbo_scores.correct) if "sbo" in trained else None,
        sbo_by_offset=_buckets(offsets, sbo_scores),
        sbo_by_span_length=_buckets(lengths, sbo_scores),
        baselines=unigram_baselines(source, torch.cat(labels)),
    )


def unigram_baselines(source: Source, targets: Tensor) -> Baselines:
    """What the token counts of the training split alone reach on these targets.

    One is added to every count, so that a piece the training split does not have costs something
    finite.

    Args:
        source: Gives the counts.
        targets: int64 [M] ids.
    """
    counts = source.token_counts().double()
    law = (counts + 1) / (counts + 1).sum()
    majority = int(counts.argmax())
    return Baselines(
        unigram_entropy=float(-(law * law.log()).sum()),
        unigram_cross_entropy=_mean(-law.log().index_select(0, targets)),
        majority_token=source.tokenizer.convert_ids_to_tokens(majority),
        majority_accuracy=_mean(targets == majority),
    )


def _places(sbo_cu: Tensor) -> Tensor:
    """[2, N]: offset in its span, and length of its span, of each target."""
    lengths = sbo_cu.diff().long()
    per_target = lengths.repeat_interleave(lengths)
    starts = sbo_cu[:-1].long().repeat_interleave(lengths)
    return torch.stack([torch.arange(len(per_target)) - starts, per_target])


def _join(scores: list[_Scores]) -> _Scores:
    return _Scores(
        torch.cat([score.losses for score in scores]),
        torch.cat([score.correct for score in scores]),
    )


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0


def _buckets(values: Tensor, scores: _Scores) -> tuple[Bucket, ...]:
    found = []
    for value in sorted(set(values.tolist())):
        rows = values == value
        found.append(
            Bucket(
                value=int(value),
                targets=int(rows.sum()),
                loss=_mean(scores.losses[rows]),
                accuracy=_mean(scores.correct[rows]),
            )
        )
    return tuple(found)
