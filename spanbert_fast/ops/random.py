"""Dropout masks: a pure function of seed, place in the model, sequence and position.

Philox4x32-10 (Salmon et al. 2011) turns a counter of four 32-bit words and a key of two into four
random words, read as eight 16-bit lanes, low half first. An element is dropped iff its lane is
below `dropout_threshold(p)`. No mask depends on how a batch is put together or split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spanbert_fast import _core

LANES = 8
"""16-bit lanes of one counter; neighbouring columns share a counter."""

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Below this number of elements a thread costs more than it saves.
_ELEMENTS_PER_THREAD = 1 << 18


def dropout_threshold(p: float) -> int:
    """The number of 16-bit lanes, of 65,536, that mean "dropped".

    Raises:
        ValueError: `p` is outside [0, 1), or so close to 1 that nothing would be kept.
    """
    threshold = round(p * 65536) if 0.0 <= p < 1.0 else 65536
    if threshold == 65536:
        raise ValueError(f"dropout_p is {p}, allowed is 0 <= dropout_p <= 65535/65536")
    return threshold


def dropout_scale(p: float) -> float:
    """Factor of what is kept: 1 / (the true probability of keeping)."""
    return 65536 / (65536 - dropout_threshold(p))


def token_places(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Index of the sequence, and position in it, of each packed token: two int64 [T].

    Args:
        cu_seqlens: int32 [B + 1].
        num_tokens: T, equal to the last boundary.
    """
    rows = torch.arange(num_tokens, device=cu_seqlens.device)
    boundaries = cu_seqlens.to(torch.int64)
    if torch.compiler.is_exporting():
        # The same in operators that ONNX has: how many sequences have ended at or before a row.
        ended = rows.new_zeros(num_tokens + 1)
        ended = ended.scatter_add(0, boundaries[1:], torch.ones_like(boundaries[1:]))
        sequences = ended.cumsum(0)[:num_tokens]
    else:
        sequences = torch.searchsorted(boundaries[1:], rows, right=True)
    return sequences, rows - boundaries.index_select(0, sequences)


def hidden_keep_mask(
    positions: Tensor, sequence_ids: Tensor, hidden_size: int, p: float, seed: Tensor, site: int
) -> Tensor:
    """Which hidden elements are kept: bool [T, D].

    Counter: (column div 8, position, sequence id, site), each mod 2^32.

    Args:
        positions: int64 [T], position of each token in its own sequence.
        sequence_ids: int64 [T], id of the sequence of each token.
        hidden_size: D.
        p: Probability of dropping, rounded to a multiple of 1/65536.
        seed: int64 scalar, the key.
        site: Which dropout of the model this is.
    """
    threshold = dropout_threshold(p)
    keep: Tensor = _hidden_keep_mask(positions, sequence_ids, hidden_size, threshold, seed, site)
    return keep


def attention_keep_mask(
    num_heads: int,
    num_queries: int,
    num_keys: int,
    sequence_id: int,
    p: float,
    seed: Tensor,
    site: int,
) -> Tensor:
    """Which attention probabilities of one sequence are kept: bool [H, queries, keys].

    Counter: (key div 8, query, sequence id * H + head, site), each mod 2^32.

    Args:
        num_heads: H.
        num_queries: Queries of the sequence.
        num_keys: Keys of the sequence.
        sequence_id: Id of the sequence.
        p: Probability of dropping, rounded to a multiple of 1/65536.
        seed: int64 scalar, the key; the mask is made on its device.
        site: Which dropout of the model this is.
    """
    planes = range(sequence_id * num_heads, (sequence_id + 1) * num_heads)
    return plane_keep_mask(planes, num_queries, num_keys, dropout_threshold(p), seed, site)


def plane_keep_mask(
    planes: Sequence[int],
    num_queries: int,
    num_keys: int,
    threshold: int,
    seed: Tensor,
    site: int,
    *,
    first_query: int = 0,
    first_key: int = 0,
) -> Tensor:
    """The masks of some heads of some sequences: bool [planes, queries, keys].

    Args:
        planes: sequence id * H + head of each.
        num_queries: Queries of each plane.
        num_keys: Keys of each plane.
        threshold: Lanes that mean "dropped".
        seed: int64 scalar, the key; the mask is made on its device.
        site: Which dropout of the model this is.
        first_query: Query of the first row.
        first_key: Key of the first column, a multiple of 8.
    """
    if seed.device.type != "cpu":
        places = (first_query, first_key)
        return plane_keep_mask_torch(planes, num_queries, num_keys, threshold, seed, site, *places)
    keep = torch.empty((len(planes), num_queries, num_keys), dtype=torch.bool)
    key, threads = int(seed) & (2**64 - 1), _num_threads(keep.numel())
    buffer = keep.numpy()
    for part in _runs(planes):
        # The counter word is plane = sequence id * H + head, whatever H a call says.
        size = part.stop - part.start
        place = {"first_query": first_query, "first_key": first_key}
        _core.fill_attention_mask(
            buffer[part], planes[part.start] // size, site, key, threshold, threads, **place
        )
    return keep


