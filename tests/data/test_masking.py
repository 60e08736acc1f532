"""The sampler against its slow twin, token for token, alone, in batches, and on several threads."""

import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import span_masker as oracle
from oracles.masking_inputs import (
    MASK_ID,
    SPECIAL_IDS,
    WORD_SHAPES,
    make_masker,
    packed,
    sequence_of,
    tagged_spans,
    word_starts_of,
)

from spanbert_fast import _core
from spanbert_fast.data.masking import MaskedBatch


def assert_equal(actual: MaskedBatch, expected: oracle.Masked) -> None:
    for name in MaskedBatch._fields:
        assert getattr(actual, name).tolist() == getattr(expected, name), name


@st.composite
def rules(draw: st.DrawFn) -> dict[str, object]:
    longest = draw(st.integers(1, 12))
    return {
        "mask_ratio": draw(st.sampled_from([0.15, 0.15, 0.01, 0.5, 0.95, 0.999])),
        "geometric_p": draw(st.sampled_from([0.2, 0.01, 0.6, 0.99])),
        "min_span_words": draw(st.integers(1, longest)),
        "max_span_words": longest,
        "max_span_targets": draw(st.sampled_from([1, 4, 15])),
        "scheme": draw(st.sampled_from(["spanbert", "whole_word", "token", "tagged"])),
        "replacement": draw(st.sampled_from(["span", "token"])),
        "tag_probability": draw(st.sampled_from([0.5, 0.0, 1.0, 0.999])),
        "seed": draw(st.integers(0, 2**64 - 1)),
    }


@settings(max_examples=2000)
@given(
    rule=rules(),
    vocabulary_size=st.sampled_from([8, 50, 28_996, 250_000]),
    shapes=st.lists(
        st.tuples(
            st.sampled_from(WORD_SHAPES), st.sampled_from([0, 1, 2, 5, 20, 63, 64, 65, 130, 600])
        ),
        max_size=4,
    ),
    epoch=st.sampled_from([0, 1, 2**32 - 1]),
    num_threads=st.integers(1, 3),
    token_seed=st.integers(0, 2**32),
)
def test_equals_the_twin(
    rule: dict[str, object],
    vocabulary_size: int,
    shapes: list[tuple[str, int]],
    epoch: int,
    num_threads: int,
    token_seed: int,
) -> None:
    rng = random.Random(token_seed)
    sequences = [sequence_of(shape, length, vocabulary_size, rng) for shape, length in shapes]
    tokens, cu_seqlens = packed(sequences)
    example_ids = [rng.randrange(-(2**63), 2**63) for _ in sequences]
    spans = tagged_spans(tokens.tolist(), cu_seqlens.tolist(), rng)
    word_starts = word_starts_of(vocabulary_size)
    replacement_ids = [rng.randrange(3, vocabulary_size) for _ in range(rng.randint(1, 20))]
    masker = make_masker(
        word_starts,
        replacement_ids=np.array(replacement_ids, np.int32),
        num_threads=num_threads,
        **rule,
    )
    is_tagged = rule["scheme"] == "tagged"
    actual = masker(
        tokens,
        cu_seqlens,
        np.array(example_ids, np.int64),
        epoch=epoch,
        spans=np.array(spans, np.int32).reshape(-1, 2) if is_tagged else None,
    )
    twin = oracle.Rule(word_starts, MASK_ID, SPECIAL_IDS, replacement_ids, **rule)  # type: ignore[arg-type]
    expected = oracle.mask_batch(
        twin, tokens.tolist(), cu_seqlens.tolist(), example_ids, epoch, spans if is_tagged else ()
    )
    assert_equal(actual, expected)


@pytest.mark.parametrize("scheme", ["words", "tokens", "tagged"])
@pytest.mark.parametrize("rejections_per_token", [0, 1])
def test_ends_by_counting_unmasked_tokens(scheme: str, rejections_per_token: int) -> None:
    rng = random.Random(0)
    word_starts = word_starts_of(100)
    core = _core.SpanMasker(
        word_starts,
        np.array(SPECIAL_IDS, np.int32),
        np.array([7, 8], np.int32),
        mask_token_id=MASK_ID,
        mask_ratio=0.97,
        min_span_words=1,
        length_thresholds=np.empty(0, np.uint64),
        max_span_targets=15,
        scheme=scheme,
        replace_by_token=False,
        tag_threshold=2**31,
        seed=4,
        rejections_per_token=rejections_per_token,
    )
    sequences = [sequence_of("text", 200, 100, rng), sequence_of("one_word", 70, 100, rng)]
    tokens, cu_seqlens = packed(sequences)
    spans = tagged_spans(tokens.tolist(), cu_seqlens.tolist(), rng) if scheme == "tagged" else []
    actual = core.mask(
        tokens, cu_seqlens, np.array([5, 6]), np.array(spans, np.int32).reshape(-1, 2), 3
    )
    twin = oracle.Rule(
        word_starts,
        MASK_ID,
        SPECIAL_IDS,
        [7, 8],
        mask_ratio=0.97,
        max_span_words=1,
        scheme={"words": "spanbert", "tokens": "token"}.get(scheme, scheme),
        seed=4,
        rejections_per_token=rejections_per_token,
    )
    expected = oracle.mask_batch(twin, tokens.tolist(), cu_seqlens.tolist(), [5, 6], 3, spans)
    assert_equal(MaskedBatch(*actual), expected)


