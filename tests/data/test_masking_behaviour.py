"""What a user of the sampler relies on."""

import pickle
import random

import numpy as np
from oracles.masking_inputs import SPECIAL_IDS, make_masker, packed, sequence_of, word_starts_of

from spanbert_fast.data.masking import SpanMasker


def test_seed_epoch_and_example_change_the_mask() -> None:
    tokens, cu_seqlens = packed([sequence_of("text", 200, 100, random.Random(2))])
    masks = set()
    for seed, epoch, example_id in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**32)]:
        masker = make_masker(word_starts_of(100), seed=seed)
        out = masker(tokens, cu_seqlens, np.array([example_id]), epoch=epoch)
        masks.add(tuple(out.mlm_positions.tolist()))
    assert len(masks) == 5


def test_input_is_left_alone_and_may_be_read_only() -> None:
    tokens, cu_seqlens = packed([sequence_of("text", 200, 100, random.Random(3))])
    before = tokens.copy()
    for array in (tokens, cu_seqlens):
        array.flags.writeable = False
    out = make_masker(word_starts_of(100))(tokens, cu_seqlens, np.array([1]))
    assert (tokens == before).all()
    assert (out.input_ids != before).any()
    assert (before[out.mlm_positions] == out.mlm_labels).all()


def test_a_batch_without_sequences_has_no_targets() -> None:
    nothing = np.empty(0, np.int32)
    out = make_masker(word_starts_of(8))(nothing, np.zeros(1, np.int32), np.empty(0, np.int64))
    assert [len(field) for field in out] == [0, 0, 0, 0, 0, 1, 0]


def test_whole_words_and_tokens_are_what_they_say() -> None:
    word_starts = word_starts_of(1000)
    rng = random.Random(5)
    text = [token for token in sequence_of("text", 5000, 1000, rng) if token not in SPECIAL_IDS]
    tokens, cu_seqlens = packed([text])
    single = make_masker(word_starts, scheme="token")(tokens, cu_seqlens, np.array([1]))
    assert len(single.sbo_left) == len(single.sbo_targets) == 0
    words = make_masker(word_starts, scheme="whole_word")(tokens, cu_seqlens, np.array([1]))
    assert len(words.sbo_left) > 0
    masked = np.zeros(len(tokens), np.bool_)
    masked[words.mlm_positions] = True
    # A word is masked wholly or not at all, but for the one that the budget cuts.
    broken = (masked[1:] != masked[:-1]) & ~word_starts[tokens[1:]]
    assert broken.sum() <= 1


def test_tagged_masks_the_given_spans_only_with_probability_one() -> None:
    tokens, cu_seqlens = packed([sequence_of("one_token_words", 100, 1000, random.Random(6))])
    masker = make_masker(
        word_starts_of(1000), scheme="tagged", tag_probability=1.0, mask_ratio=0.15
    )
    spans = np.array([[10, 13], [12, 14], [50, 51]], np.int32)
    out = masker(tokens, cu_seqlens, np.array([0]), spans=spans)
    assert out.mlm_positions.tolist() == [10, 11, 12, 13, 50]
    assert out.sbo_left.tolist() == [9, 49]
    assert out.sbo_right.tolist() == [14, 51]
    none = masker(tokens, cu_seqlens, np.array([0]), spans=np.empty((0, 2), np.int32))
    assert len(none.mlm_positions) == 0
    hardly_ever = make_masker(
        word_starts_of(1000), scheme="tagged", tag_probability=1 - 1e-9, mask_ratio=0.15
    )
    out = hardly_ever(tokens, cu_seqlens, np.array([0]), spans=np.empty((0, 2), np.int32))
    assert len(out.mlm_positions) == 15


def test_survives_pickling() -> None:
    tokens, cu_seqlens = packed([sequence_of("text", 300, 100, random.Random(7))])
    masker = make_masker(word_starts_of(100), seed=2**63 + 1, geometric_p=0.4)
    again = pickle.loads(pickle.dumps(masker))
    for left, right in zip(
        masker(tokens, cu_seqlens, np.array([1])),
        again(tokens, cu_seqlens, np.array([1])),
        strict=True,
    ):
        assert (left == right).all()
    assert repr(again) == repr(masker)
    assert "geometric_p=0.4" in repr(masker)


def test_settings_do_not_follow_the_callers_arrays() -> None:
    tokens, cu_seqlens = packed([sequence_of("text", 300, 100, random.Random(8))])
    word_starts = word_starts_of(100)
    masker = make_masker(word_starts)
    before = masker(tokens, cu_seqlens, np.array([1]))
    word_starts[:] = False
    after = pickle.loads(pickle.dumps(masker))(tokens, cu_seqlens, np.array([1]))
    assert (before.mlm_positions == after.mlm_positions).all()


def test_the_signature_is_the_documented_one() -> None:
    masker = SpanMasker(
        word_starts_of(200),
        mask_token_id=103,
        special_token_ids=[0, 101, 102],
        replacement_ids=np.array([5, 6], np.int32),
        mask_ratio=0.15,
        geometric_p=0.2,
        min_span_words=1,
        max_span_words=10,
        max_span_targets=15,
        scheme="spanbert",
        replacement="span",
        seed=0,
    )
    out = masker(*packed([[3, 4, 5, 60, 6, 7]]), np.array([1]), epoch=0)
    assert len(out.mlm_positions) == 1
