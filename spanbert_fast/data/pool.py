"""The parts of a run, tokenized by many processes with the fastest engine that is right."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Final

from spanbert_fast.data.blocks import (
    Engine,
    EnginesDifferError,
    PartJob,
    engine_version,
    is_done,
    make_encoder,
    nanotoken_problem,
    process_part,
    start_worker,
    work_on_part,
)
from spanbert_fast.data.manifest import write_atomically
from spanbert_fast.data.options import EngineChoice, OnEvent, Progress

CHECKED_BYTES: Final = 20_000_000
"""Input on which nanotoken must equal tokenizers before it does the rest."""
_DECISION_NAME: Final = "engine.json"


def tokenize_parts(
    jobs: list[PartJob],
    tokenizer_json: str,
    choice: EngineChoice,
    *,
    work: Path,
    workers: int,
    tell: OnEvent,
) -> tuple[str, int]:
    """Does all parts that are not done yet.

    Args:
        jobs: all parts.
        tokenizer_json: what `blocks.engine_json` gave.
        choice: what the user asked for.
        work: folder where a decision about the engine is kept.
        workers: processes; 0 for one per available core.
        tell: told about progress.

    Returns:
        What tokenized (with the reason, where nothing faster did), and how many parts were done
        before.

    Raises:
        ValueError: a part cannot be read, or nanotoken was asked for and cannot serve.
        RuntimeError: a worker process was killed.
    """
    resumed = sum(is_done(job) for job in jobs)
    total = sum(job.part.num_bytes for job in jobs)

    def run(some: list[PartJob], engine: Engine) -> None:
        def report() -> None:
            done = sum(job.part.num_bytes for job in jobs if is_done(job))
            tell(Progress(stage="tokenize", done=done, total=total))

        missing = [job for job in some if not is_done(job)]
        _run_jobs(missing, engine, tokenizer_json, workers, report)

    decision_path = work / _DECISION_NAME
    if decision_path.exists():
        engine, description = json.loads(decision_path.read_bytes())
    else:
        engine, description = _choose(choice, tokenizer_json, total)
        if engine == "nanotoken":
            checked = _spread(jobs)
            try:
                run(checked, "both")
            except EnginesDifferError as error:
                if choice == "nanotoken":
                    raise ValueError(f"engine 'nanotoken' cannot serve: {error}") from error
                engine, description = "tokenizers", f"{engine_version('tokenizers')} ({error})"
        write_atomically(decision_path, json.dumps([engine, description]).encode())
    run(jobs, engine)
    return description, resumed


def _choose(choice: EngineChoice, tokenizer_json: str, total: int) -> tuple[Engine, str]:
    """The engine to try, and its description."""
    plain = engine_version("tokenizers")
    if choice == "tokenizers":
        return "tokenizers", plain
    problem = nanotoken_problem(tokenizer_json)
    if choice == "nanotoken" and problem:
        raise ValueError(f"engine 'nanotoken' cannot serve: {problem}")
    if choice == "auto" and not problem and total <= CHECKED_BYTES:
        problem = "nanotoken serves larger inputs"
    if problem:
        return "tokenizers", f"{plain} ({problem})"
    return "nanotoken", f"{engine_version('nanotoken')} (equal to {plain} on a part of the input)"


def _spread(jobs: list[PartJob]) -> list[PartJob]:
    """Parts from all over the corpus with `CHECKED_BYTES` of input together."""
    chosen: list[PartJob] = []
    size = 0
    stride = max(1, len(jobs) // 16)
    for job in (job for first in range(stride) for job in jobs[first::stride]):
        if size >= CHECKED_BYTES:
            break
        chosen.append(job)
        size += job.part.num_bytes
    return chosen


def _run_jobs(
    jobs: list[PartJob],
    engine: Engine,
    tokenizer_json: str,
    workers: int,
    report: Callable[[], None],
) -> None:
    num_workers = min(len(jobs), workers or _num_cores())
    if num_workers <= 1:
        if jobs:
            encode = make_encoder(engine, tokenizer_json)
        for job in jobs:
            process_part(job, encode)
            report()
        return
    # Large parts first, so that no worker begins a long part when the others are done.
    jobs = sorted(jobs, key=lambda job: -job.part.num_bytes)
    executor = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(engine, tokenizer_json),
    )
    try:
        futures: list[Future[None]] = [executor.submit(work_on_part, job) for job in jobs]
        for future in as_completed(futures):
            future.result()
            report()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process was killed (out of memory?); start the same command again, it "
            "continues where it stopped"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
