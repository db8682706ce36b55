"""Measures what the project sets itself as targets, and says which are met.

Every speed is a ratio of two times taken in turn in the same run; see README.md beside this file.

    python benchmarks/targets.py [--quick] [--json FILE] [--no-fail] [--threads N] [--elements N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from drift import drifts
from memory import peak_bytes

import adamfused
from adamfused import machine
from adamfused.bench import Case, Interval, Report, Row, bench
from adamfused.bench.contender import parameters, prepare
from adamfused.spec import Spec

LARGE = 32_000_000  # elements of the one large parameter
ADAMW, TORCH_ADAMW = "adamfused:AdamW", "torch.optim:AdamW[fused=True]"


class Line(NamedTuple):
    """One target: what was found and what is asked for."""

    name: str
    value: float
    better: str  # ">=" or "<="
    target: float
    unit: str = ""
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.value >= self.target if self.better == ">=" else self.value <= self.target

    def __str__(self) -> str:
        verdict = "PASS" if self.passed else "FAIL"
        value = f"{self.value:.3g}{self.unit}"
        return f"{verdict}  {self.name:<54}{value:>9}  {self.better} {self.target:g}{self.unit}  {self.note}"


Part = tuple[str, Sequence[Line], Report | None]
"""A name, the lines that were measured together, and the report that they are made from."""


def of_copy(name: str, row: Row, target: float) -> Line:
    """The share of the copy's bandwidth that a step has."""
    assert row.share and row.time, row.problem
    return Line(
        f"{name}, of the copy bandwidth", row.share.mid, ">=", target, "", around(row.share, row)
    )


def times(name: str, row: Row, target: float) -> Line:
    """How many times as long the row's optimizer takes as the first one of its report: back to back if caches allow."""
    ratio = row.warm_ratio or row.ratio
    assert ratio, row.problem
    other = row.optimizer.replace("torch.optim:", "torch ").replace("=True", "")
    return Line(f"{name}, times {other}", ratio.mid, ">=", target, "x", around(ratio, row))


def around(found: Interval, row: Row) -> str:
    """The interval of a figure and the time that it comes from."""
    time = row.warm or row.time
    assert time is not None
    return f"({found.low:.3g} to {found.high:.3g}; {row.optimizer} {1e3 * time.mid:.3g} ms)"


def report_of(rows: list[Row], dtype: str, copy_bytes: int, load: float) -> Report:
    """Rows that were timed in turn on the CPU, ``load`` other threads having run at the start."""
    busy = load >= (os.cpu_count() or 1) / 4
    warnings = [f"other work kept the machine busy at the start, load {load:.1f}"] if busy else []
    facts = machine.facts() | {"load": load}
    return Report(facts, "cpu", dtype, [], copy_bytes, rows, warnings, busy)


# ---- the targets ---------------------------------------------------------------------------------


def adamw(elements: int, seconds: float) -> Part:
    report = bench(
        [ADAMW, TORCH_ADAMW], [str(elements), "1000x16", "1000x1024", "gpt2"], seconds=seconds
    )
    large, small, medium, gpt2 = (row for row in report.rows if row.optimizer == TORCH_ADAMW)
    of_small = report.row(ADAMW, small.case).warm
    assert of_small
    lines = [
        of_copy(f"AdamW, {millions(elements)} float32", report.row(ADAMW, large.case), 0.95),
        times(f"AdamW, {millions(elements)} float32", large, 1),
        times("AdamW, 1,000 tensors of 16", small, 20),
        Line("AdamW, host cost per tensor of 16", 1e3 * of_small.mid, "<=", 0.5, " us"),
        times("AdamW, 1,000 tensors of 1,024", medium, 5),
        times("AdamW, GPT-2 small", gpt2, 1),
    ]
    return "adamw", lines, report


def adam(elements: int, seconds: float) -> Part:
    report = bench(
        ["adamfused:Adam", "torch.optim:Adam[fused=True]"], [str(elements)], seconds=seconds
    )
    name = f"Adam, {millions(elements)} float32"
    ours, theirs = report.rows
    return "adam", [of_copy(name, ours, 0.95), times(name, theirs, 1)], report


def rmsprop(elements: int, seconds: float) -> Part:
    """torch has no fused RMSprop."""
    optimizers = ["adamfused:RMSprop", "torch.optim:RMSprop[foreach=True]"]
    report = bench(optimizers, [str(elements)], seconds=seconds)
    return "rmsprop", [times(f"RMSprop, {millions(elements)} float32", report.rows[1], 3)], report


def bfloat16(elements: int, seconds: float) -> Part:
    report = bench([ADAMW], [str(elements)], dtype=torch.bfloat16, seconds=seconds)
    name = f"AdamW, {millions(elements)} bfloat16"
    return "bfloat16", [of_copy(name, report.rows[0], 0.9)], report