def plane_keep_mask_torch(
    planes: Sequence[int],
    num_queries: int,
    num_keys: int,
    threshold: int,
    seed: Tensor,
    site: int,
    first_query: int = 0,
    first_key: int = 0,
) -> Tensor:
    """The torch twin of `plane_keep_mask`, on any device."""
    device = seed.device
    counters = (
        torch.arange(-(-num_keys // LANES), device=device) + first_key // LANES,
        torch.arange(num_queries, device=device)[:, None] + first_query,
        torch.tensor([plane & _LOW for plane in planes], device=device, dtype=torch.int64)[
            :, None, None
        ],
        torch.tensor(site, device=device),
    )
    return _lanes(counters, seed)[..., :num_keys] >= threshold


def hidden_keep_mask_torch(
    positions: Tensor,
    sequence_ids: Tensor,
    hidden_size: int,
    threshold: int,
    seed: Tensor,
    site: int,
) -> Tensor:
    """The torch twin of `hidden_keep_mask`, on any device; takes the threshold."""
    counters = (
        torch.arange(-(-hidden_size // LANES), device=positions.device),
        positions[:, None] & _LOW,
        sequence_ids[:, None] & _LOW,
        torch.tensor(site, device=positions.device),
    )
    return _lanes(counters, seed)[..., :hidden_size] >= threshold


def philox4x32_torch(counters: Sequence[Tensor], seed: Tensor) -> list[Tensor]:
    """Four random words for each counter, as int64 tensors with values below 2^32.

    Args:
        counters: Four int64 tensors with values below 2^32 that broadcast against each other.
        seed: int64 scalar, the key (low word, high word).
    """
    # Each word depends on every counter word after five rounds, so the first rounds may stay small.
    words = list(counters)
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(_ROUNDS):
        low0, high0 = _multiply(words[0], _MULTIPLIERS[0])
        low1, high1 = _multiply(words[2], _MULTIPLIERS[1])
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(word + step) & _LOW for word, step in zip(key, _WEYL, strict=True)]
    return words


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Low and high word of a 32 x 32 bit product, in halves so that no int64 overflows."""
    low = (word & 0xFFFF) * factor
    high = (word >> 16) * factor + (low >> 16)
    return ((high & 0xFFFF) << 16) | (low & 0xFFFF), high >> 16


def _lanes(counters: Sequence[Tensor], seed: Tensor) -> Tensor:
    """The 16-bit lanes in the order of columns: [..., 8 * last size of the counters]."""
    words = torch.stack(philox4x32_torch(counters, seed), dim=-1)
    return torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(-3)


def _runs(planes: Sequence[int]) -> Iterator[slice]:
    """Parts that one call can fill: consecutive planes from a multiple of their number, or one."""
    start = 0
    while start < len(planes):
        stop = start + 1
        while stop < len(planes) and planes[stop] == planes[stop - 1] + 1:
            stop += 1
        if planes[start] % (stop - start):
            stop = start + 1
        yield slice(start, stop)
        start = stop


def _num_threads(num_elements: int) -> int:
    return min(torch.get_num_threads(), 1 + num_elements // _ELEMENTS_PER_THREAD)


@torch.library.custom_op("spanbert_fast::hidden_keep_mask", mutates_args=())
def _hidden_keep_mask(
    positions: Tensor,
    sequence_ids: Tensor,
    hidden_size: int,
    threshold: int,
    seed: Tensor,
    site: int,
) -> Tensor:
    if positions.device.type != "cpu":
        return hidden_keep_mask_torch(positions, sequence_ids, hidden_size, threshold, seed, site)
    keep = torch.empty((positions.shape[0], hidden_size), dtype=torch.bool)
    _core.fill_hidden_mask(
        keep.numpy(),
        positions.contiguous().numpy(),
        sequence_ids.contiguous().numpy(),
        site,
        int(seed) & (2**64 - 1),
        threshold,
        num_threads=_num_threads(keep.numel()),
    )
    return keep


@_hidden_keep_mask.register_fake
def _(
    positions: Tensor,
    sequence_ids: Tensor,
    hidden_size: int,
    threshold: int,
    seed: Tensor,
    site: int,
) -> Tensor:
    return positions.new_empty((positions.shape[0], hidden_size), dtype=torch.bool)
