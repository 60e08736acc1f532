"""Rows 8 and 9: encoding without gradients, packed, against Hugging Face padded and one by one.

Peers, all with the weights of ours: one padded batch, length-sorted batches of 32 (what
sentence-transformers does when it encodes), and one sequence at a time without padding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peers import autocast, make_model, make_peer
from pytest_benchmark.fixture import BenchmarkFixture
from timing import DTYPES, NAMES, Case, padding_of, require_dtype, skip, time_in_turn
from torch import Tensor
from workload import ALL_WORKLOADS, Setting, choose_setting, make_batch, relative_error

DEFAULT = NAMES[choose_setting().dtype]
BATCH = 32
Encode = Callable[[], Tensor]


def groups_of(lengths: list[int], kind: str) -> list[list[int]]:
    """Which sequences a peer takes together, in which order."""
    if kind == "padded":
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    size = 1 if kind == "one by one" else BATCH
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def peer_encode(setting: Setting, encoder: torch.nn.Module, batch, kind: str) -> Encode:
    """Hidden states of the real words in packed order, [T, D]."""
    lengths = batch.cu_seqlens.diff().tolist()
    parts = batch.input_ids.split(lengths)
    inputs = []
    groups = groups_of(lengths, kind)
    for group in groups:
        ids = torch.nn.utils.rnn.pad_sequence([parts[i] for i in group], batch_first=True)
        sizes = torch.tensor([lengths[i] for i in group])
        mask = (torch.arange(ids.shape[1]) < sizes[:, None]).long()
        inputs.append(
            {"input_ids": ids} if mask.all() else {"input_ids": ids, "attention_mask": mask}
        )

    def encode() -> Tensor:
        found: dict[int, Tensor] = {}
        with torch.inference_mode(), autocast(setting):
            for group, part in zip(groups, inputs, strict=True):
                hidden = encoder(**part).last_hidden_state
                found |= {i: row[: lengths[i]] for i, row in zip(group, hidden, strict=True)}
            return torch.cat([found[i] for i in range(len(lengths))])

    return encode


def our_encode(setting: Setting, model, batch) -> Encode:
    """The same by one packed pass."""

    def encode() -> Tensor:
        with torch.inference_mode(), autocast(setting):
            return model.bert.encode_packed(batch).last_hidden_state

    return encode


ROWS = {
    ("ragged-50", "padded", DEFAULT, "fp32"): ("8a",),
    ("ragged-50", "padded", "bf16", "bf16"): ("8b",),
    ("ragged-50", "padded", "fp32", "fp32"): ("8b (fp32)",),
    **{(w, "one by one", "bf16", "bf16"): ("9a",) for w in ("ragged-50", "sentences")},
    **{(w, "one by one", "fp32", "fp32"): ("9a (fp32)",) for w in ("ragged-50", "sentences")},
    **{(w, "sorted", "bf16", "bf16"): ("9b",) for w in ("ragged-50", "sentences")},
    **{(w, "sorted", "fp32", "fp32"): ("9b (fp32)",) for w in ("ragged-50", "sentences")},
    ("documents", "sorted", DEFAULT, DEFAULT): (),
    ("full-512", "padded", DEFAULT, DEFAULT): (),
}
if DEFAULT == "fp32":  # the out-of-the-box row and the fp32 counterpart are one comparison
    ROWS[("ragged-50", "padded", "fp32", "fp32")] = ("8a", "8b (fp32)")


@pytest.mark.parametrize(("what", "rows"), ROWS.items(), ids=["-".join(key) for key in ROWS])
def test_encode(
    benchmark: BenchmarkFixture,
    setting: Setting,
    what: tuple[str, str, str, str],
    rows: tuple[str, ...],
) -> None:
    workload, kind, own, other = what
    assert workload in ALL_WORKLOADS
    chosen = setting.base() if workload == "ragged-50" else setting
    lengths = chosen.lengths(workload)
    groups = groups_of(lengths, kind)
    slots = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    case = Case(
        rows=rows,
        workload=workload,
        peer=f"Hugging Face sdpa, {kind}",
        dtype=f"{own} / {other}",
        tokens=sum(lengths),
        padding=1 - sum(lengths) / slots,
    )
    require_dtype(benchmark, chosen, case)
    batch, model = make_batch(chosen, workload), make_model(chosen, 0.0).eval()
    peer = peer_encode(chosen.at(DTYPES[other]), make_peer(model, "sdpa").bert.eval(), batch, kind)
    ours = our_encode(chosen.at(DTYPES[own]), model, batch)
    assert relative_error(ours(), peer()) < (3e-2 if "bf16" in case.dtype else 1e-4)
    time_in_turn(benchmark, chosen, case, ours, peer, is_warm=True)


@pytest.mark.parametrize(("row", "kind"), [("10a", "padded"), ("10b", "one by one")])
def test_int8(benchmark: BenchmarkFixture, setting: Setting, row: str, kind: str) -> None:
    """The hook for the int8 path: it has a case when ours has the export."""
    lengths = setting.lengths("ragged-50")
    case = Case(
        rows=(row,),
        workload="ragged-50",
        peer=f"ONNX Runtime int8, {kind}",
        dtype="int8 / int8",
        padding=padding_of(lengths) if kind == "padded" else 0.0,
    )
    skip(benchmark, setting, case, "the int8 comparison has no case yet")
