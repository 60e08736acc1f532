"""What `make demo` runs: text to shards, shards to a small SpanBERT, a SpanBERT to filled spans.

Every step is one `spanbert-fast` command that you could type; it is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEXT = HERE / "state_of_the_union.jsonl.zst"
SENTENCES = (
    "Members of the [MASK]: I am happy to report to you.",
    "Tonight I ask [MASK] to work with me.",
    "We must work together to keep the peace of the [MASK] [MASK].",
)
# What the issue of a demo is: a model that has learned more than how often each token occurs.
MIN_GAIN_NATS = 0.5
MIN_ACCURACY_RATIO = 2.0


def main() -> int:
    """Runs all steps; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--steps", type=int, help="fewer steps than the preset, to try things out")
    options = parser.parse_args()
    started = time.perf_counter()
    output: Path = options.output
    shutil.rmtree(output, ignore_errors=True)
    data, run = output / "data", output / "run"
    try:
        title("1. Text to token shards")
        spanbert_fast("prepare", "--input", shorten(TEXT), "--text-column", "text",
                      "--output", data, "--train-tokenizer", "--vocab-size", "4000",
                      "--seq-length", "64", "--validation-permille", "50")  # fmt: skip
        title("2. Pre-train a small SpanBERT")
        steps = ["--steps", options.steps] if options.steps else []
        spanbert_fast("pretrain", "--data", data, "--output", run, "--preset", "tiny", *steps)
        title("3. Measure it on held-out addresses")
        result = json.loads(spanbert_fast("evaluate", run / "model", "--data", data, "--json"))
        is_good = compare(result)
        title("4. Fill spans")
        for sentence in SENTENCES:
            spanbert_fast("fill", run / "model", sentence, "--top-k", "3")
    except subprocess.CalledProcessError as error:
        print(f"\nThe demo stopped: `{error.cmd[3]}` ended with status {error.returncode}.")
        return 1
    print(f"\nReport: {run / 'report.png'}    model: {run / 'model'}")
    print(f"The demo took {(time.perf_counter() - started) / 60:.1f} minutes.")
    if not is_good:
        print("The demo failed: the model did not reach the bars above.")
    return 0 if is_good else 1


def title(text: str) -> None:
    """Prints the heading of a step."""
    print(f"\n=== {text}", flush=True)


def shorten(path: Path) -> Path:
    """The path as somebody in the current folder would type it."""
    return Path(os.path.relpath(path))


def spanbert_fast(*words: object) -> str:
    """Shows and runs one command; what it printed, if that is meant for a program.

    Raises:
        subprocess.CalledProcessError: The command failed; it has said why.
    """
    arguments = [str(word) for word in words]
    print("$ spanbert-fast " + shlex.join(arguments), flush=True)
    captured = subprocess.PIPE if "--json" in arguments else None
    command = [sys.executable, "-m", "spanbert_fast", *arguments]
    return subprocess.run(command, check=True, stdout=captured, text=True).stdout or ""


def compare(result: dict) -> bool:
    """Prints the model beside what needs no model; whether it is clearly better."""
    base = result["baselines"]
    entropy, majority = base["unigram_cross_entropy"], base["majority_accuracy"]
    gain, ratio = entropy - result["mlm_loss"], result["mlm_accuracy"] / majority
    most_frequent = f"always {base['majority_token']!r}"
    rows = [
        ("", "loss in nats", "accuracy"),
        ("unigram law of the corpus", f"{entropy:.3f}", ""),
        (most_frequent, "", f"{majority:.3f}"),
        ("this model, MLM", f"{result['mlm_loss']:.3f}", f"{result['mlm_accuracy']:.3f}"),
        ("this model, SBO", f"{result['sbo_loss']:.3f}", f"{result['sbo_accuracy']:.3f}"),
    ]
    print(f"{result['mlm_targets']} masked tokens of {result['blocks']} held-out blocks:")
    for row in rows:
        print(f"  {row[0]:<28}{row[1]:>14}{row[2]:>12}")
    print(f"  better than the unigram law by {gain:.2f} nats (bar {MIN_GAIN_NATS}),")
    print(
        f"  right {ratio:.1f} times as often as the majority token (bar {MIN_ACCURACY_RATIO:.0f})"
    )
    return gain >= MIN_GAIN_NATS and ratio >= MIN_ACCURACY_RATIO


if __name__ == "__main__":
    sys.exit(main())
