"""Rows 8a, 8b and 9: encoding without gradients, packed, against Hugging Face and
sentence-transformers; see `inference_peers.py` for the ways they batch.

`documents` and `full-512` answer no row: they show what padding alone is worth.
"""

from __future__ import annotations

import pytest
import torch
from inference_peers import (
    make_texts,
    our_encode,
    padding_of_groups,
    peer_encode,
    text_encoders,
)
from peers import MODERN, make_model, make_modern, make_peer
from pytest_benchmark.fixture import BenchmarkFixture
from timing import DTYPES, NAMES, Case, require_dtype, time_in_turn
from workload import Setting, choose_setting, make_batch, relative_error

DEFAULT = NAMES[choose_setting().dtype]
What = tuple[str, str, str, str]
"""Workload; how the peer batches; our dtype; the peer's."""


def make_rows() -> dict[What, tuple[str, ...]]:
    """Each comparison, with the rows of the table that it answers on this machine."""
    rows: dict[What, tuple[str, ...]] = {("ragged-50", "padded", DEFAULT, "fp32"): ("8a",)}
    for dtype, suffix in (("bf16", ""), ("fp32", " (fp32)")):
        key = ("ragged-50", "padded", dtype, dtype)
        rows[key] = (*rows.get(key, ()), f"8b{suffix}")
        for workload in ("ragged-50", "sentences"):
            rows[(workload, "one by one", dtype, dtype)] = (f"9a{suffix}",)
        rows[("sentences", "sorted", dtype, dtype)] = (f"9b encoder alone{suffix}",)
    for kind in ("padded", "sorted", "one by one"):
        rows[("documents", kind, DEFAULT, DEFAULT)] = ()
    rows[("full-512", "padded", DEFAULT, DEFAULT)] = ()
    return rows


ROWS = make_rows()


@pytest.mark.parametrize(("what", "rows"), ROWS.items(), ids=["-".join(key) for key in ROWS])
def test_encode(
    benchmark: BenchmarkFixture, setting: Setting, what: What, rows: tuple[str, ...]
) -> None:
    workload, kind, own, other = what
    chosen = setting.base() if workload == "ragged-50" else setting
    lengths = chosen.lengths(workload)
    case = Case(
        rows=rows,
        workload=workload,
        peer=f"Hugging Face sdpa, {kind}",
        dtype=f"{own} / {other}",
        tokens=sum(lengths),
        padding=padding_of_groups(lengths, kind),
    )
    require_dtype(benchmark, chosen, case)
    batch, model = make_batch(chosen, workload), make_model(chosen, 0.0).eval()
    peer = peer_encode(chosen.at(DTYPES[other]), make_peer(model, "sdpa").bert.eval(), batch, kind)
    ours = our_encode(chosen.at(DTYPES[own]), model, batch)
    assert relative_error(ours(), peer()) < (3e-2 if "bf16" in case.dtype else 1e-4)
    time_in_turn(benchmark, chosen, case, ours, peer, is_warm=True)


@pytest.mark.parametrize(
    ("way", "kind"), [("eager", "padded"), ("eager", "one by one"), ("sdpa compiled", "padded")]
)
def test_other_settings(benchmark: BenchmarkFixture, setting: Setting, way: str, kind: str) -> None:
    """Hugging Face with its plain attention, and compiled."""
    lengths = setting.lengths("ragged-50")
    batch, model = make_batch(setting, "ragged-50"), make_model(setting, 0.0).eval()
    encoder = make_peer(model, way.split()[0]).bert.eval()
    if "compiled" in way:
        torch._dynamo.reset()
        encoder = torch.compile(encoder, backend=setting.sizes.compiler, dynamic=False)
    ours, peer = our_encode(setting, model, batch), peer_encode(setting, encoder, batch, kind)
    bound = 3e-2 if setting.dtype is torch.bfloat16 else 1e-4
    assert relative_error(ours(), peer()) < bound
    case = Case(
        workload="ragged-50",
        peer=f"Hugging Face {way}, {kind}",
        tokens=sum(lengths),
        padding=padding_of_groups(lengths, kind),
    )
    time_in_turn(benchmark, setting, case, ours, peer, is_warm=True)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("workload", ["ragged-50", "sentences"])
def test_sentence_transformers(
    benchmark: BenchmarkFixture, setting: Setting, workload: str, precision: str
) -> None:
    """From text to mean vectors. Four sequences are one batch to the peer, so that `ragged-50` is
    padded as without sorting.
    """
    pytest.importorskip("sentence_transformers")
    chosen = (setting.base() if workload == "ragged-50" else setting).at(DTYPES[precision])
    lengths = chosen.lengths(workload)
    case = Case(
        rows=("9b" if precision == "bf16" else "9b (fp32)",),
        workload=workload,
        peer="sentence-transformers encode, from text to mean vectors",
        dtype=f"{precision} / {precision}",
        tokens=sum(lengths),
        padding=padding_of_groups(lengths, "sorted"),
    )
    require_dtype(benchmark, chosen, case)
    model, texts = make_model(chosen, 0.0).eval(), make_texts(make_batch(chosen, workload))
    ours, peer = text_encoders(chosen, model, texts)
    assert relative_error(ours(), peer()) < (3e-2 if precision == "bf16" else 1e-4)
    time_in_turn(benchmark, chosen, case, ours, peer, is_warm=True)


@pytest.mark.parametrize("kind", ["padded", "one by one"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_modern_bert(
    benchmark: BenchmarkFixture, setting: Setting, attention: str, kind: str
) -> None:
    lengths = setting.lengths("ragged-50")
    batch, model = make_batch(setting, "ragged-50"), make_model(setting, 0.0).eval()
    encoder = make_modern(setting, attention).model.eval()
    ours, peer = our_encode(setting, model, batch), peer_encode(setting, encoder, batch, kind)
    assert peer().shape == ours().shape
    assert bool(torch.isfinite(peer()).all())
    case = Case(
        workload="ragged-50",
        peer=f"{MODERN} {attention}, {kind}",
        tokens=sum(lengths),
        padding=padding_of_groups(lengths, kind),
    )
    time_in_turn(benchmark, setting, case, ours, peer, is_warm=True)
