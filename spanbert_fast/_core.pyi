"""C++ core of spanbert_fast: random bits, span masking, batches, segmentation.

Arrays must be C-contiguous.
"""

from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

_Int32s: TypeAlias = npt.NDArray[np.int32]
_Int64s: TypeAlias = npt.NDArray[np.int64]
_Real = TypeVar("_Real", np.float32, np.float64)

def philox4x32(counters: npt.NDArray[np.uint32], key: int) -> npt.NDArray[np.uint32]: ...
def fill_hidden_mask(
    out: npt.NDArray[np.bool_],
    positions: _Int64s,
    sequence_ids: _Int64s,
    site: int,
    seed: int,
    threshold: int,
    num_threads: int = 1,
) -> None: ...
def fill_attention_mask(
    out: npt.NDArray[np.bool_],
    sequence_id: int,
    site: int,
    seed: int,
    threshold: int,
    num_threads: int = 1,
    first_query: int = 0,
    first_key: int = 0,
) -> None: ...

class SpanMasker:
    def __init__(
        self,
        word_starts: npt.NDArray[np.bool_],
        special_token_ids: _Int32s,
        replacement_ids: _Int32s,
        *,
        mask_token_id: int,
        mask_ratio: float,
        min_span_words: int,
        length_thresholds: npt.NDArray[np.uint64],
        max_span_targets: int,
        scheme: str,
        replace_by_token: bool,
        tag_threshold: int,
        seed: int,
        rejections_per_token: int = 64,
    ) -> None: ...
    def mask(
        self,
        input_ids: _Int32s,
        cu_seqlens: _Int32s,
        example_ids: _Int64s,
        spans: _Int32s,
        epoch: int,
        num_threads: int = 1,
    ) -> tuple[_Int32s, _Int64s, _Int64s, _Int64s, _Int64s, _Int32s, _Int64s]: ...

def assemble(
    masker: SpanMasker,
    values: npt.NDArray[np.uint16] | _Int32s,
    offsets: _Int64s,
    rows: _Int64s,
    example_ids: _Int64s,
    epoch: int,
    cls_token_id: int,
    sep_token_id: int,
    num_threads: int = 1,
) -> tuple[_Int64s, _Int64s, _Int32s, _Int64s, _Int64s, _Int64s, _Int64s, _Int32s, _Int64s]: ...
def best_segmentation(
    scores: npt.NDArray[_Real], cu_seqlens: _Int32s, num_threads: int = 1
) -> tuple[_Int32s, npt.NDArray[np.float64]]: ...
def span_marginals(
    scores: npt.NDArray[_Real], cu_seqlens: _Int32s, num_threads: int = 1
) -> tuple[npt.NDArray[_Real], npt.NDArray[np.float64]]: ...
