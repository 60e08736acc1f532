"""The paper's ablation in small: token, whole-word and geometric masks, and the SBO on top.

Four arms are pre-trained on one text with equal steps, tokens, order and, for each seed, equal
weights at the beginning, and are measured alike on text that was held out: MLM loss under the
masks of every arm, whole spans filled in, and a span task after a short fine-tuning. One line of
results.jsonl is one arm of one seed; what stands there is not computed again.

    python examples/ablation --output ablation_output
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Arm, Budget, prepare, pretrain
from recovery import SpanQuiz, forget_context, held_out_blocks, masked_losses, unigram_law
from span_task import fine_tune, read_task
from summary import draw, write_table
from transformers import AutoTokenizer

import spanbert_fast as sf

HERE = Path(__file__).resolve().parent
CORPUS = HERE.parent / "state_of_the_union.jsonl.zst"
UNTRAINED = "no pre-training"
"""The reference: random weights in the span tasks, the unigram law in all else."""
_LEAST = {
    "vocab_size": 100,
    "seq_length": 16,
    "validation_permille": 1,
    "steps": 30,
    "batch_tokens": 16,
    "layers": 1,
    "hidden_size": 4,
    "threads": 1,
    "eval_blocks": 1,
    "task_sentences": 8,
    "task_epochs": 1,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked.

    Raises:
        SystemExit: One of them is wrong; the message says what is allowed.
    """
    parser = argparse.ArgumentParser(
        prog="ablation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("ablation_output"), help="folder; goes on if it stands")
    add("--corpus", type=Path, nargs="+", default=[CORPUS], help="what `prepare --input` takes")
    add("--text-column", default="text", help="of JSON lines or Parquet")
    add(
        "--spans",
        type=Path,
        nargs="+",
        action="append",
        default=[],
        help="CoNLL file or folder for a span task, or two: train and test; may be repeated",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--vocab-size", type=int, default=4_000)
    add("--seq-length", type=int, default=128)
    add("--validation-permille", type=int, default=50, help="thousandths of the documents")
    add("--steps", type=int, default=6_000)
    add("--batch-tokens", type=int, default=512, help="real tokens per step")
    add("--layers", type=int, default=1)
    add("--hidden-size", type=int, default=128)
    add("--learning-rate", type=float, default=2e-3)
    add("--threads", type=int, default=1)
    add("--eval-blocks", type=int, default=1_000, help="held-out blocks to measure on")
    add("--task-sentences", type=int, default=2_000, help="to learn a span task from, at most")
    add("--task-epochs", type=int, default=3)
    options = parser.parse_args(arguments)
    for name, least in _LEAST.items():
        if (value := getattr(options, name)) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds must be different numbers from 0, got {options.seeds}")
    if not 0 < options.learning_rate < 1:
        parser.error(f"--learning-rate must be in (0, 1), got {options.learning_rate}")
    for path in [*options.corpus, *(path for own in options.spans for path in own)]:
        if not path.exists():
            parser.error(f"{path} does not exist")
    if any(len(own) > 2 for own in options.spans):
        parser.error("--spans takes one path, or two: train and test")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs what has no result yet, then draws table and picture; the exit status."""
    options = parse(arguments)
    try:
        results = run(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(write_table(results, options.output / "summary.md"))
    draw(results, options.output / "ablation.png")
    print(f"results.jsonl, summary.md and ablation.png are in {options.output}")
    return 0


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of all arms and seeds, those that stood before among them."""
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    check_settings(options, output / "settings.json")
    torch.set_num_threads(options.threads)
    data = output / "data"
    prepare(
        options.corpus,
        options.text_column,
        data,
        vocab_size=options.vocab_size,
        seq_length=options.seq_length,
        validation_permille=options.validation_permille,
    )
    budget = Budget(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Budget)})
    examiner = Examiner(options, data)
    results = read_results(output / "results.jsonl")
    done = {(line["arm"], line["seed"]) for line in results}
    # Seed by seed, so that a run that is stopped leaves whole comparisons.
    for seed in options.seeds:
        for name in [*ARMS, UNTRAINED]:
            if (name, seed) in done:
                continue
            print(f"\n=== {name}, seed {seed}", flush=True)
            begun = time.process_time()
            folder = output / "runs" / f"{name.replace(' ', '_')}-{seed}"
            line: dict[str, Any] = {"arm": name, "seed": seed}
            if name == UNTRAINED:
                config = sf.Config.from_pretrained(output / "runs" / f"token-{seed}" / "model")
                line |= examiner.measure_untrained(config, seed)
            else:
                line["tokens"] = pretrain(ARMS[name], seed, budget, data, folder)["tokens"]
                line |= examiner.measure(folder / "model", ARMS[name], seed)
            line["cpu_seconds"] = round(time.process_time() - begun)
            with (output / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            results.append(line)
    return [line for line in results if line["seed"] in options.seeds]


class Examiner:
    """Measures every model in the same way."""

    def __init__(self, options: argparse.Namespace, data: Path) -> None:
        """Reads and masks the held-out text, and reads the span tasks."""
        self.tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
        self.blocks = held_out_blocks(data, options.eval_blocks)
        self.quiz = SpanQuiz(self.tokenizer, self.blocks, sf.Config().max_span_targets)
        self.law = unigram_law(data)
        self.epochs = options.task_epochs
        self.tasks = [
            read_task(
                paths,
                tokenizer=self.tokenizer,
                longest=options.seq_length,
                sentences=options.task_sentences,
            )
            for paths in options.spans
        ]
        texts, spans = len(self.quiz.texts), sum(map(len, self.quiz.answers))
        print(
            f"{len(self.blocks)} held-out blocks; {spans} spans to fill in {texts} of them, "
            f"{self.quiz.num_left_out} left out: the tokenizer cuts their text in another way"
        )
        for task in self.tasks:
            sizes = [sum(len(s.spans) for s in part) for part in (task.train, task.test)]
            print(
                f"span task {task.name}: {sizes[0]} spans in {len(task.train)} sentences to "
                f"learn, {sizes[1]} in {len(task.test)} to test; {', '.join(task.types)}"
            )

    def measure(self, folder: Path, arm: Arm, seed: int) -> dict[str, Any]:
        """All figures of a pre-trained model."""
        model = sf.Model.from_pretrained(folder).eval()
        losses = masked_losses(model, self.tokenizer, self.blocks)
        heads = ("mlm", "sbo", "auto") if arm.sbo_weight else ("mlm",)
        chosen = self.quiz.choose(model, heads, self.law)
        spans = {head: self.quiz.fill(model, self.tokenizer, head) | chosen[head] for head in heads}
        tasks = self.tasks_of(model, seed)
        return {"losses": losses, "own_loss": losses[arm.scheme], "spans": spans, "tasks": tasks}

    def measure_untrained(self, config: sf.Config, seed: int) -> dict[str, Any]:
        """The span tasks from random weights; all else by the unigram law of the text."""
        torch.manual_seed(seed)
        tasks = self.tasks_of(sf.Model(config), seed)
        model = sf.Model(config).eval()
        forget_context(model, self.law)
        losses = masked_losses(model, self.tokenizer, self.blocks)
        spans = self.quiz.fill(model, self.tokenizer, "mlm")
        spans["nats"] = self.quiz.choose(model, ["mlm"], self.law)["mlm"]["nats"]
        return {"losses": losses, "spans": {"mlm": spans}, "tasks": tasks}

    def tasks_of(self, model: sf.Model, seed: int) -> dict[str, dict[str, float]]:
        """The scores of each span task, each learned by a copy of the model."""
        return {
            task.name: fine_tune(
                copy.deepcopy(model), self.tokenizer, task, epochs=self.epochs, seed=seed
            )
            for task in self.tasks
        }


def check_settings(options: argparse.Namespace, path: Path) -> None:
    """Keeps results of unequal settings apart.

    Raises:
        ValueError: The results in the folder were made with other settings.
    """
    values = {k: v for k, v in vars(options).items() if k not in ("output", "seeds", "threads")}
    wanted = json.loads(json.dumps(values, default=str))
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    found = json.loads(path.read_text("utf-8"))
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{path.parent} has results with {name} {found.get(name)}, asked is "
                f"{wanted.get(name)}: choose another --output"
            )


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines that stand; one that a kill cut short is taken away."""
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
