"""Measures AdamW on bfloat16 parameters in every storage format, on a CPU.

    python benchmarks/formats.py [--quick] [--json FILE] [--no-fail] [--threads N] [--elements N]

Every speed is a ratio of two times taken in turn in the same run; see README.md beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from one_pass import times
from targets import Part, arguments, judge, millions, of_copy, report_of, seconds

import adamfused
from adamfused import backend, machine
from adamfused.bench import Report, Row
from adamfused.bench.turns import Copy, take_turns
from adamfused.report import Column, Table, show

RESULT = Path(__file__).resolve().parent / "results" / "formats.json"
CPU = torch.device("cpu")
WARM_UP = 3


class Mode(NamedTuple):
    """What AdamW keeps beside bfloat16 parameters, and the share of the copy's bandwidth that is asked for."""

    name: str
    options: dict[str, Any]
    target: float | None = None


def modes() -> list[Mode]:
    wide = backend.native().isa() == "avx512"
    bf16 = torch.bfloat16
    return [
        Mode("float32 moments", {}, 0.9),
        Mode("split16, float32 moments", {"master_weights": "split16"}, 0.9),
        Mode("split16, bfloat16 moments", {"master_weights": "split16", "state_dtype": bf16}, 0.85),
        Mode(
            "split16, int8 moments",
            {"master_weights": "split16", "state_dtype": "int8"},
            0.75 if wide else 0.6,
        ),
        Mode("split8, int8 moments", {"master_weights": "split8", "state_dtype": "int8"}),
        Mode("fp32 master, float32 moments", {"master_weights": "fp32"}),
        Mode("int8 moments", {"state_dtype": "int8"}),
        Mode(
            "bfloat16 moments, rounded at random",
            {"state_dtype": bf16, "stochastic_rounding": True},
        ),
    ]


def parameter(elements: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """One whose gradient is there."""
    torch.manual_seed(0)
    p = torch.nn.Parameter((0.02 * torch.randn(elements)).to(dtype))
    p.grad = (1e-3 * torch.randn(elements)).to(dtype)
    return p


class Side(NamedTuple):
    """One optimizer and what its step moves and keeps, in bytes. None where its own tensors do not tell."""

    name: str
    step: Callable[[], object]
    moved: int | None
    kept: int


def ours(mode: Mode, elements: int) -> Side:
    p = parameter(elements, torch.bfloat16)
    optimizer = adamfused.AdamW([p], lr=1e-3, backend="native", **mode.options)
    memory = optimizer.memory_summary()
    kept = memory.resident_bytes - memory.resident["gradient"]
    return Side(mode.name, optimizer.step, memory.moved_bytes, kept)


def others(elements: int) -> Iterator[Side]:
    p = parameter(elements, torch.float32)
    fused = torch.optim.AdamW([p], lr=1e-3, fused=True)
    yield Side("torch.optim.AdamW, fused, float32", fused.step, 28 * elements, 12 * elements)
    if find_spec("torchao"):
        from torchao.optim import AdamW8bit

        q = parameter(elements, torch.bfloat16)
        yield Side("torchao AdamW8bit, bfloat16", AdamW8bit([q], lr=1e-3).step, None, 4 * elements)


def measure(elements: int, budget: float) -> Report:
    """Times all of them in turn, other data in the caches before each."""
    sides = [*(ours(mode, elements) for mode in modes()), *others(elements)]
    for side in sides:
        for _ in range(WARM_UP):
            side.step()
    load = round(machine.others_running(), 2)
    copy = Copy(CPU)
    taken = take_turns([side.step for side in sides], copy, None, budget, CPU)
    rows: list[Row] = []
    for side, its in zip(sides, taken, strict=True):
        if isinstance(its, BaseException):
            raise its
        row = Row(
            *(side.name, millions(elements), 1, elements),
            step_bytes=side.moved or 0,
            state_bytes=side.kept,
        )
        rows.append(row.timed(its, its, copy.bytes))
    return report_of(rows, "bfloat16", copy.bytes, load)


def table(report: Report) -> Table:
    columns = [
        Column("AdamW, bfloat16 parameters", left=True),
        Column("time", "ms"),
        Column("moves", "B/number"),
        Column("of the copy", ""),
        Column("keeps", "B/number"),
    ]
    lines = []
    for row in report.rows:
        assert row.time and row.share
        moves = f"{row.step_bytes / row.numel:.2f}" if row.step_bytes else "-"
        share = f"{row.share.mid:.2f}" if row.step_bytes else "-"
        kept = f"{row.state_bytes / row.numel:.2f}"
        lines.append([row.optimizer, f"{1e3 * row.time.mid:.1f}", moves, share, kept])
    return Table(
        f"{report.rows[0].case} parameters",
        columns,
        lines,
        "keeps: parameters, masters and states.",
    )


def parts(elements: int, budget: float) -> Iterator[Part]:
    report = measure(elements, budget)
    show(table(report))
    rows = {row.optimizer: row for row in report.rows}
    lines = [
        of_copy(f"AdamW, {mode.name}", rows[mode.name], mode.target)
        for mode in modes()
        if mode.target is not None
    ]
    smallest = rows["split16, int8 moments"]
    for name, target in (
        ("torch.optim.AdamW, fused, float32", 1.5),
        ("torchao AdamW8bit, bfloat16", 20),
    ):
        if name in rows:
            line = times("split16, int8 moments", rows[name], smallest, target)
            lines.append(line._replace(name=f"split16, int8 moments, times {name}"))
    yield "formats", lines, report


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("Measure AdamW in every storage format.")
    parser.set_defaults(json=RESULT)
    parser.add_argument("--threads", metavar="N", type=int, help="instead of torch's default")
    parser.add_argument("--elements", metavar="N", type=int, default=16_000_000)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    return judge(parts(args.elements, seconds(args)), args)


if __name__ == "__main__":
    sys.exit(main())
