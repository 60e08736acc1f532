"""The whole loop on a small corpus: what it writes, how it continues, how it stops."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

import spanbert_fast as sf
from spanbert_fast.model.positions import extended_table
from spanbert_fast.train import checkpoint, pretrain, run
from spanbert_fast.train.events import (
    CheckpointRefused,
    CheckpointSaved,
    Evaluated,
    Event,
    ExamplesReady,
    Notice,
    Progress,
    RunFinished,
    RunStarted,
)
from spanbert_fast.train.finiteness import NonFiniteError
from spanbert_fast.train.machine import machine_settings, only_user
from spanbert_fast.train.metrics import read_metrics
from spanbert_fast.train.options import PretrainOptions, resolve

MakeOptions = Callable[..., PretrainOptions]


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def stop_after(step: int) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == step:
            raise Interrupted

    return on_event


@pytest.fixture(scope="module")
def finished(
    options: MakeOptions, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Event]]:
    """A run that nothing interrupted, and what it told."""
    output = tmp_path_factory.mktemp("finished") / "run"
    events: list[Event] = []
    pretrain.pretrain(options(output), on_event=events.append)
    return output, events


def test_run_tells_what_it_does(finished: tuple[Path, list[Event]]) -> None:
    output, events = finished
    assert isinstance(events[0], RunStarted)
    assert events[0].resumed_from is None
    assert [e.step for e in events if isinstance(e, Progress)] == [2, 4, 6, 8, 10, 12]
    assert [e.step for e in events if isinstance(e, Evaluated)] == [4, 8, 12]
    assert [e.step for e in events if isinstance(e, CheckpointSaved)] == [4, 8, 12]
    assert isinstance(events[-2], ExamplesReady)
    assert isinstance(events[-1], RunFinished)
    summary = events[-1].summary
    assert (summary.output, summary.model) == (output, output / "model")
    assert summary.evaluation is not None
    progress = [e for e in events if isinstance(e, Progress)]
    assert progress[-1].mlm_loss < progress[0].mlm_loss - 0.3
    assert [e.learning_rate for e in progress] == pytest.approx(
        [1e-2 * share for share in (1.0, 0.9, 0.7, 0.5, 0.3, 0.1)]
    )
    assert progress[-1].tokens == summary.tokens


def test_run_leaves_what_it_promises(finished: tuple[Path, list[Event]]) -> None:
    output, events = finished
    lines = read_metrics(output / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("evaluation" if isinstance(e, Evaluated) else "train", e.step)
        for e in events
        if isinstance(e, Progress | Evaluated)
    ]
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((output / "tensorboard").iterdir())
    kept = checkpoint.list_checkpoints(output / "checkpoints")
    assert [path.name for path in kept] == ["step-0000008", "step-0000012"]
    description = json.loads((output / "run.json").read_text())
    assert description["settings"]["learning_rate"] == 1e-2
    assert description["environment"]["torch"] == torch.__version__
    examples = json.loads((output / "examples.json").read_text())
    (shown,) = [e.examples for e in events if isinstance(e, ExamplesReady)]
    assert [example["truth"] for example in examples] == [example.truth for example in shown]
    assert examples
    assert all(set(e) == {"left", "right", "truth", "mlm", "sbo"} for e in examples)


def test_model_loads_here_and_in_plain_transformers(finished: tuple[Path, list[Event]]) -> None:
    folder = finished[0] / "model"
    ours = sf.Model.from_pretrained(folder)
    assert ours.config.untrained_heads == []
    theirs = BertForMaskedLM.from_pretrained(folder)
    ids = torch.tensor([[2, 30, 4, 31, 3]])
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlanguage: en\nlibrary_name: spanbert_fast\n")
    assert "license" not in card.partition("---\n\n")[0]
    assert "shards SHA-256" in card
    assert "unigram law on the same targets" in card


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_run_equals_an_uninterrupted_one(
    precision: str,
    finished: tuple[Path, list[Event]],
    options: MakeOptions,
    tmp_path: Path,
) -> None:
    whole = finished[0]
    if precision != "fp32":
        whole = tmp_path / "whole"
        pretrain.pretrain(options(whole, precision=precision, eval_every=0))
        assert all(tensor.isfinite().all() for tensor in weights(whole).values())
    parts = tmp_path / "parts"
    changes = {"precision": precision} | ({} if precision == "fp32" else {"eval_every": 0})
    for step in (4, 8):
        with pytest.raises(Interrupted):
            pretrain.pretrain(options(parts, **changes), on_event=stop_after(step))
    events: list[Event] = []
    pretrain.pretrain(options(parts, **changes), on_event=events.append)
    assert isinstance(events[0], RunStarted)
    assert events[0].resumed_from == parts / "checkpoints" / "step-0000008"
    assert_same_weights(whole, parts)
    keys = ("kind", "step", "loss", "mlm_loss", "sbo_loss", "tokens", "learning_rate")
    first, second = (
        [{key: line.get(key) for key in keys} for line in read_metrics(path / "metrics.jsonl")]
        for path in (whole, parts)
    )
    assert first == second


def test_a_finished_run_started_again_changes_nothing(
    finished: tuple[Path, list[Event]], options: MakeOptions, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    events: list[Event] = []
    summary = pretrain.pretrain(options(output), on_event=events.append)
    assert not [e for e in events if isinstance(e, Progress | CheckpointSaved)]
    assert_same_weights(finished[0], output)
    assert read_metrics(output / "metrics.jsonl") == read_metrics(finished[0] / "metrics.jsonl")
    last = [e for e in finished[1] if isinstance(e, Evaluated)][-1]
    assert summary.evaluation == last.result


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_newest_checkpoint_is_refused_and_the_one_before_used(
    damage: str, finished: tuple[Path, list[Event]], options: MakeOptions, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    file = output / "checkpoints" / "step-0000012" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data[:-1] if damage == "truncated" else data)
    events: list[Event] = []
    pretrain.pretrain(options(output), on_event=events.append)
    (refused,) = [e for e in events if isinstance(e, CheckpointRefused)]
    assert refused.path == file.parent
    assert "optimizer.safetensors" in refused.reason
    (started,) = [e for e in events if isinstance(e, RunStarted)]
    assert started.start_step == 8
    assert_same_weights(finished[0], output)
    checkpoint.verify_checkpoint(file.parent)


def test_a_full_disk_stops_the_run_and_leaves_the_old_checkpoint(
    options: MakeOptions,
    finished: tuple[Path, list[Event]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "run"

    def fill_disk(event: Event) -> None:
        if isinstance(event, CheckpointSaved):

            def refuse(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(checkpoint, "save_file", refuse)

    with pytest.raises(OSError, match="No space left"):
        pretrain.pretrain(options(output), on_event=fill_disk)
    names = [path.name for path in (output / "checkpoints").iterdir()]
    assert names == ["step-0000004"]
    monkeypatch.undo()
    pretrain.pretrain(options(output))
    assert_same_weights(finished[0], output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 2}, "threads was 1, is 2"),
        ({"learning_rate": 2e-2}, "learning_rate was 0.01, is 0.02"),
        ({"precision": "bf16"}, "precision was 'fp32', is 'bf16'"),
        ({"masking": {"mask_ratio": 0.2}}, "masking was {}, is {'mask_ratio': 0.2}"),
    ],
)
def test_an_inexact_resume_is_refused_unless_allowed(
    changes: dict[str, Any],
    message: str,
    finished: tuple[Path, list[Event]],
    options: MakeOptions,
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    with pytest.raises(ValueError, match=r"not exact: .*--allow-inexact-resume") as caught:
        pretrain.pretrain(options(output, **changes))
    assert message in str(caught.value)
    events: list[Event] = []
    pretrain.pretrain(options(output, allow_inexact_resume=True, **changes), on_event=events.append)
    assert any(isinstance(event, Notice) and message in event.text for event in events)


def test_another_torch_version_makes_a_resume_inexact(
    finished: tuple[Path, list[Event]],
    options: MakeOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"torch was '2\..*', is '9\.9\.9'"):
        pretrain.pretrain(options(output))


def gradients(options: PretrainOptions, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of the first step."""
    settings = resolve(options)[0]
    with only_user(settings.output), machine_settings(1):
        built = run.build_run(settings, lambda _: None, allow_inexact_resume=False)
        built.log.close()
        built.model.to(dtype)
        steps = built.steps()
        # Any step but the small one that an epoch has.
        step = next(step for step in steps if len(step.example_ids) >= 4)
        steps.close()
        for batch in step.micro_batches:
            pretrain._learn(built, step, batch, pretrain.dropout_seed(0, 0))
        assert len(step.micro_batches) == settings.micro_batches
    named = built.model.named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_accumulation_does_not_change_the_gradient(
    dtype: torch.dtype, tolerance: float, options: MakeOptions, tmp_path: Path
) -> None:
    whole = gradients(options(tmp_path / "1", micro_batches=1), dtype)
    parts = gradients(options(tmp_path / "4", micro_batches=4), dtype)
    assert whole.keys() == parts.keys()
    for name, expected in whole.items():
        error = (expected - parts[name]).norm() / expected.norm().clamp(min=1e-6)
        assert error < tolerance, name


