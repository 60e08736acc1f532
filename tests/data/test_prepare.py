from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from invented_text import as_lines, documents
from tokenizers import Tokenizer

from spanbert_fast.data import blocks, pool
from spanbert_fast.data.blocks import Pieces, pack_sentences
from spanbert_fast.data.corpus import cut_parts, read_documents
from spanbert_fast.data.manifest import Tally
from spanbert_fast.data.options import Note, Progress
from spanbert_fast.data.prepare import PrepareOptions, prepare
from spanbert_fast.data.shard_writer import count, decide_fates
from spanbert_fast.data.shards import TokenShards
from spanbert_fast.data.tokenizer import load_tokenizer

TEXTS = documents(21, 120)


def make_options(tmp_path, tokenizer_folder, **changes):
    corpus = tmp_path / "corpus.txt"
    if not corpus.exists():
        corpus.write_text(as_lines(TEXTS))
    chosen = {
        "input": (str(corpus),),
        "output": tmp_path / "out",
        "tokenizer": str(tokenizer_folder),
        "seq_length": 32,
        "rows_per_file": 50,
        "validation_permille": 100,
        "workers": 1,
        **changes,
    }
    return PrepareOptions(**chosen)


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def text_of(shards, split, tokenizer):
    rows = range(shards.num_blocks(split))
    ids = [shards.gather(split, np.array([row])).values.tolist() for row in rows]
    return " ".join(tokenizer.decode(block) for block in ids)


def test_nothing_is_dropped(tmp_path, tokenizer_folder, all_blocks):
    # One sentence is far longer than a block, and the last document has no blank line behind it.
    texts = [*TEXTS, [" ".join(["river"] * 100) + "."], ["The very last."]]
    (tmp_path / "corpus.txt").write_text(as_lines(texts).rstrip("\n"))
    summary = prepare(make_options(tmp_path, tokenizer_folder))
    shards = TokenShards.open(tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    written = {
        split: [token for block in all_blocks(shards, split) for token in block]
        for split in ("train", "validation")
    }
    # In order: every document's pieces stand whole in one of the two streams.
    for text in texts:
        pieces = [i for s in text for i in tokenizer.encode(s, add_special_tokens=False).ids]
        stream = next(s for s in written.values() if s[: len(pieces)] == pieces)
        del stream[: len(pieces)]
    assert written == {"train": [], "validation": []}
    assert summary.counts.read.documents == len(texts)
    assert summary.counts.read.sentences == sum(map(len, texts))
    assert summary.counts.read.cut_sentences == 1


def test_counts_are_those_of_the_shards(tmp_path, tokenizer_folder, all_blocks):
    prepare(make_options(tmp_path, tokenizer_folder))
    shards = TokenShards.open(tmp_path / "out")
    counts = shards.manifest.counts
    unigrams = np.zeros(shards.manifest.vocab_size, np.int64)
    for split in ("train", "validation"):
        found = all_blocks(shards, split)
        tally = getattr(counts, split)
        assert tally.blocks == len(found) == shards.num_blocks(split)
        assert tally.tokens == sum(map(len, found)) == shards.lengths(split).sum()
        files = shards.manifest.files(split)
        assert [file.rows for file in files[:-1]] == [50] * (len(files) - 1)
        assert sum(file.rows for file in files) == len(found)
        assert sum(file.tokens for file in files) == tally.tokens
        if split == "train":
            unigrams += np.bincount(np.concatenate(found), minlength=len(unigrams))
    assert np.array_equal(shards.unigram_counts(), unigrams)
    assert counts.validation.documents > 2


def test_blocks_hold_whole_sentences(tmp_path, tokenizer_folder, all_blocks):
    prepare(make_options(tmp_path, tokenizer_folder, validation_permille=0))
    shards = TokenShards.open(tmp_path / "out")
    tokenizer = load_tokenizer(tokenizer_folder)
    period = tokenizer.convert_tokens_to_ids(".")
    found = all_blocks(shards, "train")
    assert all(block[-1] == period for block in found)
    assert max(map(len, found)) > 26


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], ([], 0, 0)),
        ([0, 0], ([], 0, 0)),
        ([4, 6], ([10], 2, 0)),
        ([4, 7], ([4, 7], 2, 0)),
        ([10], ([10], 1, 0)),
        ([3, 25, 5, 1], ([3, 10, 10, 10, 1], 4, 1)),
        ([20], ([10, 10], 1, 1)),
        ([3, 0, 3], ([6], 2, 0)),
    ],
)
def test_packing(lengths, expected):
    assert pack_sentences(lengths, 10) == expected


