"""The masking scheme `segments`: a model predicts spans, a period of steps masks them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import span_scores as oracle
from safetensors.torch import load_file

from spanbert_fast.batch import PackedBatch
from spanbert_fast.data.segments import BlockSpans
from spanbert_fast.train import pretrain, run
from spanbert_fast.train.checkpoint import CheckpointError, load_checkpoint
from spanbert_fast.train.events import CheckpointSaved, Evaluated, Event, Notice, Segmented
from spanbert_fast.train.fit_options import FitHeadsOptions
from spanbert_fast.train.machine import machine_settings, only_user
from spanbert_fast.train.metrics import read_metrics
from spanbert_fast.train.options import PretrainOptions, resolve
from spanbert_fast.train.run import Run
from spanbert_fast.train.segmenting import scoring_of

MakeOptions = Callable[..., PretrainOptions]
SEGMENTS: dict[str, Any] = {"scheme": "segments", "segment_every": 5, "eval_every": 12}
CHECKPOINTS = "checkpoints"


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def stop_at(step: int) -> Callable[[Event], None]:
    """Ends the run when the checkpoint of a step is on the disk."""

    def on_event(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == step:
            raise Interrupted

    return on_event


def assert_same_weights(first: Path, second: Path) -> None:
    left, right = (load_file(path / "model" / "model.safetensors") for path in (first, second))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@contextlib.contextmanager
def built(options: PretrainOptions) -> Any:
    """A run that stands before its next step."""
    settings, allow = resolve(options)
    with only_user(settings.output), machine_settings(1):
        found = run.build_run(settings, lambda _: None, allow_inexact_resume=allow)
        with contextlib.closing(found.log):
            yield found


@pytest.fixture(scope="module")
def finished(
    options: MakeOptions, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Event]]:
    """A run of 12 steps that nothing interrupted, and what it told."""
    output = tmp_path_factory.mktemp("segments") / "run"
    events: list[Event] = []
    pretrain.pretrain(options(output, **SEGMENTS), on_event=events.append)
    return output, events


def test_each_period_is_told(finished: tuple[Path, list[Event]]) -> None:
    output, events = finished
    told = [event for event in events if isinstance(event, Segmented)]
    assert [(event.step, event.last_step) for event in told] == [(1, 5), (6, 10), (11, 12)]
    lines = [line for line in read_metrics(output / "metrics.jsonl") if "blocks" in line]
    lines = [line for line in lines if line["kind"] == "segmentation"]
    assert [line["spans_per_block"] for line in lines] == [e.spans_per_block for e in told]
    for event in told:
        assert event.blocks >= 2
        assert 1 <= event.words_per_span <= 10
        assert event.seconds > 0
    # When the last period began, the checkpoints of the steps 4 and 8 needed the other two.
    kept = sorted(path.name for path in (output / "segments").iterdir())
    assert kept == ["step-0000000.arrow", "step-0000005.arrow", "step-0000010.arrow"]
    state = load_checkpoint(output / CHECKPOINTS / "step-0000008").state["spans"]
    spans = BlockSpans.read(output / "segments" / "step-0000005.arrow", state["sha256"])
    assert (state["begin"], state["end"], len(spans.rows)) == (5, 10, told[1].blocks)


def attention_map(model: Any, ids: torch.Tensor) -> np.ndarray:
    """Mean over heads and layers [S, S], computed whole."""
    maps = model.bert(ids[None], output_attentions=True).attentions
    return torch.stack([each[0].double().mean(0) for each in maps]).mean(0).numpy()


def test_spans_are_the_best_segmentation_of_the_model(options: MakeOptions, tmp_path: Path) -> None:
    """Every score from a whole attention map, word by word."""
    masking = {"max_span_words": 3, "geometric_p": 0.4}
    with built(options(tmp_path, **SEGMENTS, masking=masking)) as found:
        assert found.model.training
        steps = found.steps()
        next(steps)
        steps.close()
        assert found.model.training
        assert all(module.training for module in found.model.modules())
        state = found.periods.state
        spans = BlockSpans.read(tmp_path / "segments" / "step-0000000.arrow", state["sha256"])
        found.model.train(False)
        shards, starts = found.source.shards, word_flags(found)
        lengths = shards.lengths("train")[spans.rows]
        lengths_seen: set[int] = set()
        for row in spans.rows[np.argsort(lengths)][:12].tolist():
            ids = shards.gather("train", np.array([row])).values.astype(np.int64)
            words: list[list[int]] = []
            for place, token in enumerate(ids.tolist()):
                if place == 0 or starts[token]:
                    words.append([])
                words[-1].append(place + 1)
            cls, sep = (shards.manifest.special_token_ids[name] for name in ("cls", "sep"))
            with torch.no_grad():
                whole = attention_map(found.model, torch.tensor([cls, *ids.tolist(), sep]))
            z = oracle.standardised(oracle.word_attention(whole, words), 3)
            chosen = spans.gather(np.array([row]))[0].tolist()
            ends = {word[-1]: index + 1 for index, word in enumerate(words)}
            cut = [ends[end] for _, end in chosen]
            assert [begin for begin, _ in chosen] == [words[i][0] - 1 for i in [0, *cut[:-1]]]
            found_score = sum(
                oracle.span_score(z, begin, end - begin, 1.0, 0.4)
                for begin, end in pairwise([0, *cut])
            )
            best = [0.0]
            for end in range(1, len(words) + 1):
                sizes = range(1, min(3, end) + 1)
                best.append(
                    max(best[end - n] + oracle.span_score(z, end - n, n, 1.0, 0.4) for n in sizes)
                )
            assert cut[-1] == len(words)
            assert found_score == pytest.approx(best[-1], abs=1e-3)
            lengths_seen |= {end - begin for begin, end in pairwise([0, *cut])}
        assert lengths_seen >= {1, 3}


def word_flags(found: Run) -> Any:
    from spanbert_fast.data.tokenizer import word_starts

    return word_starts(found.source.tokenizer)


def labels(batches: list[PackedBatch]) -> dict[int, list[int]]:
    """Masked positions of each block, counted in the block."""
    result: dict[int, list[int]] = {}
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        for index, row in enumerate(batch.sequence_ids.tolist()):
            begin, end = bounds[index : index + 2]
            inside = (batch.mlm_positions >= begin) & (batch.mlm_positions < end)
            result[row] = (batch.mlm_positions[inside] - begin - 1).tolist()
    return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masks_are_predicted_spans_however_a_step_is_split(
    precision: str, options: MakeOptions, tmp_path: Path
) -> None:
    seen = []
    for parts in (1, 3):
        output = tmp_path / str(parts)
        given = options(output, **SEGMENTS, micro_batches=parts, precision=precision)
        with built(given) as found:
            steps = found.steps()
            first = [labels(next(steps).micro_batches) for _ in range(3)]
            steps.close()
            digest = found.periods.state["sha256"]
            seen.append((first, digest))
    assert seen[0] == seen[1]
    spans = BlockSpans.read(tmp_path / "1" / "segments" / "step-0000000.arrow", seen[0][1])
    for row, masked in (item for step in seen[0][0] for item in step.items()):
        budget = len(masked)
        own = [set(range(*span)) for span in spans.gather(np.array([row]))[0].tolist()]
        touched = [span for span in own if span & set(masked)]
        # All are whole but the one that spends the budget.
        assert sum(not span <= set(masked) for span in touched) <= 1
        assert sum(len(span & set(masked)) for span in touched) == budget


def test_resumed_in_the_middle_of_a_period(
    finished: tuple[Path, list[Event]], options: MakeOptions, tmp_path: Path
) -> None:
    changes = SEGMENTS | {"save_every": 2}
    whole = finished[0]
    parts = tmp_path / "parts"
    for step in (4, 8, 10):  # in the middle, in the middle, and where a period begins
        with pytest.raises(Interrupted):
            pretrain.pretrain(options(parts, **changes), on_event=stop_at(step))
    events: list[Event] = []
    pretrain.pretrain(options(parts, **changes), on_event=events.append)
    assert [event.step for event in events if isinstance(event, Segmented)] == [11]
    assert_same_weights(whole, parts)
    first, second = (read_metrics(path / "metrics.jsonl") for path in (whole, parts))
    keys = ("kind", "step", "loss", "mlm_loss", "spans_per_block", "words_per_span", "tokens")
    assert [[line.get(key) for key in keys] for line in first] == [
        [line.get(key) for key in keys] for line in second
    ]


def test_killed_after_a_newer_period_was_predicted(
    finished: tuple[Path, list[Event]], options: MakeOptions, tmp_path: Path
) -> None:
    """The last checkpoint is older than the spans in use: those of its own period are needed."""

    def kill(event: Event) -> None:
        if isinstance(event, Segmented) and event.step == 11:
            raise Interrupted

    with pytest.raises(Interrupted):
        pretrain.pretrain(options(tmp_path, **SEGMENTS), on_event=kill)
    names = sorted(path.name for path in (tmp_path / "segments").iterdir())
    assert names == ["step-0000000.arrow", "step-0000005.arrow", "step-0000010.arrow"]
    assert (tmp_path / CHECKPOINTS / "step-0000008").is_dir()
    pretrain.pretrain(options(tmp_path, **SEGMENTS))
    assert_same_weights(finished[0], tmp_path)


@pytest.mark.parametrize("damage", ["missing", "flipped", "unnamed"])
def test_lost_spans_end_a_run_unless_it_may_differ(
    damage: str, finished: tuple[Path, list[Event]], options: MakeOptions, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    shutil.rmtree(output / CHECKPOINTS / "step-0000012")
    path = output / "segments" / "step-0000005.arrow"
    given = dict(SEGMENTS)
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        given["segment_every"] = 3
        given["allow_inexact_resume"] = True
    if damage != "unnamed":
        with pytest.raises(CheckpointError, match=r"step-0000005\.arrow .*--allow-inexact-resume"):
            pretrain.pretrain(options(output, **given))
        given["allow_inexact_resume"] = True
    events: list[Event] = []
    pretrain.pretrain(options(output, **given), on_event=events.append)
    told = [(event.step, event.last_step) for event in events if isinstance(event, Segmented)]
    assert told == ([(9, 10), (11, 12)] if damage != "unnamed" else [(9, 9), (10, 12)])
    assert any(isinstance(event, Notice) and "not exact" in event.text for event in events)


def test_evaluation_keeps_its_random_masks(
    finished: tuple[Path, list[Event]], options: MakeOptions, tmp_path: Path
) -> None:
    given = options(tmp_path, eval_every=12)
    events: list[Event] = []
    pretrain.pretrain(given, on_event=events.append)
    (random,), (segments,) = (
        [event.result for event in told if isinstance(event, Evaluated)]
        for told in (events, finished[1])
    )
    assert random.baselines == segments.baselines
    assert random.mlm_targets == segments.mlm_targets
    assert random.mlm_loss != segments.mlm_loss


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "segments"}, "segment_every must be given with the scheme 'segments'"),
        ({"scheme": "segments", "segment_every": 0}, "segment_every must be .* least 1, got 0"),
        ({"scheme": "segments", "segment_every": True}, "segment_every must be .*, got True"),
        ({"segment_every": 5}, "segment_every is 5, but the scheme is 'spanbert'"),
        ({"scheme": "token", "segment_every": 5}, "segment_every is 5, but the scheme is 'token'"),
        (
            {"scheme": "segments", "segment_every": 5, "masking": {"min_span_words": 2}},
            "min_span_words is 2, must be 1 with the scheme 'segments'",
        ),
        (
            {"scheme": "segments", "masking": {"scheme": "token"}},
            "scheme is 'segments' and masking scheme is 'token'; give one of them",
        ),
    ],
)
def test_mistakes_are_named(
    changes: dict[str, Any], message: str, options: MakeOptions, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(options(tmp_path, **changes))


def test_a_frozen_encoder_predicts_nothing_new(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be another one where the encoder is frozen"):
        FitHeadsOptions(init="x", data=tmp_path, output=tmp_path, masking={"scheme": "segments"})


def test_shards_whose_words_nobody_knows_are_refused(
    options: MakeOptions, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_tokenizer: Any) -> None:
        raise ValueError("cannot tell where words start for a tokenizer of type Unigram")

    monkeypatch.setattr("spanbert_fast.train.source.word_starts", refuse)
    with pytest.raises(ValueError, match="cannot tell where words start"):
        pretrain.pretrain(options(tmp_path, **SEGMENTS))


def test_the_scheme_may_stand_in_a_file_and_in_the_table(
    options: MakeOptions, tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('scheme = "segments"\nsegment_every = 7\n[masking]\nmax_span_words = 4\n')
    settings = resolve(options(tmp_path, config=config))[0]
    assert settings.masking == {"scheme": "segments", "max_span_words": 4}
    assert settings.segment_every == 7
    scoring = scoring_of(settings.masking)
    assert (scoring.max_words, scoring.stop_probability) == (4, 0.2)
    assert resolve(options(tmp_path, masking={"scheme": "segments"}, segment_every=3))[0].masking
    json.dumps(settings.as_json())
