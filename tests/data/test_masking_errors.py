"""What the sampler answers to wrong input: the name, the value and what is allowed."""

import re

import numpy as np
import pytest
from oracles.masking_inputs import make_masker, packed, word_starts_of

INT32 = np.int32
TOKENS = np.array([3, 4, 5, 60, 6, 7], INT32)
CU_SEQLENS = np.array([0, 6], INT32)
EXAMPLE_IDS = np.array([0], np.int64)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("word_starts", [True] * 100, TypeError, "word_starts is a list, must be a numpy array"),
        (
            "word_starts",
            np.ones(100, INT32),
            TypeError,
            "word_starts has dtype int32, must be bool",
        ),
        ("word_starts", np.ones((9, 9), bool), ValueError, "word_starts has shape (9, 9)"),
        ("mask_token_id", 100, ValueError, "mask_token_id is 100, must be in [0, 99]"),
        ("mask_token_id", 1.0, TypeError, "mask_token_id is 1.0, must be an integer"),
        ("special_token_ids", [0, -1], ValueError, "special_token_ids[1] is -1"),
        ("replacement_ids", np.array([5, 1], INT32), ValueError, "replacement_ids[1] is 1"),
        ("replacement_ids", np.array([5, 2], INT32), ValueError, "replacement_ids[1] is 2"),
        ("replacement_ids", np.array([5, 100], INT32), ValueError, "replacement_ids[1] is 100"),
        ("replacement_ids", np.array([-5], INT32), ValueError, "replacement_ids[0] is -5"),
        ("replacement_ids", np.array([], INT32), ValueError, "replacement_ids is empty"),
        (
            "replacement_ids",
            np.array([5]),
            TypeError,
            "replacement_ids has dtype int64, must be int32",
        ),
        ("mask_ratio", 0.0, ValueError, "mask_ratio is 0.0, must be above 0 and below 1"),
        ("mask_ratio", 1, ValueError, "mask_ratio is 1, must be above 0 and below 1"),
        ("mask_ratio", float("nan"), ValueError, "mask_ratio is nan"),
        ("mask_ratio", "0.15", TypeError, "mask_ratio is '0.15', must be a number"),
        ("geometric_p", -0.1, ValueError, "geometric_p is -0.1"),
        ("min_span_words", 0, ValueError, "min_span_words is 0, must be in [1, 10]"),
        ("min_span_words", 11, ValueError, "min_span_words is 11, must be in [1, 10]"),
        ("max_span_words", 1025, ValueError, "max_span_words is 1025, must be in [1, 1024]"),
        ("max_span_targets", 0, ValueError, "max_span_targets is 0"),
        ("scheme", "random", ValueError, "scheme is 'random', must be one of spanbert, whole_word"),
        ("replacement", "word", ValueError, "replacement is 'word', must be one of span, token"),
        ("tag_probability", 1.1, ValueError, "tag_probability is 1.1, must be in [0, 1]"),
        ("seed", -1, ValueError, "seed is -1, must be in [0, 18446744073709551615]"),
        ("seed", True, TypeError, "seed is True, must be an integer"),
        ("num_threads", 0, ValueError, "num_threads is 0"),
    ],
)
def test_settings_out_of_range_are_refused(
    argument: str, value: object, error: type[Exception], message: str
) -> None:
    arguments: dict[str, object] = {
        "word_starts": word_starts_of(100),
        "replacement_ids": np.array([5], INT32),
    }
    with pytest.raises(error, match=re.escape(message)):
        make_masker(**(arguments | {argument: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        (
            "input_ids",
            TOKENS.astype(np.int64),
            TypeError,
            "input_ids has dtype int64, must be int32",
        ),
        ("input_ids", TOKENS.tolist(), TypeError, "input_ids is a list"),
        ("input_ids", np.repeat(TOKENS, 2)[::2], TypeError, "input_ids has strides (8,)"),
        ("input_ids", TOKENS.reshape(2, 3), ValueError, "input_ids has shape (2, 3)"),
        ("input_ids", TOKENS.astype(">i4"), TypeError, "input_ids has dtype >i4"),
        ("input_ids", TOKENS + 95, ValueError, "input_ids[2] is 100, must be in [0, 100)"),
        ("input_ids", TOKENS - 5, ValueError, "input_ids[0] is -2, must be in [0, 100)"),
        (
            "cu_seqlens",
            np.array([0, 4, 2, 6], INT32),
            ValueError,
            "cu_seqlens[2] is 2, must be at least 4",
        ),
        ("cu_seqlens", np.array([1, 6], INT32), ValueError, "cu_seqlens must begin with 0, has 1"),
        (
            "cu_seqlens",
            np.array([], INT32),
            ValueError,
            "cu_seqlens must begin with 0, has no items",
        ),
        (
            "cu_seqlens",
            np.array([0, 5], INT32),
            ValueError,
            "cu_seqlens ends with 5, must end with 6",
        ),
        (
            "cu_seqlens",
            np.array([0, 7], INT32),
            ValueError,
            "cu_seqlens ends with 7, must end with 6",
        ),
        ("cu_seqlens", np.array([0, 6]), TypeError, "cu_seqlens has dtype int64, must be int32"),
        ("example_ids", np.array([1, 2]), ValueError, "example_ids has 2 items, must have 1"),
        ("example_ids", np.array([1], INT32), TypeError, "example_ids has dtype int32"),
        ("epoch", -1, ValueError, "epoch is -1, must be in [0, 4294967295]"),
        ("spans", np.array([[0, 1]], INT32), ValueError, "the scheme 'spanbert' takes none"),
    ],
)
def test_wrong_batches_are_refused(
    argument: str, value: object, error: type[Exception], message: str
) -> None:
    batch: dict[str, object] = {
        "input_ids": TOKENS,
        "cu_seqlens": CU_SEQLENS,
        "example_ids": EXAMPLE_IDS,
    }
    with pytest.raises(error, match=re.escape(message)):
        make_masker(word_starts_of(100))(**(batch | {argument: value}))  # type: ignore[arg-type]


def test_the_first_wrong_token_is_named_whatever_the_threads() -> None:
    tokens, cu_seqlens = packed([[5] * 40] * 8)
    tokens[[100, 250]] = 777
    masker = make_masker(word_starts_of(100), num_threads=4)
    for _ in range(20):
        with pytest.raises(ValueError, match=r"input_ids\[100\] is 777"):
            masker(tokens, cu_seqlens, np.arange(8))


@pytest.mark.parametrize(
    ("spans", "error", "message"),
    [
        (None, ValueError, "spans is None, the scheme 'tagged' needs them"),
        (np.array([[0, 1]]), TypeError, "spans has dtype int64, must be int32"),
        (np.array([0, 1], INT32), ValueError, "spans has shape (2,), must have 2 dimension(s)"),
        (np.array([[0, 1, 2]], INT32), ValueError, "spans must have shape [P, 2]"),
        (np.array([[3, 3]], INT32), ValueError, "spans[0] is [3, 3), must hold a token"),
        (np.array([[-1, 3]], INT32), ValueError, "spans[0] is [-1, 3), must hold a token"),
        (np.array([[1, 3], [2, 9]], INT32), ValueError, "spans[1] is [2, 9), must hold a token"),
        (
            np.array([[5, 6], [2, 3]], INT32),
            ValueError,
            "spans[1] is [2, 3), must not begin before",
        ),
        (np.array([[1, 4]], INT32), ValueError, "spans has [1, 4), must stay in one sequence"),
        (np.array([[4, 8]], INT32), ValueError, "spans has [4, 8), must stay in one sequence"),
        (np.array([[7, 8]], INT32), ValueError, "spans has [7, 8), must stay in one sequence"),
    ],
)
def test_wrong_spans_are_refused(
    spans: np.ndarray | None, error: type[Exception], message: str
) -> None:
    tokens, cu_seqlens = packed([[3, 4, 5], [6, 7, 8, 9, 1]])
    masker = make_masker(word_starts_of(100), scheme="tagged")
    with pytest.raises(error, match=re.escape(message)):
        masker(tokens, cu_seqlens, np.arange(2), spans=spans)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("rows", np.array([0, 2]), ValueError, "rows[1] is 2, must be in [0, 2)"),
        ("rows", np.array([-1, 0]), ValueError, "rows[0] is -1, must be in [0, 2)"),
        ("rows", np.array([0, 1], INT32), TypeError, "rows has dtype int32, must be int64"),
        ("offsets", np.array([0, 4, 7]), ValueError, "offsets[1:3] are 4 and 7"),
        ("offsets", np.array([0, 4, 3]), ValueError, "offsets[1:3] are 4 and 3"),
        ("offsets", np.array([-2, 4, 6]), ValueError, "offsets[0:2] are -2 and 4"),
        ("offsets", np.array([], np.int64), ValueError, "offsets has no items"),
        (
            "values",
            TOKENS.astype(np.int64),
            TypeError,
            "values has dtype int64, must be uint16 or int32",
        ),
        ("values", TOKENS + 95, ValueError, "input_ids[3] is 100, must be in [0, 100)"),
        ("example_ids", np.array([0]), ValueError, "example_ids has 1 items, must have 2"),
        (
            "cls_token_id",
            5,
            ValueError,
            "cls_token_id and sep_token_id are 5 and 1, must be special",
        ),
        ("sep_token_id", 100, ValueError, "sep_token_id is 100, must be in [0, 99]"),
    ],
)
def test_wrong_rows_are_refused(
    argument: str, value: object, error: type[Exception], message: str
) -> None:
    store: dict[str, object] = {
        "values": TOKENS,
        "offsets": np.array([0, 4, 6]),
        "rows": np.array([0, 1]),
        "example_ids": np.array([0, 1]),
        "epoch": 0,
        "cls_token_id": 0,
        "sep_token_id": 1,
    }
    with pytest.raises(error, match=re.escape(message)):
        make_masker(word_starts_of(100)).assemble(**(store | {argument: value}))  # type: ignore[arg-type]


def test_a_token_store_cannot_be_tagged() -> None:
    masker = make_masker(word_starts_of(100), scheme="tagged")
    rows = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="scheme is 'tagged'"):
        masker.assemble(
            TOKENS, np.array([0, 6]), rows, rows, epoch=0, cls_token_id=0, sep_token_id=1
        )
