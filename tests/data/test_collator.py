"""The collator is `SpanMasker` with padding; its epochs, workers and wrong inputs."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from invented_text import documents
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from spanbert_fast.config import Config
from spanbert_fast.data.collator import SpanMaskingCollator
from spanbert_fast.data.masking import SpanMasker
from spanbert_fast.data.tokenizer import ordinary_ids, word_starts
from spanbert_fast.model.inputs import pack_inputs

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
TEXTS = [" ".join(lines) for lines in documents(11, 12)]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def features(tokenizer):
    rows = [dict(tokenizer(text, truncation=True, max_length=64)) for text in TEXTS]
    return [{**row, "id": 1000 + number} for number, row in enumerate(rows)]


def masked_by_hand(tokenizer, features, epoch, **settings):
    """What `SpanMasker` gives for the same ids, packed."""
    masker = SpanMasker(
        word_starts(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        special_token_ids=[
            tokenizer.pad_token_id,
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
            tokenizer.mask_token_id,
        ],
        replacement_ids=np.arange(5, len(tokenizer), dtype=np.int32),
        **settings,
    )
    rows = [np.array(feature["input_ids"], np.int32) for feature in features]
    cu_seqlens = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    ids = np.array([feature["id"] for feature in features])
    return masker(np.concatenate(rows), cu_seqlens, ids, epoch=epoch), cu_seqlens


def pack_batch(batch, tokenizer):
    """What the model makes of a padded batch."""
    config = Config(vocab_size=len(tokenizer), max_position_embeddings=128)
    return pack_inputs(config, **batch).batch


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("settings", [{}, {"seed": 7, "mask_ratio": 0.3, "replacement": "token"}])
def test_a_batch_is_what_the_masker_says(tokenizer, features, side, settings):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    collator = SpanMaskingCollator(tokenizer, pad_to_multiple_of=8, **settings)
    collator.set_epoch(3)
    batch = collator(features)
    sbo = ["sbo_spans", "sbo_targets"]
    assert list(batch) == ["input_ids", "attention_mask", "token_type_ids", "labels", *sbo]
    assert all(values.dtype == torch.int64 for values in batch.values())
    assert batch["input_ids"].shape[1] % 8 == 0
    padded = tokenizer.pad(
        [{name: row[name] for name in ("input_ids", "token_type_ids")} for row in features],
        pad_to_multiple_of=8,
        return_tensors="pt",
    )
    assert torch.equal(batch["attention_mask"], padded["attention_mask"])
    assert torch.equal(batch["token_type_ids"], padded["token_type_ids"])
    unmasked = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    assert torch.equal(unmasked, padded["input_ids"])
    expected, cu_seqlens = masked_by_hand(tokenizer, features, 3, **settings)
    real = batch["attention_mask"].bool()
    assert real.sum(dim=1).tolist() == np.diff(cu_seqlens).tolist()
    assert real[:, -1 if side == "left" else 0].all()
    assert batch["input_ids"][real].tolist() == expected.input_ids.tolist()
    assert set(batch["input_ids"][~real].tolist()) == {tokenizer.pad_token_id}
    labels = batch["labels"][real]
    assert torch.nonzero(labels != -100)[:, 0].tolist() == expected.mlm_positions.tolist()
    assert labels[labels != -100].tolist() == expected.mlm_labels.tolist()
    assert (batch["labels"][~real] == -100).all()
    packed = pack_batch(batch, tokenizer)
    for name in ("sbo_left", "sbo_right", "sbo_cu", "sbo_targets"):
        assert getattr(packed, name).tolist() == getattr(expected, name).tolist()
    assert len(expected.sbo_left) > 5


def test_columns_may_be_lists_arrays_or_tensors(tokenizer, features):
    collator = SpanMaskingCollator(tokenizer, id_column=None)
    collator.set_epoch(0)
    expected = collator(features)
    assert collator(features[:1])["labels"].shape[1] == len(features[0]["input_ids"])
    for convert in (np.array, torch.tensor):
        kept = ("input_ids", "attention_mask", "token_type_ids")
        batch = collator([{name: convert(row[name]) for name in kept} for row in features])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("padded_before", ["right", "left"])
def test_padding_that_an_example_has_changes_nothing(tokenizer, features, side, padded_before):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    collator = SpanMaskingCollator(tokenizer, id_column=None)
    collator.set_epoch(0)
    packed = pack_batch(collator(features), tokenizer)
    padded = [
        tokenizer.pad(
            {"input_ids": row["input_ids"]},
            padding="max_length",
            max_length=70 + number,  # Different, so that the batch pads some more.
            padding_side=padded_before,
        )
        for number, row in enumerate(features)
    ]
    batch = collator(padded)
    assert batch["labels"].shape == (12, 81)
    for number, row in enumerate(batch["attention_mask"].tolist()):
        length = len(features[number]["input_ids"])
        begin = 70 + number - length if padded_before == "left" else 0
        begin += 11 - number if side == "left" else 0
        assert row == [0] * begin + [1] * length + [0] * (81 - begin - length)
    again = pack_batch(batch, tokenizer)
    for name in (
        "input_ids",
        "mlm_positions",
        "mlm_labels",
        "sbo_left",
        "sbo_right",
        "sbo_targets",
    ):
        assert torch.equal(getattr(again, name), getattr(packed, name))


def test_protected_tokens_stay(tokenizer, features):
    rows = [{**row, "special_tokens_mask": [0] * len(row["input_ids"])} for row in features]
    for row in rows:
        row["special_tokens_mask"][1:9] = [1] * 8
    collator = SpanMaskingCollator(tokenizer, spans=False, mask_ratio=0.9)
    collator.set_epoch(0)
    batch = collator(rows)
    assert "sbo_spans" not in batch
    assert (batch["labels"][:, 1:9] == -100).all()
    for row, ids in zip(rows, batch["input_ids"].tolist(), strict=True):
        assert ids[1:9] == row["input_ids"][1:9]
    assert (batch["labels"] != -100).sum() > 100


def test_specials_are_never_masked_or_drawn(tokenizer, features):
    collator = SpanMaskingCollator(tokenizer, mask_ratio=0.9)
    assert ordinary_ids(tokenizer).tolist() == list(range(5, len(tokenizer)))
    specials = torch.tensor(sorted(set(tokenizer.all_special_ids) - {tokenizer.mask_token_id}))
    before = tokenizer.pad([{"input_ids": f["input_ids"]} for f in features], return_tensors="pt")
    for epoch in range(20):
        collator.set_epoch(epoch)
        ids = collator(features)["input_ids"]
        kept = torch.isin(before["input_ids"], specials)
        assert torch.equal(torch.isin(ids, specials), kept)
    drawn = SpanMaskingCollator(tokenizer, replacement_ids=np.array([77], np.int32), mask_ratio=0.9)
    drawn.set_epoch(0)
    batch = drawn(features)
    changed = (batch["input_ids"] != batch["labels"]) & (batch["labels"] != -100)
    assert set(batch["input_ids"][changed].tolist()) == {77, tokenizer.mask_token_id}


def test_an_unknown_piece_is_a_word_like_any_other(tokenizer):
    collator = SpanMaskingCollator(tokenizer, mask_ratio=0.9)
    unknown = {"input_ids": [tokenizer.unk_token_id] * 40}
    assert (collator([unknown])["labels"] == tokenizer.unk_token_id).sum() == 36


def test_the_id_names_the_example(tokenizer, features):
    collator = SpanMaskingCollator(tokenizer)
    collator.set_epoch(0)
    labels = collator(features)["labels"]
    assert torch.equal(collator(features[::-1])["labels"].flip(0), labels)
    other = [{**row, "id": row["id"] + 1} for row in features]
    assert not torch.equal(collator(other)["labels"], labels)
    for value in (np.int64(1000), torch.tensor(1000)):
        one = collator([{**features[0], "id": value}])["labels"]
        assert torch.equal(one[0], labels[0, : one.shape[1]])
    named = [{**row, "id": f"text {number}"} for number, row in enumerate(features)]
    assert torch.equal(collator(named)["labels"], collator(named)["labels"])
    assert not torch.equal(collator(named)["labels"], labels)
    # Without the column: a hash of the ids; equal texts have equal masks, others have others.
    ids = features[0]["input_ids"]
    swapped = [*ids[:-3], ids[-2], ids[-3], ids[-1]]
    rows = collator([{"input_ids": row} for row in (ids, ids, swapped)])["labels"]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0] == -100, rows[2] == -100)


def passes(loader, collator=None, count=2):
    """Labels of some passes over a loader, one tensor each."""
    found = []
    for epoch in range(count):
        if collator is not None:
            collator.set_epoch(epoch)
        found.append(torch.cat([batch["labels"].flatten() for batch in loader]))
    return found


WORKERS = [
    {"num_workers": 0},
    {"num_workers": 1},
    {"num_workers": 2},
    {"num_workers": 2, "persistent_workers": True},
]


def test_masks_depend_on_the_epoch_and_not_on_the_workers(tokenizer, features):
    expected = None
    for settings in WORKERS:
        collator = SpanMaskingCollator(tokenizer)
        loader = DataLoader(features, 4, collate_fn=collator, **settings)
        found = passes(loader, collator, 3)
        again = passes(loader, collator, 3)
        expected = expected or found
        for one, other, third in zip(found, expected, again, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, third)
        assert not torch.equal(found[0], found[1])
        assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("settings", WORKERS, ids=str)
def test_without_an_epoch_masks_still_change(tokenizer, features, settings):
    collator = SpanMaskingCollator(tokenizer)
    assert collator.epoch is None
    first, second = passes(DataLoader(features, 4, collate_fn=collator, **settings))
    assert not torch.equal(first, second)
    assert collator.epoch is None


def test_hugging_faces_collator_repeats_itself_where_ours_does_not(tokenizer, features):
    """Theirs with a seed masks two passes alike if workers do not persist, the default."""
    rows = [{"input_ids": row["input_ids"]} for row in features]
    theirs = DataCollatorForLanguageModeling(tokenizer, seed=7)
    first, second = passes(DataLoader(rows, 4, collate_fn=theirs, num_workers=1))
    assert torch.equal(first, second)
    ours = SpanMaskingCollator(tokenizer, seed=7)
    first, second = passes(DataLoader(rows, 4, collate_fn=ours, num_workers=1), ours)
    assert not torch.equal(first, second)


def test_spawned_workers_see_the_epoch(tokenizer, features):
    collator = SpanMaskingCollator(tokenizer)
    loader = DataLoader(
        features,
        4,
        collate_fn=collator,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    local = DataLoader(features, 4, collate_fn=collator)
    for one, other in zip(passes(loader, collator), passes(local, collator), strict=True):
        assert torch.equal(one, other)


def test_ranks_never_draw_equal_masks(tokenizer):
    """Equal lengths and equal seeds: only the ids can tell the two halves apart."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(tokenizer), (32, 400), generator=generator)
    masks = []
    for rank in range(2):
        torch.manual_seed(0)
        collator = SpanMaskingCollator(tokenizer)
        rows = [{"input_ids": row} for row in ids[rank::2]]
        masks += (collator(rows)["labels"] == -100).tolist()
        collator.set_epoch(0)
        masks += (collator(rows)["labels"] == -100).tolist()
    assert len({tuple(mask) for mask in masks}) == 64