def memory() -> Part:
    params = parameters(Case.parse("gpt2"), torch.float32, torch.device("cpu"))
    step = prepare(Spec.parse(ADAMW), params, ()).step
    peak = statistics.median(peak_bytes(step) for _ in range(5)) / 1e6
    return (
        "memory",
        [Line("AdamW, GPT-2 small, peak memory in step()", peak, "<=", 1.0, " MB")],
        None,
    )


def import_time() -> Part:
    """What `import adamfused` adds to `import torch`, in fresh processes."""
    code = "import time, torch; t = time.perf_counter(); import adamfused; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": str(Path(adamfused.__file__).parent.parent)}
    runs = [
        float(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
        for _ in range(5)
    ]
    line = Line("import adamfused, beside import torch", statistics.median(runs), "<=", 0.3, " s")
    return "import", [line], None


def drift() -> Part:
    """Errors against float64 after 3,000 float32 steps: torch's over ours."""
    (ours_p, ours_v), (torch_p, torch_v) = drifts(
        *(Spec.parse(name).make for name in (ADAMW, TORCH_ADAMW))
    )
    of_p = f"({torch_p:.2g} / {ours_p:.2g} of the path)"
    of_v = f"({torch_v:.2g} / {ours_v:.2g})"
    lines = [
        Line("AdamW, 3,000 steps, error of p, torch / ours", torch_p / ours_p, ">=", 10, "x", of_p),
        Line("AdamW, the same, of second moments", torch_v / ours_v, ">=", 10, "x", of_v),
    ]
    return "drift", lines, None


def parts(elements: int, seconds: float) -> Iterator[Part]:
    yield adamw(elements, seconds)
    yield adam(elements, seconds)
    yield rmsprop(elements, seconds)
    yield bfloat16(elements, seconds)
    yield memory()
    yield import_time()
    yield drift()


def millions(numel: int) -> str:
    return f"{numel / 1e6:.4g}M"


# ---- the report ----------------------------------------------------------------------------------


def arguments(description: str) -> argparse.ArgumentParser:
    """What every script of targets takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="21 rounds instead of more")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all that was measured")
    parser.add_argument("--no-fail", action="store_true", help="exit 0 even if a target is missed")
    return parser


def seconds(args: argparse.Namespace) -> float:
    """Of measuring a case."""
    return 0.1 if args.quick else 8.0


def judge(measured: Iterator[Part], args: argparse.Namespace) -> int:
    """Prints the lines of each part as soon as it is measured, writes all of them, and returns the exit code.

    ``--no-fail`` forgives what is missed, not what could not be measured.
    """
    about = machine.facts()
    print(", ".join(f"{key} {value}" for key, value in about.items() if value and key != "command"))
    lines: list[Line] = []
    unmeasured: list[Row] = []  # of ours
    reports: dict[str, Report] = {}
    for name, found, report in measured:
        lines += found
        if report:
            reports[name] = report
            print(f"      in-place copy in this part: {1e-9 * report.bandwidth:.1f} GB/s")
            print("".join(f"      WARNING: {text}\n" for text in report.warnings), end="")
            for row in report.rows:
                if row.problem and row.optimizer.startswith("adamfused"):
                    print(f"FAIL  {row.optimizer}, {row.case}: {row.problem}", flush=True)
                    unmeasured.append(row)
        for line in found:
            print(line, flush=True)
        if args.json:  # after every part, so that what was measured is kept if time runs out
            args.json.write_text(as_json(about, lines, reports))
    missed = [line.name for line in lines if not line.passed]
    print(f"{len(lines) - len(missed)} of {len(lines)} targets met")
    return 1 if not lines or unmeasured or (missed and not args.no_fail) else 0


def as_json(
    about: Mapping[str, object], lines: Sequence[Line], reports: Mapping[str, Report]
) -> str:
    """The facts, the targets, and each report as ``adamfused bench --json`` writes it."""
    found = [line._asdict() | {"passed": line.passed} for line in lines]
    head = json.dumps({**about, "targets": found}, indent=1, allow_nan=False).removesuffix("\n}")
    texts = ",\n".join(
        f"{json.dumps(name)}: {report.to_json()}" for name, report in reports.items()
    )
    return f'{head},\n "reports": {{\n{texts}}}\n}}\n'


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("Measure adamfused's targets.")
    parser.add_argument("--threads", metavar="N", type=int, help="instead of torch's default")
    parser.add_argument(
        "--elements",
        metavar="N",
        type=int,
        default=LARGE,
        help="of the one large tensor (32,000,000)",
    )
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    return judge(parts(args.elements, seconds(args)), args)


if __name__ == "__main__":
    sys.exit(main())
