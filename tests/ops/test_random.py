"""The dropout stream: C++ and torch bodies against a Philox in plain Python integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spanbert_fast import _core
from spanbert_fast.ops.random import (
    attention_keep_mask,
    dropout_scale,
    dropout_threshold,
    hidden_keep_mask,
    hidden_keep_mask_torch,
    philox4x32_torch,
    plane_keep_mask,
    plane_keep_mask_torch,
    token_places,
)

LOW = 2**32 - 1
CHECK = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
IDS = [0, 1, 2**31, 2**32 + 5, 2**40 + 7, -3]


def philox(counter: list[int], key: int) -> list[int]:
    """Salmon et al. 2011, figure 2, ten rounds."""
    c0, c1, c2, c3 = (word & LOW for word in counter)
    k0, k1 = key & LOW, (key >> 32) & LOW
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & LOW, (p0 >> 32) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return [c0, c1, c2, c3]


def keeps(column: int, row: int, plane: int, site: int, key: int, threshold: int) -> bool:
    word = philox([column // 8, row, plane, site], key)[column % 8 // 2]
    return (word >> 16 * (column % 2)) & 0xFFFF >= threshold


def test_check_vector() -> None:
    zeros = [torch.tensor(0)] * 4
    assert philox([0] * 4, 0) == CHECK
    assert [int(word) for word in philox4x32_torch(zeros, torch.tensor(0))] == CHECK
    assert _core.philox4x32(np.zeros((1, 4), np.uint32), 0).tolist() == [CHECK]


def test_all_bodies_of_philox_agree(seed: Tensor) -> None:
    counters = torch.randint(0, 2**32, (50, 4))
    twin = torch.stack(philox4x32_torch(counters.unbind(1), seed), dim=1)
    key = int(seed) & (2**64 - 1)
    assert twin.tolist() == [philox(row, key) for row in counters.tolist()]
    assert twin.tolist() == _core.philox4x32(counters.numpy().astype(np.uint32), key).tolist()


@pytest.mark.parametrize("hidden_size", [1, 8, 13, 128, 131])
def test_hidden_masks_agree_bit_for_bit(hidden_size: int, seed: Tensor) -> None:
    ids, positions = torch.tensor(IDS), torch.tensor([0, 1, 511, 2, 77, 3])
    keep = hidden_keep_mask(positions, ids, hidden_size, 0.3, seed, site=5)
    threshold = dropout_threshold(0.3)
    expected = [
        [keeps(d, position, name, 5, int(seed), threshold) for d in range(hidden_size)]
        for position, name in zip(positions.tolist(), IDS, strict=True)
    ]
    assert keep.tolist() == expected
    twin = hidden_keep_mask_torch(positions, ids, hidden_size, threshold, seed, 5)
    assert torch.equal(keep, twin)


@pytest.mark.parametrize("sequence_id", IDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 9), (2, 3, 130)])
def test_attention_masks_agree_bit_for_bit(
    sequence_id: int, shape: tuple[int, int, int], seed: Tensor
) -> None:
    heads, queries, keys = shape
    keep = attention_keep_mask(heads, queries, keys, sequence_id, 0.1, seed, site=4)
    threshold = dropout_threshold(0.1)
    planes = [sequence_id * heads + head for head in range(heads)]
    expected = [
        [[keeps(k, q, plane, 4, int(seed), threshold) for k in range(keys)] for q in range(queries)]
        for plane in planes
    ]
    assert keep.tolist() == expected
    assert torch.equal(keep, plane_keep_mask_torch(planes, queries, keys, threshold, seed, 4))


@pytest.mark.parametrize("planes", [[], [5], [4, 5, 6, 7], [5, 6, 7], [9, 3, 4, 3], [3, 4, 5, 8]])
def test_planes_are_filled_alike_in_any_grouping(planes: list[int], seed: Tensor) -> None:
    keep = plane_keep_mask(planes, 6, 11, 30000, seed, 1)
    for plane, mask in zip(planes, keep, strict=True):
        assert torch.equal(mask, plane_keep_mask([plane], 6, 11, 30000, seed, 1)[0])


def test_mask_of_a_tile_is_cut_from_the_whole(seed: Tensor) -> None:
    whole, place = plane_keep_mask([4, 5], 40, 60, 30000, seed, 1), {"first_query": 13}
    for make in (plane_keep_mask, plane_keep_mask_torch):
        tile = make([4, 5], 7, 21, 30000, seed, 1, first_key=24, **place)
        assert torch.equal(tile, whole[:, 13:20, 24:45])


def test_threads_change_nothing(seed: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    positions, ids = torch.arange(600), torch.zeros(600, dtype=torch.int64)
    one = hidden_keep_mask(positions, ids, 1024, 0.1, seed, 2)
    planes = plane_keep_mask(range(3), 512, 512, 6554, seed, 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(one, hidden_keep_mask(positions, ids, 1024, 0.1, seed, 2))
    assert torch.equal(planes, plane_keep_mask(range(3), 512, 512, 6554, seed, 2))


def test_rate_is_the_rounded_probability(seed: Tensor) -> None:
    positions, ids = torch.arange(1000), torch.zeros(1000, dtype=torch.int64)
    for p in (0.1, 0.5):
        keep = hidden_keep_mask(positions, ids, 1000, p, seed, 1)
        rate = dropout_threshold(p) / 65536
        deviation = (1e6 * rate * (1 - rate)) ** 0.5
        assert abs(int((~keep).sum()) - 1e6 * rate) < 4 * deviation
        assert dropout_scale(p) == 1 / (1 - rate)


def test_sites_sequences_positions_and_seeds_differ() -> None:
    def mask(position: int = 0, name: int = 0, seed: int = 0, site: int = 1) -> tuple[bool, ...]:
        keep = hidden_keep_mask(
            torch.tensor([position]), torch.tensor([name]), 64, 0.5, torch.tensor(seed), site
        )
        return tuple(keep[0].tolist())

    masks = {mask(), mask(position=1), mask(name=1), mask(seed=1), mask(seed=2**32), mask(site=2)}
    assert len(masks) == 6


def test_threshold_refuses_what_keeps_nothing() -> None:
    assert dropout_threshold(0.0) == 0
    assert dropout_threshold(65535 / 65536) == 65535
    for p in (-0.1, 1.0, 0.999999, 2.0, float("nan")):
        with pytest.raises(ValueError, match=r"dropout_p is .*, allowed is 0 <="):
            dropout_threshold(p)


def test_token_places(cu_seqlens: Tensor) -> None:
    sequences, positions = token_places(cu_seqlens, 20)
    assert sequences.tolist() == [1] * 5 + [2] * 5 + [3] * 3 + [5] * 7
    assert positions.tolist() == [*range(5), *range(5), *range(3), *range(7)]
