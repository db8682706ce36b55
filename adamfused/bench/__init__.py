"""`python -m adamfused bench`: how long a step of any optimizers takes, measured in turn, with what is uncertain."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from adamfused import report as shown
from adamfused.bench.case import MODELS, Case, parse_cases
from adamfused.bench.compare import Comparison, compare
from adamfused.bench.contender import FEATURES
from adamfused.bench.interval import Interval
from adamfused.bench.measure import SECONDS, TICKS, bench
from adamfused.bench.picture import pictures, poster
from adamfused.bench.result import Report, Row
from adamfused.bench.table import tables
from adamfused.spec import parse_list

__all__ = ["Case", "Comparison", "Interval", "Report", "Row", "bench", "compare"]

HELP = "time the steps of any optimizers against each other and against the memory bandwidth"
OK, SLOWER, UNUSABLE = 0, 1, 2  # exit codes
OPTIMIZERS = "adamfused:AdamW,torch.optim:AdamW[fused=True]"
SIZES = "1e7"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench` to `parser`."""
    shown_default = "(default: %(default)s)"
    parser.epilog = (
        "Exit code: 0, or 1 if --compare finds a row slower than allowed or no longer valid, or 2 if nothing can be "
        "measured. Each step is timed after other data went through the caches; small ones back to back too."
    )
    add = parser.add_argument
    add(
        "--optimizers",
        metavar="LIST",
        default=OPTIMIZERS,
        help=f"module:Class[option=value,...] with commas between; ratios are to the first {shown_default}",
    )
    cases = parser.add_argument_group("cases", f"any of these; by default --sizes {SIZES}")
    cases.add_argument(
        "--sizes", metavar="LIST", help="elements of one tensor: 1e4,1e6 or 1e3..1e8"
    )
    cases.add_argument("--tensors", metavar="LIST", help="tensors x elements: 1000x16,1000x1024")
    cases.add_argument("--model", metavar="LIST", help=f"some of {', '.join(MODELS)}")
    add("--device", default="cpu", help=f"cpu, cuda or cuda:N {shown_default}")
    add("--dtype", default="float32", help=f"of parameters and gradients {shown_default}")
    add("--threads", metavar="N", type=_count, help="on the CPU (default: torch's choice)")
    around = "; ".join(f"{name}: {feature.help}" for name, feature in FEATURES.items())
    add("--features", metavar="LIST", default="", help=f"timed with the step: {around}")
    add(
        "--seconds",
        metavar="S",
        type=_seconds,
        default=SECONDS,
        help=f"of measuring a case; it takes at least 21 rounds {shown_default}",
    )
    add("--json", metavar="FILE", type=Path, help="write all that was measured")
    add("--csv", metavar="FILE", type=Path, help="write a line a row")
    add("--plot", metavar="FILE", type=Path, help=f"draw ({', '.join(shown.SUFFIXES)})")
    add("--html", metavar="FILE", type=Path, help="write a page with machine, table and pictures")
    add("--compare", metavar="FILE", type=Path, help="an old --json, to compare with")
    add(
        "--max-regression",
        metavar="P%",
        type=_percent,
        default=0.05,
        help="how much slower than in the old report a row may be (default: 5%%)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, show, and return the exit code."""
    try:
        _check_outputs(args)
        old = Report.from_json(args.compare.read_text()) if args.compare else None
        report = _measured(args)
        comparison = compare(old, report, args.max_regression) if old else None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    for table in _tables(report, comparison):
        shown.show(table)
        print()
    _write(args, report, comparison)
    return SLOWER if comparison and comparison.failed else OK


def _measured(args: argparse.Namespace) -> Report:
    optimizers = parse_list(args.optimizers)
    given = [text for text in (args.sizes, args.tensors, args.model) if text]
    cases = list(parse_cases(",".join(given or [SIZES])))
    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype: got {args.dtype!r}, expected one such as float32 or bfloat16")
    measure = partial(
        bench,
        optimizers,
        cases,
        device=args.device,
        dtype=dtype,
        threads=args.threads,
        features=[name for name in args.features.split(",") if name],
        seconds=args.seconds,
    )
    with shown.Progress(TICKS * len(cases), "bench") as progress:
        return measure(tell=progress.advance)


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse what could not be written, before any time is spent on measuring."""
    for flag in ("json", "csv", "plot", "html"):
        path = getattr(args, flag)
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"--{flag} {path}: there is no folder {path.parent}")
    if args.plot is not None and args.plot.suffix.lower() not in shown.SUFFIXES:
        raise ValueError(
            f"--plot {args.plot}: expected a name that ends in {', '.join(shown.SUFFIXES)}"
        )


def _write(args: argparse.Namespace, report: Report, comparison: Comparison | None) -> None:
    """Write what was asked for, and say so."""
    if args.json:
        args.json.write_text(report.to_json())
    if args.csv:
        args.csv.write_text(report.to_csv())
    if args.html:
        args.html.write_text(page(report, comparison), encoding="utf-8")
    if args.plot and (figure := poster(report)) is not None:
        shown.save(figure, args.plot)
    if (args.plot or args.html) and shown.optional("matplotlib") is None:
        print(f"no pictures: matplotlib is not here; {shown.TOOLS_HINT}")


def page(report: Report, comparison: Comparison | None = None) -> str:
    """The report as one self-contained HTML page."""
    names = list(dict.fromkeys(row.optimizer for row in report.rows))
    lead = f"{', '.join(names)}, timed in turn: what slows the machine down slows all of them down."
    return shown.page(
        "Time of an optimizer step",
        lead,
        report.facts,
        [*_tables(report, comparison), *pictures(report)],
        shlex.join(["python", "-m", "adamfused", *sys.argv[1:]]),
    )


def _tables(report: Report, comparison: Comparison | None) -> list[shown.Table]:
    return [*tables(report), *([comparison.table()] if comparison else [])]


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected a whole number above 0")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0")
    return value


def _percent(text: str) -> float:
    value = float(text.removesuffix("%"))
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"got {text}, expected 0% to 99%")
    return value / 100


class _Callable(ModuleType):
    """So that ``adamfused.bench(...)`` runs :func:`bench`."""

    __call__ = staticmethod(bench)


sys.modules[__name__].__class__ = _Callable
