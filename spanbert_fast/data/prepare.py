"""From text to token shards, with many processes, in a run that may be killed and started again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from spanbert_fast.data.blocks import PartJob, engine_json, read_part
from spanbert_fast.data.corpus import Part, Source, cut_parts, find_source, read_documents
from spanbert_fast.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    Counts,
    Manifest,
    ShardFile,
    describe_file,
    sync_directory,
    write_atomically,
)
from spanbert_fast.data.options import Note, OnEvent, Progress
from spanbert_fast.data.options import PrepareOptions as PrepareOptions
from spanbert_fast.data.options import PrepareSummary as PrepareSummary
from spanbert_fast.data.pool import tokenize_parts
from spanbert_fast.data.run_folder import finished_manifest, open_work_folder, run_settings
from spanbert_fast.data.shard_writer import Fates, count, decide_fates, write_shards
from spanbert_fast.data.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    special_token_ids,
    tokenizer_hash,
    word_starts,
)
from spanbert_fast.data.wordpiece import train_tokenizer


def prepare(options: PrepareOptions, *, on_event: OnEvent | None = None) -> PrepareSummary:
    """Writes token shards, their manifest and their tokenizer into `options.output`.

    The work lies in parts below `unfinished/` until all is done, so a run that was killed continues
    where it stopped. The same inputs, options and versions give the same bytes, whatever the number
    of workers. A finished folder made with the same options is left as it is.

    Args:
        options: what to do.
        on_event: told about progress, and about what the user should know.

    Raises:
        ValueError: an input, the tokenizer or the output folder cannot serve; the message says why.
        RuntimeError: a worker process was killed.
    """
    started = time.monotonic()
    notes: list[str] = []

    def tell(event: Progress | Note) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        if on_event is not None:
            on_event(event)

    sources = [find_source(argument) for argument in options.input]
    settings = run_settings(options, sources)
    resumed = 0
    manifest = finished_manifest(options.output, settings)
    if manifest is None:
        work = open_work_folder(options.output, settings, sources)
        manifest, resumed = _run(options, settings, sources, work, tell)
        shutil.rmtree(work)
    else:
        tell(Note(text=f"{options.output} was finished by an earlier run; nothing was done"))
    return PrepareSummary(
        output=options.output,
        counts=manifest.counts,
        input_bytes=manifest.inputs["bytes"],
        engine=manifest.settings["engine_used"],
        notes=tuple(notes),
        resumed_parts=resumed,
        seconds=time.monotonic() - started,
    )


def _run(
    options: PrepareOptions,
    settings: dict[str, Any],
    sources: list[Source],
    work: Path,
    tell: OnEvent,
) -> tuple[Manifest, int]:
    """Does all the work; returns the manifest, and how many parts had been finished before."""
    parts, inputs = _find_parts(options, sources, tell)
    tokenizer = _find_tokenizer(options, parts, work, tell)
    dtype: Literal["uint16", "int32"] = "uint16" if len(tokenizer) <= 65_536 else "int32"
    jobs = _make_jobs(options, parts, work, dtype)
    engine_used, resumed = tokenize_parts(
        jobs,
        engine_json(tokenizer.backend_tokenizer.to_str()),
        options.engine,
        work=work,
        workers=options.workers,
        tell=tell,
    )
    fates, counts, num_invalid = _decide(options, sources, jobs)
    if num_invalid:
        tell(Note(text=f"{num_invalid} documents had invalid UTF-8, which became U+FFFD"))
    train, held_out, unigram_counts = write_shards(
        options.output,
        [partial(read_part, job.stem, dtype) for job in jobs],
        fates,
        dtype=dtype,
        vocab_size=len(tokenizer),
        rows_per_file=options.rows_per_file,
        on_blocks=lambda done: tell(Progress(stage="write", done=done, total=counts.read.blocks)),
    )
    manifest = Manifest(
        seq_length=options.seq_length,
        vocab_size=len(tokenizer),
        dtype=dtype,
        tokenizer_sha256=tokenizer_hash(tokenizer),
        special_token_ids=special_token_ids(tokenizer),
        settings={**settings, "engine_used": engine_used},
        inputs={**inputs, "invalid_utf8_documents": num_invalid},
        counts=counts,
        train=tuple(train),
        validation=tuple(held_out),
        unigram_counts=unigram_counts,
        tokenizer=_publish_tokenizer(options.output, work),
    )
    _publish_manifest(options, manifest, tell)
    return manifest, resumed


def _make_jobs(options: PrepareOptions, parts: list[Part], work: Path, dtype: str) -> list[PartJob]:
    return [
        PartJob(
            part=part,
            stem=work / f"{index:06d}",
            dtype=dtype,
            block_length=options.block_length,
            text_column=options.text_column,
            language=options.language,
        )
        for index, part in enumerate(parts)
    ]


def _publish_manifest(options: PrepareOptions, manifest: Manifest, tell: OnEvent) -> None:
    """Writes the manifest, which completes the folder."""
    counts = manifest.counts
    for split, tally in (("training", counts.train), ("validation", counts.validation)):
        if not tally.blocks and (split == "training" or options.validation_permille):
            tell(Note(text=f"the {split} split is empty, see validation_permille"))
    sync_directory(options.output)
    write_atomically(options.output / MANIFEST_NAME, manifest.to_json().encode())


def _find_parts(
    options: PrepareOptions, sources: list[Source], tell: OnEvent
) -> tuple[list[Part], dict[str, int]]:
    """All parts in the order of the corpus, and numbers about the files."""
    parts: list[Part] = []
    empty: list[Path] = []
    for number, source in enumerate(sources):
        for file in source.files:
            found = cut_parts(
                number,
                file,
                text_format=options.text_format,
                language=options.language,
                part_bytes=max(1, int(options.part_megabytes * 1_000_000)),
            )
            parts += found
            if not found:
                empty.append(file)
    skipped = [file for source in sources for file in source.skipped]
    for what, files in (("empty", empty), ("skipped for their names", skipped)):
        if files:
            shown = ", ".join(str(file) for file in files[:3]) + ", ..." * (len(files) > 3)
            tell(Note(text=f"{len(files)} files are {what}: {shown}"))
    if not parts:
        raise ValueError("input holds no text, every file is empty")
    files = [file for source in sources for file in source.files]
    inputs = {
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "empty_files": len(empty),
        "skipped_files": len(skipped),
    }
    return parts, inputs


def _find_tokenizer(
    options: PrepareOptions, parts: list[Part], work: Path, tell: OnEvent
) -> PreTrainedTokenizerFast:
    """The tokenizer of the run; the first call keeps it in the work folder."""
    folder = work / TOKENIZER_FOLDER
    if not folder.exists():
        draft = work / "tokenizer.partial"
        shutil.rmtree(draft, ignore_errors=True)
        if options.tokenizer is not None:
            tokenizer = load_tokenizer(options.tokenizer)
        else:
            tokenizer = train_tokenizer(_training_texts(options, parts, tell), options.vocab_size)
        special_token_ids(tokenizer)
        word_starts(tokenizer)
        save_tokenizer(tokenizer, draft)
        draft.replace(folder)
    return load_tokenizer(folder)


def _training_texts(options: PrepareOptions, parts: list[Part], tell: OnEvent) -> Iterator[str]:
    """Text for the tokenizer: from the beginning of each part, in proportion to its size."""
    budget = options.tokenizer_megabytes * 1_000_000
    total = sum(part.num_bytes for part in parts)
    done = 0
    for part in parts:
        room = part.num_bytes if total <= budget else part.num_bytes * budget // total
        documents = read_documents(part, text_column=options.text_column, language=options.language)
        for document in documents:
            for sentence in document.sentences:
                room -= len(sentence)
                yield sentence
            if room <= 0 and total > budget:
                break
        done += part.num_bytes
        tell(Progress(stage="train tokenizer", done=done, total=total))


def _decide(
    options: PrepareOptions, sources: list[Source], jobs: list[PartJob]
) -> tuple[Fates, Counts, int]:
    """What becomes of each document, the counts, and how many documents had invalid UTF-8."""
    tallies, digests, weights = [], [], []
    num_invalid = 0
    for job in jobs:
        result = read_part(job.stem, job.dtype)
        tallies.append(result.tallies)
        digests.append(result.digests)
        weights.append(np.full(len(result.tallies), sources[job.part.source].weight))
        num_invalid += result.num_invalid
    all_tallies = np.concatenate(tallies)
    fates = decide_fates(
        np.concatenate(digests),
        all_tallies[:, 1],
        np.concatenate(weights),
        options.validation_permille,
    )
    return fates, count(all_tallies, fates), num_invalid


def _publish_tokenizer(output: Path, work: Path) -> tuple[ShardFile, ...]:
    folder = output / TOKENIZER_FOLDER
    shutil.copytree(work / TOKENIZER_FOLDER, folder, dirs_exist_ok=True)
    names = sorted(file.name for file in folder.iterdir())
    return tuple(describe_file(output, f"{TOKENIZER_FOLDER}/{name}") for name in names)
