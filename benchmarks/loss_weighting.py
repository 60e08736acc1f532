"""Does weighting by sequence length teach what only long documents show? A synthetic corpus.

64 words stand in a grid. A short document draws all of its words from one row, a long one from one
column, and long documents are rare: what is learned from rows is wrong for columns. Runs that
differ in nothing but the weights are evaluated on held-out documents every few steps, unweighted.
Who knows the row or column pays ln 8 = 2.08 nats for a hidden word (a tenth of the masked words
stay visible and may cost less), who knows nothing but the 64 words ln 64 = 4.16.

    python benchmarks/loss_weighting.py --output FOLDER [--picture docs/loss_weighting.png]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import load_file

from spanbert_fast.config import Config
from spanbert_fast.data.options import PrepareOptions
from spanbert_fast.data.prepare import prepare
from spanbert_fast.model.pretrained import Model
from spanbert_fast.train.events import CheckpointSaved, Event
from spanbert_fast.train.options import PretrainOptions
from spanbert_fast.train.pretrain import pretrain
from spanbert_fast.train.source import open_source

SIDE, SEQ_LENGTH = 8, 64
LENGTHS = {"short": 8, "long": 60}
"""Words of a document."""
KINDS = tuple(LENGTHS)
WEIGHTS: dict[str, dict[str, float]] = {
    "weight 1": {},
    "length ^ 1": {"sequence_length": 1.0},
}
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "span_position_embedding_size": 16,
}
History = list[dict[str, float]]
"""One entry for each evaluation: the step, and the mean loss of both kinds of documents."""


def write_corpus(path: Path, num_short: int, num_long: int) -> None:
    """Documents as JSON lines, short and long ones mixed."""
    generator = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = [a + b for a, b in zip(syllables * 2, syllables[7:] + syllables[11:], strict=False)]
    grid = [words[start : start + SIDE] for start in range(0, SIDE * SIDE, SIDE)]
    topics = {"short": grid, "long": list(zip(*grid, strict=True))}
    kinds = ["short"] * num_short + ["long"] * num_long
    generator.shuffle(kinds)
    with path.open("w") as file:
        for kind in kinds:
            topic = generator.choice(topics[kind])
            text = " ".join(generator.choices(topic, k=LENGTHS[kind]))
            file.write(json.dumps({"text": text}) + "\n")


def held_out_losses(source: Any, model: Model) -> dict[str, float]:
    """Mean MLM loss of the held-out targets in short and in long documents."""
    losses: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    with torch.no_grad():
        for batch in source.evaluation_batches("validation", max_span_targets=15):
            sequence = torch.searchsorted(batch.cu_seqlens, batch.mlm_positions, right=True) - 1
            is_long = batch.cu_seqlens.diff()[sequence] > SEQ_LENGTH // 2
            scores = model.score_packed(batch).mlm_loss
            for kind, rows in (("long", is_long), ("short", ~is_long)):
                losses[kind].append(scores[rows])
    return {kind: float(torch.cat(found).mean()) for kind, found in losses.items()}


def run(
    data: Path, output: Path, seed: int, weighting: dict[str, float], options: argparse.Namespace
) -> History:
    """The held-out losses of one run."""
    source, history = open_source(data), []
    model = Model(
        Config.preset(
            "tiny",
            vocab_size=source.shards.manifest.vocab_size,
            max_position_embeddings=SEQ_LENGTH,
            **SHAPE,
        )
    ).eval()

    def evaluate(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            model.load_state_dict(load_file(event.path / "model.safetensors"), strict=False)
            history.append({"step": event.step, **held_out_losses(source, model)})

    pretrain(
        PretrainOptions(
            data=data,
            output=output,
            seed=seed,
            steps=options.steps,
            warmup_steps=min(100, options.steps - 1),
            global_batch_tokens=512,
            learning_rate=2e-3,
            clip_norm=options.clip_norm,
            eval_every=0,
            save_every=options.every,
            log_every=options.every,
            threads=1,
            device="cpu",
            precision="fp32",
            model=SHAPE,
            weighting=weighting,
        ),
        on_event=evaluate,
    )
    return history


def steps_to(history: History, kind: str, loss: float) -> float:
    """The first step at which the loss was reached; infinite if it never was."""
    return next((entry["step"] for entry in history if entry[kind] <= loss), float("inf"))


def draw(histories: dict[str, list[History]], path: Path) -> None:
    """One panel for each kind of documents, one line for each run."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, kind in zip(figure.subplots(1, 2, sharey=True), reversed(KINDS), strict=True):
        for color, (name, runs) in zip(("#DD8452", "#4C72B0"), histories.items(), strict=True):
            for number, history in enumerate(runs):
                axis.plot(
                    [entry["step"] for entry in history],
                    [entry[kind] for entry in history],
                    color=color,
                    label=None if number else name,
                    linewidth=1.2,
                )
        axis.set(title=f"{kind} documents, held out", xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.axes[0].set_ylabel("MLM loss, unweighted, nats")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="an empty folder")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=40, help="steps between evaluations")
    parser.add_argument("--clip-norm", type=float, default=100.0, help="100: no clipping")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--short", type=int, default=20_000, help="short documents")
    parser.add_argument("--long", type=int, default=300, help="long documents")
    parser.add_argument("--loss", type=float, default=3.0, help="time to this loss is reported")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    text, data = options.output / "text.jsonl", options.output / "shards"
    write_corpus(text, options.short, options.long)
    prepare(
        PrepareOptions(
            input=(str(text),),
            output=data,
            train_tokenizer=True,
            vocab_size=300,
            seq_length=SEQ_LENGTH,
            validation_permille=60,
            workers=1,
        )
    )
    lengths = open_source(data).shards.lengths("train")
    share = lengths[lengths > SEQ_LENGTH // 2].sum() / lengths.sum()
    print(f"{share:.1%} of the training pieces stand in long documents")
    histories: dict[str, list[History]] = {name: [] for name in WEIGHTS}
    for seed in range(options.seeds):
        for number, (name, weighting) in enumerate(WEIGHTS.items()):
            folder = options.output / f"run-{seed}-{number}"
            histories[name].append(run(data, folder, seed, weighting, options))
    (options.output / "histories.json").write_text(json.dumps(histories))
    for name, runs in histories.items():
        for kind in KINDS:
            reached = [steps_to(history, kind, options.loss) for history in runs]
            last = statistics.mean(history[-1][kind] for history in runs)
            print(
                f"{name}, {kind}: loss {options.loss:g} at step "
                f"{', '.join(f'{step:g}' for step in reached)}; last loss {last:.3f}"
            )
    if options.picture:
        draw(histories, options.picture)


if __name__ == "__main__":
    main()
