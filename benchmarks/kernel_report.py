"""Writes what the compiled kernels need of a GPU: `kernels/report.md` and `kernels/report.png`.

`make kernel-report` runs this. Every kernel is compiled ahead of time with the settings that a
launch would choose; nothing is run on a GPU, and equal versions write equal files.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from kernel_picture import draw
from kernels import in_process
from kernels.attention_compiled import (
    KERNELS,
    MAX_DROPOUT_INSTRUCTIONS,
    Variant,
    dropout_instructions,
    instructions_per_score,
)
from kernels.attention_compiled import compiled as compiled_attention
from kernels.compiled import MULTIPROCESSOR, TOOLS, Compiled, Occupancy
from kernels.row_cases import OPS
from kernels.row_launches import Launch
from kernels.rows_compiled import USUAL, launches_of
from kernels.rows_compiled import compiled as compiled_rows

from spanbert_fast.kernels import common

FOLDER = Path(__file__).resolve().parent / "kernels"
SIZE, FEED_FORWARD = 768, 3072
# As many rows as make the vocabulary fall into several chunks, which takes one more kernel.
_SHAPES = {
    "bias_gelu": USUAL._replace(size=FEED_FORWARD),
    "linear_cross_entropy": USUAL._replace(rows=1300),
}
# Constants of a kernel that give its tile.
_EXTENTS = ("ROWS", "SPANS", "WINDOW", "BLOCK", "COLUMNS", "INNER")
_FORWARD = ("forward", "score_vocabulary", "merge_parts")
_NONE = "none"
Traffic = dict[tuple[str, str], float]


class Row(NamedTuple):
    """One kernel as it is compiled for one GPU."""

    arch: int
    op: str
    kernel: str
    variant: str
    tile: tuple[int, ...]
    num_warps: int
    num_stages: int
    code: Compiled
    per_score: float | None

    @property
    def label(self) -> str:
        name = self.op if self.kernel in ("_forward", "_backward") else ""
        name += self.kernel if name else self.kernel.removeprefix("_")
        return name if self.variant == _NONE else f"{name}, {self.variant}"

    @property
    def is_forward(self) -> bool:
        return self.kernel.endswith(_FORWARD)

    @property
    def occupancy(self) -> Occupancy:
        return self.code.occupancy(self.arch, self.num_warps)


def attention_rows(arch: int) -> Iterator[Row]:
    """The attention kernels for bfloat16, head size 64, 512 tokens."""
    for name in KERNELS:
        for has_dropout in (False, True):
            variant = Variant(arch, name, has_dropout=has_dropout)
            settings = variant.settings
            yield Row(
                arch,
                "varlen_attention",
                f"attention_{name}",
                "dropout" if has_dropout else "no dropout",
                settings[:2],
                settings.num_warps,
                settings.num_stages,
                compiled_attention(variant),
                instructions_per_score(variant),
            )


def other_rows(arch: int) -> Iterator[Row]:
    """The other kernels for bfloat16 rows of 768, parameters float32."""
    with mock.patch.object(common, "_ARCHITECTURE_WITHOUT_GPU", arch):
        launches = [(op, each) for op in OPS for each in launches_of(op, _SHAPES.get(op, USUAL))]
    for op, launch in launches:
        constants, options = launch.constants, launch.options
        tile = tuple(constants[name] for name in _EXTENTS if name in constants)
        settings = tile, options["num_warps"], options["num_stages"]
        kernel, code = launch.kernel.__name__, compiled_rows(arch, launch)
        yield Row(arch, op, kernel, _variant(op, launch), *settings, code, None)


def _variant(op: str, launch: Launch) -> str:
    """What tells kernels of one name apart."""
    constants = launch.constants
    if "ADD" in constants:
        return "later chunks" if constants["ADD"] else "first chunk"
    if launch.kernel.__name__ in ("_sum_windows", "_join_windows"):
        return "of spans" if op == "span_boundary_hidden" else "of tables"
    if "DROPOUT" in constants:
        return "dropout" if constants["DROPOUT"] else "no dropout"
    return _NONE


def count_traffic() -> tuple[Traffic, dict[str, float]] | None:
    """Bytes per token: by op and kernel, and those of a layer by op; None without ptxsim."""
    if not in_process.HAS_SIMULATOR:
        return None
    sys.path.append(str(in_process.SIMULATOR))
    from kernels import rows_traffic

    return rows_traffic.traffic(), rows_traffic.bytes_per_layer()


def render(rows: Sequence[Row], traffic: Traffic | None) -> str:
    """The report as Markdown."""
    lines = [_head()]
    for arch in MULTIPROCESSOR:
        lines += [f"\n## sm_{arch}\n", *_resources([row for row in rows if row.arch == arch])]
    lines += ["\n## Attention: instructions per score\n", *_scores()]
    lines += ["\n## Other kernels: bytes per token\n", *_traffic(rows, traffic)]
    return "\n".join(lines) + "\n"


def _head() -> str:
    limits = [
        f"| sm_{arch} | {one.warps} | {one.programs} | {one.registers:,} |"
        f" {one.shared_memory // 1024} | {one.tensor_memory or 'has none'} |"
        for arch, one in MULTIPROCESSOR.items()
    ]
    return "\n".join(
        (
            "# What the compiled kernels need of a GPU",
            "",
            "Written by `make kernel-report`. **Static: compiled ahead of time and read, never run"
            " on a GPU.** No number here is a time.",
            "",
            f"Triton {triton.__version__}, {_assembler('ptxas')} (sm_80, sm_90),"
            f" {_assembler('ptxas-blackwell')} (sm_100), torch {torch.__version__}.",
            "The settings are those that a launch chooses. Attention: bfloat16, head size 64, the"
            " bucket of 512 tokens, no window.",
            f"The others: bfloat16 rows, float32 parameters, D = {SIZE}, F = {FEED_FORWARD},"
            f" V = {USUAL.classes:,}, hidden dropout {USUAL.dropout}.",
            "",
            "![The same as a picture](report.png)",
            "",
            "- *tile*: rows x columns of a program, for products x the inner extent; *stages*: of"
            " the software pipeline.",
            "- *spills*: instructions that touch local memory; *stack*: bytes of a thread's frame;"
            " *tensor columns*: of tensor memory.",
            "- *programs*, *warps*: how many a multiprocessor holds at a time, from registers,"
            " shared memory, tensor memory and the limits below; *bound*: which of them decides.",
            "- *instructions*: of machine code, each counted once, however often a loop runs it.",
            "",
            "| multiprocessor | warps | programs | registers | shared memory, KiB"
            " | tensor memory, columns |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *limits,
        )
    )


def _assembler(name: str) -> str:
    command = [str(TOOLS / name), "--version"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return f"{name} {text.rpartition(', V')[2].split()[0]}"


def _resources(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "| op | kernel | variant | pass | tile | warps | stages | registers | spills | stack"
        " | shared, KiB | tensor columns | programs | warps of 64 | bound | instructions |"
    )
    yield f"|{' --- |' * 5}{' ---: |' * 9} --- | ---: |"
    for row in rows:
        programs, warps, bound = row.occupancy
        yield (
            f"| {row.op} | `{row.kernel}` | {row.variant} |"
            f" {'forward' if row.is_forward else 'backward'} |"
            f" {' x '.join(map(str, row.tile))} | {row.num_warps} | {row.num_stages} |"
            f" {row.code.registers} | {row.code.num_spills} | {row.code.stack} |"
            f" {row.code.shared_memory / 1024:.1f} | {row.code.tensor_memory or 'none'} |"
            f" {programs} | {warps} | {bound} |"
            f" {len(row.code.instructions):,} |"
        )


def _scores() -> Iterator[str]:
    yield (
        "Instructions over the scores of one tile that a thread holds; those outside the loop are"
        f" among them. At most {MAX_DROPOUT_INSTRUCTIONS} may be added by dropout; a test"
        " holds sm_80 and sm_90 to that, and sm_100 to 17: its listing has the mask twice, since"
        " the first tile is peeled off the loop. For other kernels the measure does not apply.\n"
    )
    yield "| kernel | target | without dropout | with | added by dropout |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for name in KERNELS:
        for arch in MULTIPROCESSOR:
            variant = Variant(arch, name)
            plain = instructions_per_score(variant._replace(has_dropout=False))
            yield (
                f"| `attention_{name}` | sm_{arch} | {plain:.1f} |"
                f" {instructions_per_score(variant):.1f} | {dropout_instructions(variant):.1f} |"
            )


def _traffic(rows: Sequence[Row], traffic: Traffic | None) -> Iterator[str]:
    yield (
        "Bytes from and to memory for each token, each byte of a launch once, counted by ptxsim in"
        " a part of a real launch of the code for sm_90 (8,224 tokens). `bias_gelu` has rows of F."
        " The embedding runs once in a step; its sums are of all three tables."
    )
    if traffic is None:
        yield f"\n**Not counted here**: {in_process.NO_SIMULATOR}."
    yield "\n| op | kernel | bytes per token | in units of D |"
    yield "| --- | --- | ---: | ---: |"
    kernels = dict.fromkeys((row.op, row.kernel) for row in rows)
    for op, kernel in kernels:
        yield f"| {op} | `{kernel}` | {_bytes(op, kernel, traffic)} |"


def _bytes(op: str, kernel: str, traffic: Traffic | None) -> str:
    if op == "varlen_attention":
        return "does not apply: depends on the lengths | -"
    if op == "linear_cross_entropy":
        return "does not apply: all rows share one pass over the matrix | -"
    if op == "span_boundary_hidden":
        return "does not apply: works on spans, not on tokens | -"
    if traffic is None:
        return "not counted | not counted"
    return f"{traffic[op, kernel]:,.0f} | {traffic[op, kernel] / SIZE:.1f}"


def main() -> None:
    """Write both files."""
    rows = [row for arch in MULTIPROCESSOR for row in (*attention_rows(arch), *other_rows(arch))]
    counted = count_traffic()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "report.md").write_text(render(rows, counted and counted[0]))
    layer = counted and {op: count / SIZE for op, count in counted[1].items()}
    draw(rows, layer, FOLDER / "report.png")
    print(f"{FOLDER.name}/report.md and .png: {len(rows)} kernels")


if __name__ == "__main__":
    main()