def test_two_workers_write_the_same_bytes(tmp_path, tokenizer_folder):
    one = make_options(tmp_path, tokenizer_folder, output=tmp_path / "one")
    two = dataclasses.replace(one, output=tmp_path / "two", workers=2, part_megabytes=0.003)
    prepare(one)
    events = []
    prepare(two, on_event=events.append)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    done = [e.done for e in events if isinstance(e, Progress) and e.stage == "tokenize"]
    assert len(done) > 4
    assert done == sorted(done)
    assert done[-1] == (tmp_path / "corpus.txt").stat().st_size


def test_a_killed_worker_ends_the_run_and_the_next_continues(tmp_path, tokenizer_folder):
    whole = make_options(tmp_path, tokenizer_folder, output=tmp_path / "whole")
    prepare(whole)
    options = dataclasses.replace(whole, output=tmp_path / "out", workers=2, part_megabytes=0.0003)

    killed = []

    def kill(event):
        # Once: parts that were done by then are told of after it, when no worker may be left.
        if isinstance(event, Progress) and not killed:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(RuntimeError, match="a worker process was killed"):
        prepare(options, on_event=kill)
    assert not (options.output / "manifest.json").exists()
    summary = prepare(dataclasses.replace(options, workers=1))
    assert summary.resumed_parts > 0
    assert contents(whole.output) == contents(options.output)


SCRIPT = """
import multiprocessing, os, signal, sys
from pathlib import Path
from spanbert_fast.data.options import Progress
from spanbert_fast.data.prepare import PrepareOptions, prepare

def kill(event):
    if isinstance(event, Progress) and len(list(Path(output).glob("unfinished/*.npz"))) >= 3:
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    corpus, output, tokenizer = sys.argv[1:]
    options = PrepareOptions(
        input=(corpus,), output=Path(output), tokenizer=tokenizer, seq_length=32, rows_per_file=50,
        validation_permille=100, workers=2, part_megabytes=0.0006)
    prepare(options, on_event=kill)
"""


