"""Rows 1 to 5 and 7: a training step of BERT base, forward and backward, without the optimizer.

The peers get the same weights, words, dropout and dtype, and ours learns what they learn: masked
words; in row 7 both learn both objectives. The losses are compared first: without dropout, on two
sequences (row 7: on all), and with dropout, of the very steps that are timed. `bench_step` compares
encoder outputs and gradients as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peers import (
    MODERN,
    make_model,
    make_modern,
    make_peer,
    our_step,
    padded,
    peer_step,
    step_of,
    without_spans,
)
from pytest_benchmark.fixture import BenchmarkFixture
from reference_layout import heads_loss, pad_targets
from timing import DTYPES, NAMES, Case, padding_of, require_dtype, time_in_turn
from torch import Tensor
from workload import Setting, choose_setting, make_batch, relative_error

DROPOUT = 0.1
DEFAULT = NAMES[choose_setting().dtype]
"""Precision that pre-training chooses on this machine."""
# Rows; workload; peer, see `peers.py`; our dtype and the peer's. The best setting of a peer decodes
# no word without a label; the default decodes all. Of `ragged-50` the looped one is stronger still.
TABLE = (
    ("1", "full-512", "sdpa", DEFAULT, "fp32"),
    ("2", "full-512", "sdpa", "bf16", "bf16"),
    ("2 (fp32)", "full-512", "sdpa", "fp32", "fp32"),
    ("2 best setting", "full-512", "sdpa masked", "bf16", "bf16"),
    ("2 best setting (fp32)", "full-512", "sdpa masked", "fp32", "fp32"),
    ("3", "full-512", "sdpa compiled", "bf16", "bf16"),
    ("3 (fp32)", "full-512", "sdpa compiled", "fp32", "fp32"),
    ("4a", "ragged-50", "sdpa", DEFAULT, "fp32"),
    ("4b", "ragged-50", "sdpa", "bf16", "bf16"),
    ("4b (fp32)", "ragged-50", "sdpa", "fp32", "fp32"),
    ("5", "ragged-50", "sdpa looped", "bf16", "bf16"),
    ("5 (fp32)", "ragged-50", "sdpa looped", "fp32", "fp32"),
    ("5 best setting", "ragged-50", "sdpa masked looped", "bf16", "bf16"),
    ("5 best setting (fp32)", "ragged-50", "sdpa masked looped", "fp32", "fp32"),
)
OTHERS = tuple(
    (workload, kind, DEFAULT, DEFAULT)
    for workload in ("full-512", "ragged-50")
    for kind in ("eager", "sdpa masked compiled")
)
"""Further settings of the peer, which answer no row; of a smaller model."""


def merged() -> Iterator[tuple[tuple[str, ...], tuple[str, str, str, str]]]:
    """Each comparison once, with all rows that it answers on this machine."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for row, *what in TABLE:
        rows.setdefault((what[0], what[1], what[2], what[3]), []).append(row)
    for key, names in rows.items():
        yield tuple(names), key


CASES = [
    pytest.param(rows, what, id=f"{'small-' if not rows else ''}{'-'.join(what)}")
    for rows, what in (*merged(), *(((), what) for what in OTHERS))
]


@pytest.mark.parametrize(("rows", "what"), CASES)
def test_step(
    benchmark: BenchmarkFixture,
    setting: Setting,
    rows: tuple[str, ...],
    what: tuple[str, str, str, str],
) -> None:
    workload, kind, own, other = what
    base = setting.base() if rows else setting
    lengths = base.lengths(workload)
    case = Case(
        rows=rows,
        workload=workload,
        peer=f"Hugging Face {kind}",
        dtype=f"{own} / {other}",
        dropout=DROPOUT,
        tokens=sum(lengths),
        padding=0.0 if "looped" in kind else padding_of(lengths),
    )
    require_dtype(benchmark, base, case)
    batch = without_spans(make_batch(base, workload))
    few, exact = without_spans(make_batch(base, workload, num_sequences=2)), make_model(base, 0.0)
    for dtype in {own, other}:
        assert_same_loss(base.at(DTYPES[dtype]), exact, few, kind)
    del exact
    model = make_model(base, DROPOUT)
    ours = our_step(base.at(DTYPES[own]), model, batch)
    peer = peer_step(base.at(DTYPES[other]), model, batch, kind)
    # Dropout draws other bits on each side.
    assert relative_error(ours(), peer()) < 5e-2
    time_in_turn(benchmark, base, case, ours, peer, is_warm=True)


def assert_same_loss(setting: Setting, model: torch.nn.Module, batch, kind: str) -> None:
    """Compares our loss of the same words with the peer's, both without dropout."""
    plain = kind.replace(" compiled", "")
    peer = peer_step(setting, model, batch, plain)
    with torch.no_grad():
        found, expected = our_step(setting, model, batch)(), peer()
    assert relative_error(found, expected) < (5e-3 if setting.dtype is torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_reference_layout(benchmark: BenchmarkFixture, setting: Setting, precision: str) -> None:
    base = setting.base().at(DTYPES[precision])
    lengths = base.lengths("ragged-50")
    case = Case(
        rows=("7",) if precision == "bf16" else ("7 (fp32)",),
        workload="ragged-50",
        peer="layout of the reference",
        dtype=f"{precision} / {precision}",
        dropout=DROPOUT,
        tokens=sum(lengths),
        padding=padding_of(lengths),
    )
    require_dtype(benchmark, base, case)
    batch = make_batch(base, "ragged-50")
    steps = {p: both_steps(base, batch, p) for p in (0.0, DROPOUT)}
    ours, peer = steps[0.0]
    with torch.no_grad():
        assert relative_error(ours(), peer()) < (5e-3 if precision == "bf16" else 1e-4)
    del steps[0.0], ours, peer
    time_in_turn(benchmark, base, case, *steps[DROPOUT])


def both_steps(setting: Setting, batch, dropout: float):
    """Ours, and Hugging Face's encoder under heads in the reference's layout."""
    model = make_model(setting, dropout)
    encoder = make_peer(model, "sdpa").bert
    encoder.set_input_embeddings(model.get_input_embeddings())
    wanted = pad_targets(batch, model.config.max_span_targets)
    inputs = {name: value for name, value in padded(batch).items() if name != "labels"}

    def loss() -> Tensor:
        return heads_loss(model, encoder(**inputs).last_hidden_state, wanted)

    both = torch.nn.ModuleList([model, encoder])
    return our_step(setting, model, batch), step_of(setting, both, loss)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("workload", ["full-512", "ragged-50"])
def test_modern_bert(
    benchmark: BenchmarkFixture, setting: Setting, workload: str, attention: str
) -> None:
    """No dropout on either side: ModernBERT has none in its attention."""
    batch = without_spans(make_batch(setting, workload))
    lengths = setting.lengths(workload)
    model, peer, inputs = make_model(setting, 0.0), make_modern(setting, attention), padded(batch)
    with torch.no_grad():
        shape = (*inputs["input_ids"].shape, setting.sizes.vocab_size)
        assert peer(**inputs).logits.shape == shape

    def loss() -> Tensor:
        value: Tensor = peer(**inputs).loss
        return value

    step = step_of(setting, peer, loss)
    assert bool(step().isfinite())
    case = Case(
        workload=workload,
        peer=f"{MODERN} {attention}",
        tokens=sum(lengths),
        padding=padding_of(lengths),
    )
    time_in_turn(benchmark, setting, case, our_step(setting, model, batch), step)
