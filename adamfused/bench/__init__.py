"""`python -m adamfused bench`: how long a step of any optimizers takes, measured in turn, with what is uncertain."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

from adamfused import report as shown
from adamfused.bench.case import MODELS, Case, parse_cases
from adamfused.bench.compare import Comparison, compare
from adamfused.bench.contender import FEATURES
from adamfused.bench.interval import Interval
from adamfused.bench.measure import SECONDS, TICKS, bench
from adamfused.bench.picture import pictures, poster
from adamfused.bench.result import Report, Row
from adamfused.bench.table import remarks, tables, warning
from adamfused.spec import FAMILIES, Spec, parse_list

__all__ = ["Case", "Comparison", "Interval", "Report", "Row", "bench", "compare"]

HELP = "time the steps of any optimizers against each other and against the memory bandwidth"
OK, SLOWER, UNUSABLE = 0, 1, 2  # exit codes
MAX_REGRESSION = 0.05
MAX_THREADS = 2**15
OPTIMIZERS = "adamfused:AdamW,torch.optim:AdamW[fused=True]"
SIZES = "1e7"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench` to `parser`."""
    shown_default = "(default: %(default)s)"
    parser.epilog = (
        "Exit code: 0, or 1 if --compare finds a row slower than allowed or no longer valid, or 2 if nothing can be "
        "measured or written. Each step is timed after other data went through the caches; small ones back to back too."
    )
    add = parser.add_argument
    add(
        "--optimizers",
        metavar="LIST",
        default=OPTIMIZERS,
        help=f"module:Class[option=value,...] with commas between; ratios are to the first {shown_default}",
    )
    add("--family", choices=FAMILIES, help="where the class's name does not tell")
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
        help="how much slower than in the old report a row may be (default: 5%%); needs --compare",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, show, and return the exit code."""
    try:
        shown.check_outputs(args, ("json", "csv", "plot", "html"))
        if args.max_regression is not None and not args.compare:
            raise ValueError("--max-regression compares with an old report; give it with --compare")
        most = MAX_REGRESSION if args.max_regression is None else args.max_regression
        old = _old(args.compare) if args.compare else None
        report = _measured(args)
        comparison = compare(old, report, most) if old else None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    for table in _tables(report, comparison):
        shown.show(table)
        print()
    for text in _remarks(report, comparison):
        print(text)
    try:
        _write(args, report, comparison)
    except OSError as error:
        print(f"error: not all could be written: {error}", file=sys.stderr)
        return UNUSABLE
    if not any(row.time for row in report.rows):
        return UNUSABLE
    return SLOWER if comparison and comparison.failed else OK


def _measured(args: argparse.Namespace) -> Report:
    optimizers = [
        Spec.of(spec, family=None if spec.family else args.family)
        for spec in parse_list(args.optimizers)
    ]
    given = [text for text in (args.sizes, args.tensors, args.model) if text is not None]
    cases = list(parse_cases(",".join(given or [SIZES])))
    measure = partial(
        bench,
        optimizers,
        cases,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        features=[name for name in args.features.split(",") if name],
        seconds=args.seconds,
    )
    with shown.Progress(TICKS * len(cases), "bench") as progress:
        return measure(tell=progress.advance)


def _old(path: Path) -> Report:
    try:
        return Report.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"--compare {path}: {error}") from error


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
        [*_tables(report, comparison), *_remarks(report, comparison), *pictures(report)],
        shlex.join(["python", "-m", "adamfused", *sys.argv[1:]]),
    )


def _tables(report: Report, comparison: Comparison | None) -> list[shown.Table]:
    return [*tables(report), *([comparison.table()] if comparison else [])]


def _remarks(report: Report, comparison: Comparison | None) -> list[str]:
    return [*remarks(report), *map(warning, comparison.warnings if comparison else [])]


def _number(text: str, read: Callable[[str], float], low: float, high: float, what: str) -> float:
    """The number that a text holds, if it lies between two others."""
    try:
        value = read(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {what}")
    return value


def _count(text: str) -> int:
    return int(_number(text, int, 1, MAX_THREADS, f"a whole number from 1 to {MAX_THREADS}"))


def _seconds(text: str) -> float:
    return _number(text, float, 1e-9, 1e9, "a number of seconds above 0")


def _percent(text: str) -> float:
    return _number(text.removesuffix("%"), float, 0, 99, "0% to 99%") / 100


class _Callable(ModuleType):
    """So that ``adamfused.bench(...)`` runs :func:`bench`."""

    __call__ = staticmethod(bench)


sys.modules[__name__].__class__ = _Callable