def ends(worker, within):
    """Whether a process that is no child of ours ends in time."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        # A dead one may stay as a zombie where nobody collects orphans.
        try:
            with open(f"/proc/{worker}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_a_killed_run_continues_to_the_same_bytes(tmp_path, tokenizer_folder):
    (tmp_path / "script.py").write_text(SCRIPT)
    whole = make_options(tmp_path, tokenizer_folder, output=tmp_path / "whole")
    prepare(whole)
    output = tmp_path / "out"
    command = [sys.executable, tmp_path / "script.py", whole.input[0], output, tokenizer_folder]
    # It kills itself, amid its work: another process could come too late for that.
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
    )
    assert done.returncode == -signal.SIGKILL
    # The next run removes the folder in which they write.
    assert all(ends(int(worker), 60) for worker in done.stdout.split())
    finished = len(list(output.glob("unfinished/*.npz")))
    assert not (output / "manifest.json").exists()
    again = dataclasses.replace(whole, output=output, part_megabytes=0.0006)
    summary = prepare(again)
    assert summary.resumed_parts >= finished
    assert contents(output) == contents(whole.output)


def test_workers_end_with_their_parent():
    code = (
        "import multiprocessing as m, os, time\n"
        "from spanbert_fast.data import blocks\n"
        "blocks.make_encoder = lambda *a: None\n"
        "def work(q):\n"
        "    blocks.start_worker('tokenizers', '')\n"
        "    q.put(os.getpid())\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    c = m.get_context('fork'); q = c.SimpleQueue()\n"
        "    p = c.Process(target=work, args=(q,)); p.start()\n"
        "    print(q.get(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        worker = int(process.stdout.readline())
        os.kill(worker, 0)
        process.kill()
        process.wait()
        assert ends(worker, 30), "the worker outlived its parent"


def test_a_finished_folder_is_left_alone(tmp_path, tokenizer_folder):
    options = make_options(tmp_path, tokenizer_folder)
    first = prepare(options)
    before = contents(options.output)
    again = prepare(dataclasses.replace(options, workers=2))
    assert contents(options.output) == before
    assert again.counts == first.counts
    assert "finished by an earlier run" in again.notes[0]
    with pytest.raises(ValueError, match=r"other settings .seq_length was 32 and is 64"):
        prepare(dataclasses.replace(options, seq_length=64))


def test_an_unfinished_folder_of_another_run_is_refused(tmp_path, tokenizer_folder):
    options = make_options(tmp_path, tokenizer_folder)

    class StopError(Exception):
        pass

    def stop(event):
        raise StopError

    with pytest.raises(StopError):
        prepare(options, on_event=stop)
    with pytest.raises(ValueError, match=r"unfinished run with other settings .language was 'en'"):
        prepare(dataclasses.replace(options, language="de"))
    (tmp_path / "corpus.txt").write_text("Changed.\n")
    with pytest.raises(ValueError, match=r"unfinished run with other settings .inputs was"):
        prepare(options)


def test_duplicates_count_and_leave_once(tmp_path, tokenizer_folder):
    single = make_options(tmp_path, tokenizer_folder, output=tmp_path / "single")
    prepare(single)
    again = tmp_path / "again.txt"
    again.write_text(as_lines(TEXTS[:50]).replace(" ", "  ") + "\n" + as_lines(TEXTS[:3]))
    double = make_options(tmp_path, tokenizer_folder, input=(single.input[0], str(again)))
    counts = prepare(double).counts
    assert counts.read.documents == len(TEXTS) + 53
    assert counts.duplicates.documents == 53
    for name in ("train-00000.arrow", "validation-00000.arrow", "unigram_counts.arrow"):
        assert (single.output / name).read_bytes() == (double.output / name).read_bytes()


def test_weights(tmp_path, tokenizer_folder):
    base = make_options(tmp_path, tokenizer_folder, output=tmp_path / "base")
    once = prepare(base).counts
    heavy = make_options(tmp_path, tokenizer_folder, input=(f"{base.input[0]}:2.5",))
    counts = prepare(heavy).counts
    assert counts.read == once.read
    assert counts.validation == once.validation  # Held-out documents are written once.
    extra = counts.train.documents - 2 * once.train.documents
    assert 0.3 * once.train.documents < extra < 0.7 * once.train.documents
    assert counts.repeated.documents == counts.train.documents - once.train.documents
    light = dataclasses.replace(base, input=(f"{base.input[0]}:0.25",), output=tmp_path / "light")
    counts = prepare(light).counts
    assert counts.train.documents + counts.sampled_out.documents == once.train.documents
    assert 0.1 * once.train.documents < counts.train.documents < 0.4 * once.train.documents


def test_fates_are_shares_of_the_documents():
    generator = np.random.Generator(np.random.PCG64(0))
    digests = generator.integers(0, 256, (20_000, 16), dtype=np.uint8)
    weights = np.repeat([0.3, 1.0, 2.75], [5000, 5000, 10_000])
    fates = decide_fates(digests, np.ones(20_000, np.int64), weights, 25)
    assert abs(fates.is_held_out.mean() - 0.025) < 0.005
    trained = ~fates.is_held_out
    for weight in (0.3, 1.0, 2.75):
        assert abs(fates.copies[trained & (weights == weight)].mean() - weight) < 0.03
    assert set(fates.copies[fates.is_held_out]) == {1}


@pytest.mark.parametrize("seed", range(5))
def test_counts_add_up_for_any_fates(seed):
    generator = np.random.Generator(np.random.PCG64(seed))
    digests = generator.integers(0, 2, (300, 16), dtype=np.uint8) * generator.integers(
        0, 3, (300, 1), dtype=np.uint8
    )
    digests[:, 2:] = 0
    tallies = generator.integers(0, 3, (300, 4))
    weights = generator.choice([0.4, 1.0, 3.5], 300)
    counts = count(tallies, decide_fates(digests, tallies[:, 1], weights, 500))
    assert counts.duplicates.documents > 0 < counts.empty.documents
    assert counts.read.documents + counts.repeated.documents == sum(
        getattr(counts, name).documents
        for name in ("empty", "duplicates", "sampled_out", "train", "validation")
    )
    with pytest.raises(AssertionError, match="do not add up"):
        dataclasses.replace(counts, train=counts.train + Tally(tokens=1))


def test_special_tokens_in_a_text_are_text(tmp_path, tokenizer_folder, all_blocks):
    (tmp_path / "corpus.txt").write_text("The [SEP] lamp [MASK] walked.\nUnder [CLS] [PAD].\n")
    prepare(make_options(tmp_path, tokenizer_folder, validation_permille=0))
    shards = TokenShards.open(tmp_path / "out")
    specials = {shards.manifest.special_token_ids[role] for role in ("pad", "cls", "sep", "mask")}
    (block,) = all_blocks(shards, "train")
    assert not specials & set(block)


def test_strange_inputs_are_told(tmp_path, tokenizer_folder):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "empty.txt").write_bytes(b"")
    (folder / "photo.jpg").write_bytes(b"x")
    (folder / "bad.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": ""}\n')
    (folder / "blank.txt").write_text("\n \n\n")
    events = []
    options = make_options(tmp_path, tokenizer_folder, input=(str(folder),), validation_permille=0)
    summary = prepare(options, on_event=events.append)
    assert summary.counts.read.documents == 3
    assert summary.counts.empty.documents == 2
    text = "\n".join(event.text for event in events if isinstance(event, Note))
    assert "1 files are empty: " in text
    assert "1 files are skipped for their names: " in text
    assert "1 documents had invalid UTF-8" in text
    manifest = TokenShards.open(options.output).manifest
    assert manifest.inputs == {
        "files": 3,
        "bytes": sum(file.stat().st_size for file in folder.iterdir()) - 1,  # The picture.
        "empty_files": 1,
        "skipped_files": 1,
        "invalid_utf8_documents": 1,
    }


def test_a_trained_tokenizer_comes_with_the_shards(tmp_path, tokenizer_folder):
    base = make_options(
        tmp_path, tokenizer_folder, tokenizer=None, train_tokenizer=True, vocab_size=150
    )
    prepare(base)
    other = dataclasses.replace(base, output=tmp_path / "b", workers=2, part_megabytes=0.003)
    prepare(other)
    assert contents(base.output) == contents(other.output)
    shards = TokenShards.open(base.output)
    tokenizer = load_tokenizer(shards.tokenizer_directory)
    assert len(tokenizer) == shards.manifest.vocab_size == 150
    found = text_of(shards, "train", tokenizer)
    assert "Anna" in found
    assert "[UNK]" not in found


class FakeNanotoken(types.ModuleType):
    """Stands in for an engine that is not a dependency: equal to tokenizers, or wrong on Anna."""

    is_wrong = False
    is_refused = False
    calls = 0

    class WordPieceTokenizer:
        @classmethod
        def from_json(cls, text):
            if FakeNanotoken.is_refused:
                raise ValueError("no such family")
            self = cls()
            self.encode = blocks._make_tokenizers(text)
            return self

        def encode_batch(self, sentences, *, add_special_tokens, parallel):
            assert not add_special_tokens
            assert not parallel
            FakeNanotoken.calls += 1
            if FakeNanotoken.is_wrong:
                sentences = [sentence.replace("Anna", "river") for sentence in sentences]
            pieces = self.encode(sentences)
            return pieces.values.astype(np.uint32), np.cumsum([0, *pieces.lengths])


@pytest.fixture
def nanotoken(monkeypatch):
    monkeypatch.setitem(sys.modules, "nanotoken", FakeNanotoken("nanotoken"))
    monkeypatch.setattr(pool, "engine_version", lambda name: f"{name} 9")
    monkeypatch.setattr(pool, "CHECKED_BYTES", 2000)
    for name, value in (("is_wrong", False), ("is_refused", False), ("calls", 0)):
        monkeypatch.setattr(FakeNanotoken, name, value)
    return FakeNanotoken


def test_the_engine_is_chosen_and_named(tmp_path, tokenizer_folder, nanotoken):
    def run(name, **changes):
        nanotoken.calls = 0
        options = make_options(
            tmp_path, tokenizer_folder, output=tmp_path / name, part_megabytes=0.001, **changes
        )
        return prepare(options).engine

    assert run("plain", engine="tokenizers") == "tokenizers 9"
    assert nanotoken.calls == 0
    assert run("fast") == "nanotoken 9 (equal to tokenizers 9 on a part of the input)"
    assert nanotoken.calls > 5
    nanotoken.is_wrong = True
    engine = run("wrong")
    assert engine.startswith("tokenizers 9 (nanotoken differs from tokenizers on '")
    with pytest.raises(ValueError, match="engine 'nanotoken' cannot serve: nanotoken differs"):
        run("ordered", engine="nanotoken")
    nanotoken.is_refused = True
    assert "(nanotoken refuses the tokenizer: no such family)" in run("refused")
    for name in ("fast", "wrong", "refused"):
        for file in ("train-00000.arrow", "unigram_counts.arrow"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_a_missing_engine_is_named(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nanotoken", None)
    assert (
        "(nanotoken is not installed)" in prepare(make_options(tmp_path, tokenizer_folder)).engine
    )
    options = make_options(
        tmp_path, tokenizer_folder, engine="nanotoken", output=tmp_path / "ordered"
    )
    with pytest.raises(ValueError, match="engine 'nanotoken' cannot serve: nanotoken is not inst"):
        prepare(options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": ()}, "input is empty"),
        ({"tokenizer": None}, "tokenizer is None and train_tokenizer is False"),
        ({"train_tokenizer": True}, "must be exactly one of them"),
        ({"seq_length": 4}, r"seq_length is 4, must be in \[8, 1000000\]"),
        ({"validation_permille": 1000}, "validation_permille is 1000"),
        ({"text_format": "prose"}, "text_format is 'prose', must be one of auto, lines, running"),
        ({"engine": "fast"}, "engine is 'fast', must be one of auto, tokenizers, nanotoken"),
        ({"workers": -1}, "workers is -1"),
        ({"input": ("/does/not/exist",)}, "input '/does/not/exist' does not exist"),
        ({"tokenizer": "/does/not/exist"}, "tokenizer '/does/not/exist' is not a folder"),
    ],
)
def test_wrong_options_are_named(tmp_path, tokenizer_folder, change, message):
    with pytest.raises(ValueError, match=message):
        prepare(make_options(tmp_path, tokenizer_folder, **change))


def test_wrong_folders_are_named(tmp_path, tokenizer_folder):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file, must be a folder"):
        prepare(make_options(tmp_path, tokenizer_folder, output=tmp_path / "file"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty, must be a new or an unfinished folder"):
        prepare(make_options(tmp_path, tokenizer_folder, output=tmp_path / "full"))
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="input holds no text, every file is empty"):
        prepare(make_options(tmp_path, tokenizer_folder, input=(str(tmp_path / "empty.txt"),)))


def test_an_error_in_a_worker_names_the_file(tmp_path, tokenizer_folder):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "Fine."}\n{"text"\n')
    inputs = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match=r"[ab]\.jsonl, line 2 is not JSON"):
        prepare(make_options(tmp_path, tokenizer_folder, input=inputs, workers=2))


def test_a_long_line_is_encoded_whole(tmp_path, tokenizer_folder):
    path = tmp_path / "long.txt"
    path.write_text("river " * 600_000)
    (part,) = cut_parts(0, path, text_format="running", language="en", part_bytes=1 << 20)
    (document,) = read_documents(part, text_column="text", language="en")
    pieces = Pieces(np.zeros(600_000, np.int32), np.array([600_000]))
    job = blocks.PartJob(
        part=part,
        stem=tmp_path / "0",
        dtype="uint16",
        block_length=510,
        text_column="text",
        language="en",
    )
    blocks.process_part(job, lambda sentences: pieces)
    result = blocks.read_part(tmp_path / "0", "uint16")
    assert result.tallies.tolist() == [[1, 600_000, 1177, 1]]
    assert bytes(result.digests[0]) == document.digest