def test_a_copy_has_its_own_epoch(tokenizer, features):
    collator = SpanMaskingCollator(tokenizer)
    collator.set_epoch(5)
    for twin in (pickle.loads(pickle.dumps(collator)), copy.deepcopy(collator)):
        assert twin.epoch == 5
        assert torch.equal(twin(features)["labels"], collator(features)["labels"])
        twin.set_epoch(6)
        assert collator.epoch == 5
    assert "epoch=5" in repr(collator)


def test_a_batch_without_spans(tokenizer):
    """One word between its specials: a label, and no two neighbours inside of a block."""
    batch = SpanMaskingCollator(tokenizer, scheme="token")([{"input_ids": [2, 30, 3]}])
    assert batch["labels"].tolist() == [[-100, 30, -100]]
    assert batch["sbo_spans"].shape == (1, 0, 2)
    assert batch["sbo_targets"].shape == (1, 0, 15)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "features is empty"),
        (["text"], TypeError, r"features\[0\] is a str, must be a mapping"),
        ([{"text": "a"}], ValueError, r"features\[0\] has \['text'\], must have input_ids"),
        ([{"input_ids": [5]}, {"input_ids": []}], ValueError, r"features\[1\] is empty"),
        ([{"input_ids": [5, 100000]}], ValueError, r"holds 100000, must be in \[0, \d+\)"),
        ([{"input_ids": [5, -3]}], ValueError, "holds -3"),
        ([{"input_ids": [5.0]}], TypeError, "dtype float64, must be integers"),
        ([{"input_ids": ["a"]}], TypeError, "must be integers"),
        ([{"input_ids": [[5, 6]]}], ValueError, r"shape \(1, 2\), must have one dimension"),
        ([{"input_ids": [5, 6], "attention_mask": [1]}], ValueError, "must have 2 values"),
        ([{"input_ids": [5, 6], "attention_mask": [1, 2]}], ValueError, "zeros and ones"),
        ([{"input_ids": [5, 6], "attention_mask": [0, 0]}], ValueError, "one run of tokens"),
        ([{"input_ids": [5] * 3, "attention_mask": [1, 0, 1]}], ValueError, "one run of tokens"),
        ([{"input_ids": [5], "id": 1}, {"input_ids": [5]}], ValueError, "id is in 1 of 2 features"),
        ([{"input_ids": [5], "id": 1.5}], TypeError, r"id of features\[0\] is 1.5"),
        ([{"input_ids": [5], "id": None}], TypeError, "is None, must be an integer or a string"),
        ([{"input_ids": [5], "id": True}], TypeError, "is True"),
        ([{"input_ids": [5], "id": 2**63}], ValueError, "must fit into 64 bits"),
        (
            [{"input_ids": [5], "token_type_ids": [0]}, {"input_ids": [5]}],
            ValueError,
            "token_type_ids is in 1 of 2 features",
        ),
    ],
)
def test_wrong_features_are_named(tokenizer, rows, error, message):
    with pytest.raises(error, match=message):
        SpanMaskingCollator(tokenizer)(rows)


def test_wrong_settings_are_named(tokenizer):
    for role in ("mask", "pad"):
        without = copy.deepcopy(tokenizer)
        setattr(without, f"{role}_token", None)
        with pytest.raises(ValueError, match=f"has no {role} token"):
            SpanMaskingCollator(without)
    with pytest.raises(ValueError, match="scheme is 'tagged'"):
        SpanMaskingCollator(tokenizer, scheme="tagged")
    with pytest.raises(ValueError, match=r"mask_ratio is 1\.5"):
        SpanMaskingCollator(tokenizer, mask_ratio=1.5)
    with pytest.raises(TypeError, match="mask_ration"):
        SpanMaskingCollator(tokenizer, mask_ration=0.2)
    with pytest.raises(ValueError, match="pad_to_multiple_of is 0"):
        SpanMaskingCollator(tokenizer, pad_to_multiple_of=0)
    collator = SpanMaskingCollator(tokenizer)
    for wrong, error in (
        (-1, ValueError),
        (2**32, ValueError),
        (1.0, TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match="epoch is"):
            collator.set_epoch(wrong)
