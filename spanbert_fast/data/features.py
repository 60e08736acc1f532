"""One example as a data set hands it to a collator: read, checked and named."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

_INT64: Final = range(-(2**63), 2**63)


class Feature(NamedTuple):
    """The n tokens of one example, without the padding that it may have come with."""

    input_ids: npt.NDArray[np.int32]
    """int32 [n]."""
    token_type_ids: npt.NDArray[np.int64] | None
    """int64 [n], if the example has them."""
    is_protected: npt.NDArray[np.bool_] | None
    """bool [n], tokens that must not be masked, whatever their ids are."""
    padding_before: int
    """Number of columns of padding before the first token."""
    padding_behind: int
    """Number of columns of padding behind the last token."""


def read_feature(index: int, feature: object, vocabulary_size: int) -> Feature:
    """What a collator needs of `features[index]`.

    Args:
        index: place in the batch, for messages.
        feature: a mapping with `input_ids` and, if there are any, `attention_mask`,
            `token_type_ids` and `special_tokens_mask`: lists, numpy arrays or tensors.
        vocabulary_size: V; ids must be below it.

    Raises:
        TypeError: the feature is no mapping, or a column does not hold integers.
        ValueError: a column is missing, has another shape or a value out of range, or there is
            padding between tokens.
    """
    if not isinstance(feature, Mapping):
        raise TypeError(
            f"features[{index}] is a {type(feature).__name__}, must be a mapping with input_ids"
        )
    if "input_ids" not in feature:
        raise ValueError(f"features[{index}] has {sorted(feature)}, must have input_ids")
    ids = _integers(index, "input_ids", feature["input_ids"])
    if len(ids) == 0:
        raise ValueError(f"input_ids of features[{index}] is empty, must hold at least one id")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary_size:
        raise ValueError(
            f"input_ids of features[{index}] holds {low if low < 0 else high}, must be in "
            f"[0, {vocabulary_size}), the vocabulary of the tokenizer"
        )
    begin, end = _real_columns(index, feature, len(ids))
    types = feature.get("token_type_ids")
    if types is not None:
        types = _integers(index, "token_type_ids", types, len(ids))[begin:end]
    protected = _flags(index, "special_tokens_mask", feature, len(ids))
    return Feature(
        ids[begin:end].astype(np.int32),
        types,
        None if protected is None else protected[begin:end] == 1,
        begin,
        len(ids) - end,
    )


def _real_columns(index: int, feature: Mapping[str, Any], length: int) -> tuple[int, int]:
    """First column that is not padding, and the column after the last one."""
    mask = _flags(index, "attention_mask", feature, length)
    if mask is None:
        return 0, length
    real = np.flatnonzero(mask)
    if len(real) == 0 or real[-1] - real[0] + 1 != len(real):
        raise ValueError(
            f"attention_mask of features[{index}] is {mask[:32].tolist()}, must be 1 on one run of "
            "tokens and 0 only before and behind it"
        )
    return int(real[0]), int(real[-1]) + 1


def _flags(
    index: int, name: str, feature: Mapping[str, Any], length: int
) -> npt.NDArray[np.int64] | None:
    if feature.get(name) is None:
        return None
    flags = _integers(index, name, feature[name], length)
    if flags.min() < 0 or flags.max() > 1:
        raise ValueError(f"{name} of features[{index}] must hold zeros and ones")
    return flags


def _integers(
    index: int, name: str, value: object, length: int | None = None
) -> npt.NDArray[np.int64]:
    array = np.asarray(value)
    if array.ndim != 1 or (length is not None and len(array) != length):
        wanted = "one dimension" if length is None else f"{length} values, as input_ids"
        raise ValueError(f"{name} of features[{index}] has shape {array.shape}, must have {wanted}")
    # An empty list becomes an array of floats.
    if array.dtype.kind not in "biu" and array.size:
        raise TypeError(f"{name} of features[{index}] has dtype {array.dtype}, must be integers")
    return array.astype(np.int64)


def content_id(input_ids: npt.NDArray[np.int32]) -> int:
    """A 64-bit hash of an example's ids, as a signed integer; the same on every machine."""
    digest = hashlib.blake2b(input_ids.astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def column_id(index: int, name: str, value: object) -> int:
    """The name of an example in the random stream, from a column of the data set.

    Args:
        index: place in the batch, for messages.
        name: of the column.
        value: an integer of 64 bits, taken as it is, or a string, of which a 64-bit hash is taken.

    Raises:
        TypeError: the value is something else.
        ValueError: the integer has more than 64 bits.
    """
    if isinstance(value, str):
        digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} of features[{index}] is {value!r}, must be an integer or a string")
    if number not in _INT64:
        raise ValueError(f"{name} of features[{index}] is {number}, must fit into 64 bits")
    return number
