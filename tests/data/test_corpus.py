from __future__ import annotations

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from invented_text import as_lines, documents

from spanbert_fast.data.corpus import cut_parts, find_source, read_documents
from spanbert_fast.data.sentences import recognise_format, split_sentences

TEXTS = documents(11, 40)


def read(path, *, text_format="auto", part_bytes=1 << 20, column="text"):
    parts = cut_parts(0, path, text_format=text_format, language="en", part_bytes=part_bytes)
    found = [
        document
        for part in parts
        for document in read_documents(part, text_column=column, language="en")
    ]
    return parts, found


def sentences(found):
    return [document.sentences for document in found]


def write_parquet(path, texts, **options):
    pq.write_table(pa.table({"text": texts, "number": list(range(len(texts)))}), path, **options)


def test_every_format_gives_the_same_documents(tmp_path):
    lines = as_lines(TEXTS).encode()
    records = "".join(
        json.dumps({"text": " ".join(text), "n": 1}) + "\n" for text in TEXTS
    ).encode()
    (tmp_path / "a.txt").write_bytes(lines)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(lines[:500]) + gzip.compress(lines[500:]))
    compressor = zstandard.ZstdCompressor()
    (tmp_path / "a.txt.zst").write_bytes(
        compressor.compress(lines[:500]) + compressor.compress(lines[500:])
    )
    (tmp_path / "crlf.txt").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    (tmp_path / "a.jsonl").write_bytes(records)
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(records))
    write_parquet(tmp_path / "a.parquet", [" ".join(text) for text in TEXTS], row_group_size=7)
    digests = set()
    for path in sorted(tmp_path.iterdir()):
        _, found = read(path)
        assert sentences(found) == TEXTS, path.name
        digests.add(tuple(document.digest for document in found))
    assert len(digests) == 1


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_cutting_into_parts_changes_nothing(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    texts = [" ".join(text) for text in TEXTS]
    if suffix == "txt":
        path.write_text(as_lines(TEXTS) + "\n\n \t\n\n")
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        write_parquet(path, texts, row_group_size=3)
    whole, expected = read(path)
    parts, found = read(path, part_bytes=200)
    assert len(whole) == 1
    assert len(parts) > 5
    assert found == expected
    if suffix != "parquet":
        assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
        assert parts[-1].end == path.stat().st_size


def test_running_text_is_one_document_of_sentences(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text(
        "CHAPTER I\n\n“Mr. Darcy is here,” said\nMrs. Bennet. It cost him $5.30, i.e. too much!\n"
        "He was gone by then.\n \nA new paragraph, about\n  nothing at all. Truly."
    )
    parts, found = read(path)
    assert not parts[0].is_lines
    assert sentences(found) == [
        [
            "CHAPTER I",
            "“Mr. Darcy is here,” said Mrs. Bennet.",
            "It cost him $5.30, i.e. too much!",
            "He was gone by then.",
            "A new paragraph, about nothing at all.",
            "Truly.",
        ]
    ]


def test_the_format_can_be_ordered(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(as_lines(TEXTS))
    assert len(read(path, text_format="lines")[1]) == len(TEXTS)
    (document,) = read(path, text_format="running")[1]
    assert document.sentences == [sentence for text in TEXTS for sentence in text]


def test_recognised_formats():
    lines = as_lines(TEXTS)
    assert recognise_format(lines, "en") == "lines"
    assert recognise_format(lines[:777], "en") == "lines"
    words = lines.split()
    wrapped = "\n".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9))
    assert recognise_format(wrapped, "en") == "running"
    paragraph_per_line = "\n".join(" ".join(text) for text in TEXTS if len(text) > 3)
    assert recognise_format(paragraph_per_line, "en") == "running"
    dialogue = "\n\n".join(sentence for text in TEXTS for sentence in text)
    assert recognise_format(dialogue, "en") == "running"
    assert recognise_format("", "en") == "running"


def test_a_line_of_ten_megabytes(tmp_path):
    path = tmp_path / "long.txt"
    words = random.Random(0).choices(["river", "Anna", "walked"], k=1_600_000)
    path.write_text(" ".join(words))
    assert path.stat().st_size > 8_000_000
    (document,) = read(path)[1]
    assert " ".join(document.sentences).split() == words
    assert split_sentences(" ".join(words[:50]), "en") == [" ".join(words[:50])]


def test_invalid_utf8_is_replaced_and_told(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"One caf\xe9 here.\nTwo.\n\nFine.\nToo.\n")
    _, found = read(path, text_format="lines")
    assert sentences(found) == [["One caf\ufffd here.", "Two."], ["Fine.", "Too."]]
    assert [document.has_invalid_bytes for document in found] == [True, False]
    records = tmp_path / "a.jsonl"
    records.write_bytes(
        b'{"text": "caf\xe9"}\n{"text": "half \\ud83d pair"}\n{"text": "ok \\ud83d\\ude00"}\n'
    )
    _, found = read(records)
    assert sentences(found) == [["caf\ufffd"], ["half \ufffd pair"], ["ok \U0001f600"]]
    assert [document.has_invalid_bytes for document in found] == [True, True, False]


def test_documents_without_text_are_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n\n{"text": null}\n{"text": " \\n "}\n{"text": "A."}')
    assert sentences(read(path)[1]) == [[], [], [], ["A."]]
    write_parquet(tmp_path / "a.parquet", ["", None, "B."])
    assert sentences(read(tmp_path / "a.parquet")[1]) == [[], [], ["B."]]
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    assert read(empty) == ([], [])
    write_parquet(tmp_path / "none.parquet", [])
    assert read(tmp_path / "none.parquet")[1] == []


def test_equal_text_has_an_equal_digest_whatever_its_white_space(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("A b.\n\nC.", " A  b. C.", "A b. D."))
    )
    first, second, third = (document.digest for document in read(tmp_path / "a.jsonl")[1])
    assert first == second != third
    assert len(first) == 16


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is a list, must be a JSON object"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "line 1 has no 'text', only body, id"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 has a int in 'text', must be text"),
        ("a.txt", "Hello.".encode("utf-16"), "is UTF-16, must be UTF-8"),
        ("a.txt.gz", b"no gzip", "a.txt.gz is damaged"),
        ("a.txt.gz", gzip.compress(b"Hello. " * 99, mtime=0)[:-9], "it ends in the middle"),
        ("a.txt.zst", b"no zstd", "a.txt.zst is damaged"),
        (
            "a.txt.zst",
            zstandard.ZstdCompressor().compress(bytes(random.Random(0).randbytes(999)))[:-9],
            "it ends in the middle",
        ),
        ("a.parquet", b"no parquet", "a.parquet is not a Parquet file"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_parquet_columns_are_checked(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"])
    with pytest.raises(ValueError, match="no column 'body', only text, number"):
        read(tmp_path / "a.parquet", column="body")
    with pytest.raises(ValueError, match="has int64 in column 'number', must be string"):
        read(tmp_path / "a.parquet", column="number")


def test_sources(tmp_path):
    folder = tmp_path / "books"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl.gz", "deep/c.parquet", "cover.png", ".hidden.txt"):
        (folder / name).write_text("x")
    source = find_source(f"{folder}:2.5")
    assert source.weight == 2.5
    assert [file.name for file in source.files] == ["a.jsonl.gz", "b.txt", "c.parquet"]
    assert [file.name for file in source.skipped] == ["cover.png"]
    odd = tmp_path / "a:7"
    odd.write_text("x")
    assert find_source(str(odd)).files == (odd,)
    assert find_source(f"{odd}:0.5").weight == 0.5
    for argument, message in (
        (str(tmp_path / "none.txt"), "does not exist, must be a file or a folder"),
        (f"{folder}:heavy", "has weight 'heavy', must be a number"),
        (f"{folder}:0", r"has weight 0.0, must be in \(0, 1000\]"),
        (f"{folder}:nan", "has weight nan"),
        (str(folder / "deep" / ".."), None),
    ):
        if message is None:
            assert find_source(argument).files
        else:
            with pytest.raises(ValueError, match=message):
                find_source(argument)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_text("x")
    with pytest.raises(ValueError, match=r"has no file that ends in .txt"):
        find_source(str(tmp_path / "pictures"))
