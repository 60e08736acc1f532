"""Memory of the data room in this process alone, in MiB above what imports took, as JSON.

`prepare` makes shards of a text; `read` opens shards as a run does, with every check, and takes one
epoch of masked steps. `peak` is the high-water mark of the process, in which pages of mapped shards
count as long as they lie in the file cache; `own` is the most anonymous memory, seen after every
part of a text and every step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from process_memory import status_mib

from spanbert_fast.data.loader import StepLoader
from spanbert_fast.data.prepare import PrepareOptions, prepare
from spanbert_fast.train.source import open_source

NUM_WORDS, SENTENCES = 20_000, 20
COPIES = 8
"""How often a document is written: shards that are large for the text that had to be tokenized."""
PART_MEGABYTES, ROWS_PER_FILE = 0.1, 512
TOKENS_PER_STEP = 16_384


def write_text(path: Path, num_bytes: int) -> None:
    """Documents of 20 sentences, a line each, of random words with the frequencies of Zipf."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    sizes = rng.integers(2, 11, NUM_WORDS)
    words = [letters[rng.integers(0, 26, size)].tobytes().decode() for size in sizes]
    shares = 1 / np.arange(2, NUM_WORDS + 2)
    shares /= shares.sum()
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            lengths = rng.integers(8, 31, SENTENCES)
            drawn = iter(rng.choice(NUM_WORDS, lengths.sum(), p=shares).tolist())
            lines = [" ".join(words[next(drawn)] for _ in range(n)) + " ." for n in lengths]
            written += file.write("\n".join(lines) + "\n\n")


def prepare_text(source: Path, output: Path, tokenizer: Path | None) -> tuple[int, float]:
    """Number of pieces in shards of the text, and the most anonymous memory, in MiB.

    One worker, which is this process. A run holds a part of the text and a shard at a time; both
    are smaller than by default, so that the smallest text already has several of them.
    """
    seen: list[float] = []
    summary = prepare(
        PrepareOptions(
            input=(f"{source}:{COPIES}",),
            output=output,
            tokenizer=str(tokenizer) if tokenizer else None,
            train_tokenizer=tokenizer is None,
            vocab_size=2_000,
            text_format="lines",
            part_megabytes=PART_MEGABYTES,
            rows_per_file=ROWS_PER_FILE,
            workers=1,
        ),
        on_event=lambda _: seen.append(status_mib("RssAnon")),
    )
    return summary.counts.train.tokens, max(seen)


def read_epoch(folder: Path) -> float:
    """The most anonymous memory while an epoch is read, in MiB."""
    source = open_source(folder)
    shards, masker = source.shards, source.masker(seed=0, max_span_targets=15, settings={})
    most, blocks = status_mib("RssAnon"), 0
    with StepLoader(
        shards, "train", masker, seed=0, global_batch_tokens=TOKENS_PER_STEP, num_micro_batches=1
    ) as loader:
        while blocks < shards.num_blocks("train"):
            blocks += len(next(loader).example_ids)
            most = max(most, status_mib("RssAnon"))
    return most


def main() -> None:
    """Does one of the two, and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("prepare", "read"))
    parser.add_argument("shards", type=Path, help="the folder that is written or read")
    parser.add_argument("--source", type=Path, help="text to prepare")
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()
    before, own = status_mib("VmRSS"), status_mib("RssAnon")
    tokens = 0
    if options.what == "read":
        most = read_epoch(options.shards)
    else:
        tokens, most = prepare_text(options.source, options.shards, options.tokenizer)
    print(json.dumps({"tokens": tokens, "own": most - own, "peak": status_mib("VmHWM") - before}))


if __name__ == "__main__":
    main()
