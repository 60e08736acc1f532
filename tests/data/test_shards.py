from __future__ import annotations

import dataclasses
import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest

from spanbert_fast.data.manifest import describe_file, read_manifest
from spanbert_fast.data.shards import TokenShards


@pytest.fixture
def copy(tmp_path, shards):
    folder = tmp_path / "shards"
    shutil.copytree(shards.directory, folder)
    return folder


def rewrite_manifest(folder, change):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_shard(path, rows, item_type, sizes, name="input_ids"):
    schema = pa.schema([(name, pa.large_list(item_type))])
    with pa.ipc.new_stream(path, schema) as writer:
        start = 0
        for size in sizes:
            column = pa.array(rows[start : start + size], pa.large_list(item_type))
            writer.write_batch(pa.record_batch([column], schema=schema))
            start += size


def test_datasets_opens_a_shard(shards, all_blocks, tmp_path):
    blocks = all_blocks(shards, "train")
    file = shards.manifest.files("train")[1]
    found = datasets.Dataset.from_file(str(shards.directory / file.name))
    assert found.column_names == ["input_ids"]
    assert [row["input_ids"] for row in found] == blocks[100:200]


def test_another_engine_may_write_shards(copy, shards, all_blocks):
    # As int32, in several record batches, all in one file: only the documented format counts.
    blocks = all_blocks(shards, "train")
    for file in shards.manifest.files("train"):
        (copy / file.name).unlink()
    write_shard(copy / "mine.arrow", blocks, pa.int32(), [10, 0, 200, len(blocks) - 210])
    validation = all_blocks(shards, "validation")
    write_shard(copy / "held_out.arrow", validation, pa.int32(), [len(validation)])

    def entry(name, rows):
        described = describe_file(copy, name, rows=len(rows), tokens=sum(map(len, rows)))
        return [vars(described)]

    def change(content):
        content["dtype"] = "int32"
        content["train"] = entry("mine.arrow", blocks)
        content["validation"] = entry("held_out.arrow", validation)

    rewrite_manifest(copy, change)
    foreign = TokenShards.open(copy)
    assert all_blocks(foreign, "train") == blocks
    assert np.array_equal(foreign.lengths("train"), shards.lengths("train"))
    values, offsets = foreign.gather("train", np.array([5, 215, 9, 10]))
    assert values.dtype == np.int32
    assert values[offsets[1] : offsets[2]].tolist() == blocks[215]


def test_a_changed_byte_is_found_in_every_file(copy, shards):
    for file in shards.manifest.all_files():
        path = copy / file.name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file.name} has sha256 .* manifest says"):
            TokenShards.open(copy)
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    assert TokenShards.open(copy).manifest == shards.manifest


def test_lost_and_cut_files_are_found_without_checksums(copy, shards):
    name = shards.manifest.files("train")[2].name
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-8])
    with pytest.raises(ValueError, match=f"{name} has .* bytes, manifest says {len(content)}"):
        TokenShards.open(copy, verify=False)
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing, the manifest lists it"):
        TokenShards.open(copy, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "format and version are"),
        (lambda c: c.pop("seq_length"), "seq_length"),
        (lambda c: c.update(seq_length=8), "has blocks of .* pieces, must have 1 to 6"),
        (lambda c: c.update(vocab_size=50), r"has ids from .*, must be in \[0, 49\]"),
        (lambda c: c.update(dtype="int32"), "has columns .*uint16.* must have .*int32"),
        (lambda c: c["train"].reverse(), None),
        (lambda c: c["train"].pop(), "blocks of split train, manifest counts"),
        (lambda c: c["train"][0].update(rows=99), "has 100 rows, manifest says 99"),
        (lambda c: c["counts"]["train"].update(tokens=1), "counts do not add up"),
    ],
)
def test_a_wrong_manifest_is_refused(copy, change, message):
    rewrite_manifest(copy, change)
    if message is None:
        TokenShards.open(copy)
    else:
        with pytest.raises(ValueError, match=message):
            TokenShards.open(copy)


def test_foreign_folders_and_files_are_refused(copy, shards, tmp_path):
    with pytest.raises(
        ValueError, match=r"holds no manifest.json, must be a folder that `prepare`"
    ):
        TokenShards.open(tmp_path)
    file = shards.manifest.files("validation")[0]

    def replace(content):
        content["validation"] = [vars(describe_file(copy, file.name, rows=file.rows))]

    (copy / file.name).write_bytes(b"not arrow at all, but long enough to look at")
    rewrite_manifest(copy, replace)
    with pytest.raises(ValueError, match=f"{file.name} is not an Arrow IPC stream"):
        TokenShards.open(copy)
    write_shard(copy / file.name, [[1]] * file.rows, pa.uint16(), [file.rows], name="tokens")
    rewrite_manifest(copy, replace)
    with pytest.raises(ValueError, match=f"{file.name} has columns tokens"):
        TokenShards.open(copy)
    write_shard(copy / file.name, [None, *[[1]] * (file.rows - 1)], pa.uint16(), [file.rows])
    rewrite_manifest(copy, replace)
    with pytest.raises(ValueError, match=f"{file.name} has 1 null rows"):
        TokenShards.open(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest of token shards"):
        TokenShards.open(copy)
    with pytest.raises(ValueError, match="split is 'test', must be one of train, validation"):
        shards.num_blocks("test")


def test_the_manifest_survives_a_round_trip(shards, tmp_path):
    (tmp_path / "manifest.json").write_text(shards.manifest.to_json())
    assert read_manifest(tmp_path) == shards.manifest
    assert read_manifest(tmp_path).content_hash() == shards.manifest_hash


def test_the_hash_names_the_content_and_not_its_origin(shards):
    elsewhere = {"inputs": [{"name": "elsewhere/text.txt"}]}
    moved = dataclasses.replace(shards.manifest, settings=elsewhere)
    assert moved.content_hash() == shards.manifest_hash
    (first, *others) = shards.manifest.train
    changed = (dataclasses.replace(first, sha256="0" * 64), *others)
    other = dataclasses.replace(shards.manifest, train=changed)
    assert other.content_hash() != shards.manifest_hash


def test_the_replacement_sample_follows_the_unigram_law(shards):
    counts = shards.unigram_counts().copy()
    counts[list(shards.manifest.special_token_ids.values())] = 0
    sample = shards.replacement_sample(5000, seed=1)
    assert sample.dtype == np.int32
    found = np.bincount(sample, minlength=len(counts))
    expected = counts / counts.sum() * 5000
    assert np.abs(found - expected).max() <= 1
    assert np.array_equal(sample, shards.replacement_sample(5000, seed=1))
    assert not np.array_equal(
        shards.replacement_sample(37, seed=1), shards.replacement_sample(37, seed=2)
    )
    with pytest.raises(ValueError, match="size is 0, must be at least 1"):
        shards.replacement_sample(0)


def test_rows_are_mapped_and_not_read(shards):
    for segment in shards._segments["train"]:
        assert not segment.values.flags.owndata
        assert not segment.values.flags.writeable