@pytest.mark.parametrize("num_threads", [1, 2, 9])
def test_masks_do_not_depend_on_batch_or_threads(num_threads: int) -> None:
    rng = random.Random(1)
    word_starts = word_starts_of(1000)
    masker = make_masker(word_starts, num_threads=num_threads)
    sequences = [sequence_of("text", rng.randrange(300), 1000, rng) for _ in range(12)]
    tokens, cu_seqlens = packed(sequences)
    example_ids = np.arange(12, dtype=np.int64) * 7919
    together = masker(tokens, cu_seqlens, example_ids, epoch=2)
    seen_labels, seen_targets = 0, 0
    for index, sequence in enumerate(sequences):
        alone = make_masker(word_starts)(
            *packed([sequence]), example_ids[index : index + 1], epoch=2
        )
        begin, end = cu_seqlens[index : index + 2]
        assert together.input_ids[begin:end].tolist() == alone.input_ids.tolist()
        labels = slice(seen_labels, seen_labels + len(alone.mlm_labels))
        assert (together.mlm_positions[labels] - begin == alone.mlm_positions).all()
        assert (together.mlm_labels[labels] == alone.mlm_labels).all()
        inside = (together.sbo_left >= begin) & (together.sbo_left < end)
        assert (together.sbo_left[inside] - begin == alone.sbo_left).all()
        assert (together.sbo_right[inside] - begin == alone.sbo_right).all()
        seen_labels, seen_targets = labels.stop, seen_targets + len(alone.sbo_targets)
    assert seen_labels == len(together.mlm_labels)
    assert seen_targets == len(together.sbo_targets) == together.sbo_cu[-1]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_assembling_is_masking_of_the_same_tokens(dtype: type, num_threads: int) -> None:
    rng = np.random.default_rng(4)
    masker = make_masker(word_starts_of(60_000), num_threads=num_threads)
    offsets = np.cumsum([3, *rng.integers(0, 150, 30)])
    values = rng.integers(3, 60_000, offsets[-1] + 4).astype(dtype)
    values.flags.writeable = False
    rows = rng.permutation(30)[:17]
    example_ids = rows * 1_000_003
    out = masker.assemble(
        values, offsets, rows, example_ids, epoch=9, cls_token_id=0, sep_token_id=1
    )
    sequences = [[0, *values[offsets[row] : offsets[row + 1]].tolist(), 1] for row in rows]
    tokens, cu_seqlens = packed(sequences)
    expected = masker(tokens, cu_seqlens, example_ids, epoch=9)
    for name in MaskedBatch._fields:
        assert getattr(out, name).tolist() == getattr(expected, name).tolist(), name
    assert out.cu_seqlens.tolist() == cu_seqlens.tolist()
    assert out.position_ids.tolist() == [p for sequence in sequences for p in range(len(sequence))]
    assert {name: str(value.dtype) for name, value in out._asdict().items()} == {
        name: "int32" if name in ("cu_seqlens", "sbo_cu") else "int64" for name in out._fields
    }


def test_threads_share_one_masker() -> None:
    rng = random.Random(9)
    masker = make_masker(word_starts_of(1000), num_threads=2)
    batches = []
    for index in range(16):
        tokens, cu_seqlens = packed([sequence_of("text", 500, 1000, rng) for _ in range(4)])
        batches.append((tokens, cu_seqlens, np.arange(4) + 4 * index))
    expected = [masker(*batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for actual, wanted in zip(
                pool.map(lambda b: masker(*b), batches), expected, strict=True
            ):
                assert all((a == b).all() for a, b in zip(actual, wanted, strict=True))


def test_other_threads_run_meanwhile() -> None:
    length = 4_000_000
    tokens = np.random.default_rng(10).integers(3, 1000, length).astype(np.int32)
    cu_seqlens = np.arange(0, length + 1, 500, dtype=np.int32)
    example_ids = np.arange(len(cu_seqlens) - 1)
    masker = make_masker(word_starts_of(1000), mask_ratio=0.9)
    interval: list[float] = []

    def work() -> None:
        interval.append(time.perf_counter())
        masker(tokens, cu_seqlens, example_ids)
        interval.append(time.perf_counter())

    # With a short switch interval the other thread waits for the GIL, if at all, then not long.
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        thread = threading.Thread(target=work)
        ticks = []
        thread.start()
        while thread.is_alive():
            ticks.append(time.perf_counter())
        thread.join()
    finally:
        sys.setswitchinterval(before)
    begin, end = interval
    margin = (end - begin) / 4
    assert any(begin + margin < tick < end - margin for tick in ticks)