def test_activation_checkpointing_does_not_change_the_gradient(
    options: MakeOptions, tmp_path: Path
) -> None:
    plain = gradients(options(tmp_path / "1"), torch.float32)
    saving = gradients(options(tmp_path / "2", activation_checkpointing=True), torch.float32)
    assert all(torch.equal(plain[name], saving[name]) for name in plain)


def test_dropout_seeds_are_a_function_of_seed_and_step() -> None:
    seeds = {int(pretrain.dropout_seed(seed, step)) for seed in range(20) for step in range(200)}
    assert len(seeds) == 4_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert pretrain.dropout_seed(3, 5).dtype == torch.int64
    assert pretrain.dropout_seed(3, 5).equal(pretrain.dropout_seed(3, 5))


class Spoiler:
    """Keeps the run that `pretrain` builds, and spoils it when an event comes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[run.Run], None]) -> None:
        self.run: run.Run | None = None
        self.spoil = spoil
        build = run.build_run

        def keep(*args: Any, **kwargs: Any) -> run.Run:
            self.run = build(*args, **kwargs)
            return self.run

        monkeypatch.setattr(pretrain, "build_run", keep)

    def __call__(self, event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == 8:
            assert self.run is not None
            self.spoil(self.run)


SPOILED = "bert.encoder.layer.0.output.dense.weight"


def put_nan(spoiled: run.Run) -> None:
    with torch.no_grad():
        spoiled.model.get_parameter(SPOILED)[3, 5] = math.nan


def make_loss_infinite(spoiled: run.Run) -> None:
    forward = spoiled.forward

    def infinite(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.loss = output.loss * math.inf
        return output

    spoiled.forward = infinite


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("spoil", [put_nan, make_loss_infinite])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(
    spoil: Callable[[run.Run], None],
    precision: str,
    options: MakeOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoiler = Spoiler(monkeypatch, spoil)
    output = tmp_path / "run"
    with pytest.raises(NonFiniteError, match="step 9: the loss is not finite") as caught:
        pretrain.pretrain(options(output, precision=precision), on_event=spoiler)
    assert caught.value.example_ids
    failure = json.loads((output / "failure.json").read_text())
    assert (failure["step"], failure["example_ids"]) == (9, list(caught.value.example_ids))
    saved = checkpoint.load_checkpoint(output / "checkpoints" / "step-0000008")
    assert spoiler.run is not None
    now = spoiler.run.checkpoint_content()
    for name, tensor in (saved.weights | saved.optimizer).items():
        changed = (now["weights"] | now["optimizer"])[name] != tensor
        assert changed.sum() == (name == SPOILED and spoil is put_nan)
    assert json.dumps(read_metrics(output / "metrics.jsonl")).count("NaN") == 0


def test_a_loss_that_is_infinite_in_one_micro_batch_names_its_blocks(
    options: MakeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def spoil(spoiled: run.Run) -> None:
        forward = spoiled.forward

        def infinite(batch: Any, **kwargs: Any) -> Any:
            output = forward(batch, **kwargs)
            seen.append(batch.sequence_ids.tolist())
            if len(seen) == 2:
                output.loss = output.loss + math.inf
            return output

        spoiled.forward = infinite

    with pytest.raises(NonFiniteError) as caught:
        pretrain.pretrain(options(tmp_path, micro_batches=3), on_event=Spoiler(monkeypatch, spoil))
    assert caught.value.step == 9
    assert list(caught.value.example_ids) == seen[1]


def test_two_processes_cannot_use_one_folder(options: MakeOptions, tmp_path: Path) -> None:
    with only_user(tmp_path), pytest.raises(ValueError, match="in use by another process"):
        pretrain.pretrain(options(tmp_path))


def test_unknown_model_fields_are_refused(options: MakeOptions, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model has no field 'layers'; known are .*hidden_size"):
        pretrain.pretrain(options(tmp_path, model={"layers": 2}))


def test_a_model_that_is_too_short_is_refused(options: MakeOptions, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sequences of 32 tokens, the model has 16 positions"):
        pretrain.pretrain(options(tmp_path, model={"max_position_embeddings": 16}))


def test_shards_of_another_length_are_refused(options: MakeOptions, tmp_path: Path) -> None:
    message = r"seq_length is 4096, .*shards was prepared with 32: .*--seq-length 4096"
    with pytest.raises(ValueError, match=message):
        pretrain.pretrain(options(tmp_path, seq_length=4096))


def test_a_run_with_an_attention_window_resumes_to_the_bit(
    options: MakeOptions, tmp_path: Path
) -> None:
    chosen = {"attention_window": 4, "seq_length": 32, "eval_every": 0, "steps": 6}
    dropout = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
    chosen |= {"save_every": 2, "model": dropout, "warmup_steps": 1}
    pretrain.pretrain(options(tmp_path / "whole", **chosen))
    with pytest.raises(Interrupted):
        pretrain.pretrain(options(tmp_path / "parts", **chosen), on_event=stop_after(2))
    pretrain.pretrain(options(tmp_path / "parts", **chosen))
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    config = json.loads((tmp_path / "parts" / "model" / "config.json").read_text())
    assert config["attention_window"] == 4
    with pytest.raises(ValueError, match=r"not exact: .*--allow-inexact-resume"):
        pretrain.pretrain(options(tmp_path / "parts", **chosen | {"attention_window": 5}))


@pytest.fixture
def bert_folder(shards: Path, tmp_path: Path) -> Path:
    """A plain Hugging Face BERT on the vocabulary of the shards."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(sf_tokenizer(shards)),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    folder = tmp_path / "spanbert-like"
    BertForMaskedLM(config).save_pretrained(folder)
    sf_tokenizer(shards).save_pretrained(folder)
    return folder


