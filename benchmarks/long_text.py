"""Peak memory and CPU time of tasks on long texts, in windows; each case in a fresh process.

    python benchmarks/long_text.py [--preset tiny] [--lengths 510 4096 16384 65536]

The model is random and has 512 positions. Of a text of N pieces, `fill` predicts a [MASK] in place
of every hundredth word, `embed` takes a span of three words out of ten, `segment` cuts all of it.
VmHWM is the peak of the whole process, with Python, torch and the model; `before` is the peak when
all of that stood ready.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TASKS = ("fill", "segment", "embed")
WORDS = [
    "We",
    "must",
    "work",
    "together",
    "so",
    "the",
    "quiet",
    "river",
    "follows",
    "a",
    "broken",
    "engine",
    "and",
    "reports",
    "it",
]


def peak_mib() -> float:
    """VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def calls(model: Any, tokenizer: Any, text: str) -> dict[str, Callable[[], object]]:
    """Each task on a text."""
    import spanbert_fast as sf

    words = text.split(" ")
    masked = " ".join("[MASK]" if n % 100 == 50 else word for n, word in enumerate(words))
    starts = [match.start() for match in re.finditer(r"\S+", text)][::10]
    spans = [(start, start + len(" ".join(words[:3]))) for start in starts]
    spans = [(start, min(end, len(text))) for start, end in spans]
    return {
        "fill": lambda: sf.fill_span(model, tokenizer, masked, windows=True),
        "segment": lambda: sf.segment(model, tokenizer, text, windows=True),
        "embed": lambda: sf.span_embeddings(model, tokenizer, text, spans, windows=True),
    }


def measure(task: str, length: int, preset: str) -> dict[str, float]:
    """One case, in this process."""
    import torch

    import spanbert_fast as sf
    from spanbert_fast.data.wordpiece import train_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 200)
    model = sf.Model(sf.Config.preset(preset)).eval()
    # Every word is one piece, so that words are counted instead of pieces.
    whole = [word for word in WORDS if len(tokenizer.tokenize(word)) == 1]
    text = " ".join(random.Random(0).choices(whole, k=length))
    assert len(tokenizer(text, verbose=False)["input_ids"]) == length + 2
    before, start = peak_mib(), time.process_time()
    calls(model, tokenizer, text)[task]()
    return {
        "seconds": time.process_time() - start,
        "before_mib": before,
        "peak_mib": peak_mib(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[510, 4096, 16384, 65536])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case[0], int(options.case[1]), options.preset)))
        return
    print(
        "| task | pieces | before, MiB | peak, MiB | CPU s |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for task in options.tasks:
        for length in options.lengths:
            command = [sys.executable, __file__, "--preset", options.preset]
            found = subprocess.run(
                [*command, "--case", task, str(length)], check=True, capture_output=True, text=True
            )
            case = json.loads(found.stdout)
            numbers = (case["before_mib"], case["peak_mib"], case["seconds"])
            print(
                f"| {task} | {length:,} | " + " | ".join(f"{number:,.1f}" for number in numbers),
                "|",
                flush=True,
            )


if __name__ == "__main__":
    main()