def sf_tokenizer(shards: Path) -> Any:
    from spanbert_fast.data.tokenizer import load_tokenizer

    return load_tokenizer(shards / "tokenizer")


def test_a_run_continues_from_a_bert_folder(
    options: MakeOptions, bert_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    given = options(output, init=str(bert_folder), model={}, eval_every=0, learning_rate=1e-9)
    with pytest.warns(UserWarning, match="no complete SBO head"):
        pretrain.pretrain(given)
    model = sf.Model.from_pretrained(output / "model")
    assert model.config.untrained_heads == []
    before = load_file(bert_folder / "model.safetensors")["bert.embeddings.LayerNorm.weight"]
    torch.testing.assert_close(model.bert.embeddings.LayerNorm.weight.detach(), before)
    card = (output / "model" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert "stay CC-BY-NC 4.0" in card


@pytest.mark.filterwarnings("ignore:.*has no complete SBO head")
def test_a_run_continues_from_a_longer_position_table(
    options: MakeOptions, bert_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    longer = {"max_position_embeddings": 64, "position_extension": "interpolate"}
    given = options(output, init=str(bert_folder), model=longer, steps=8, learning_rate=1e-9)
    with pytest.raises(Interrupted):
        pretrain.pretrain(given, on_event=stop_after(4))
    pretrain.pretrain(given)
    name = "bert.embeddings.position_embeddings.weight"
    table = load_file(bert_folder / "model.safetensors")[name]
    found = weights(output)[name]
    torch.testing.assert_close(found, extended_table(table, 64, "interpolate"))
    # What is written is a model of 64 positions, which another run takes as it is.
    again = options(tmp_path / "again", init=str(output / "model"), model={}, steps=8)
    pretrain.pretrain(again)
    assert (
        sf.Model.from_pretrained(tmp_path / "again" / "model").config.max_position_embeddings == 64
    )


def test_the_position_table_of_a_new_model_has_no_extension(
    options: MakeOptions, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="model has no field 'position_extension'"):
        pretrain.pretrain(options(tmp_path, model={"position_extension": "tile"}))


def test_foreign_weights_of_another_vocabulary_are_refused(
    options: MakeOptions, bert_folder: Path, tmp_path: Path, shards: Path
) -> None:
    words = sorted(sf_tokenizer(shards).get_vocab().items(), key=lambda item: -item[1])
    (bert_folder / "tokenizer.json").unlink()
    (bert_folder / "vocab.txt").write_text("\n".join(word for word, _ in words) + "\n")
    with (
        pytest.warns(UserWarning, match="no complete SBO head"),
        pytest.raises(ValueError, match="another vocabulary"),
    ):
        pretrain.pretrain(options(tmp_path / "run", init=str(bert_folder), model={}))


def test_a_card_hands_the_licence_on(tmp_path: Path) -> None:
    from spanbert_fast.train.model_card import inherited_licence

    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert inherited_licence(str(tmp_path)) == "cc-by-nc-4.0"
    assert inherited_licence(None) is None
    assert inherited_licence("SpanBERT/spanbert-base-cased") == "cc-by-nc-4.0"
    assert inherited_licence("google-bert/bert-base-cased") == "other"


def test_output_biases_may_begin_at_the_unigram_law(options: MakeOptions, tmp_path: Path) -> None:
    given = options(tmp_path, unigram_bias=True, steps=2, warmup_steps=1, learning_rate=1e-12)
    summary = pretrain.pretrain(given)
    plain = pretrain.pretrain(
        options(
            tmp_path / "plain", unigram_bias=False, steps=2, warmup_steps=1, learning_rate=1e-12
        )
    )
    assert summary.evaluation is not None
    assert plain.evaluation is not None
    baseline = summary.evaluation.baselines.unigram_cross_entropy
    assert summary.evaluation.mlm_loss == pytest.approx(baseline, abs=0.1)
    assert summary.evaluation.sbo_loss == pytest.approx(baseline, abs=0.2)
    vocabulary = sf.Config.from_pretrained(plain.model).vocab_size
    assert plain.evaluation.mlm_loss == pytest.approx(math.log(vocabulary), abs=0.1)
