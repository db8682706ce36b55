"""A report as tables."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

from adamfused.bench.interval import CONFIDENCE, Interval, judge
from adamfused.bench.result import Report, Row
from adamfused.report import Column, Table

NONE = "-"

Columns = Sequence[tuple[Column, Callable[[Row], str]]]


def tables(report: Report) -> list[Table]:
    """Steps with the caches full of other data, and where they may find some of theirs, steps back to back."""
    words = [
        (Column("optimizer", left=True), lambda row: row.optimizer),
        (Column("case", left=True), lambda row: row.case),
    ]
    cold: Columns = [
        *words,
        (Column("time", "us"), lambda row: time(row.time)),
        (Column("ratio", "to the first"), lambda row: ratio(row.ratio)),
        (Column("verdict", left=True), lambda row: _verdict(row, row.ratio, report)),
        (Column("moved", "GB/s"), lambda row: _gigabytes(row)),
        (Column("share", "of copy"), lambda row: f"{row.share.mid:.2f}" if row.share else NONE),
        (Column("state", "B/element"), _state),
        (Column("host", "us"), lambda row: _number(row.host, 1e6)),
        (Column("a tensor", "us"), lambda row: _number(microseconds_a_tensor(row))),
        (Column("launches"), lambda row: NONE if row.launches is None else f"{row.launches:,}"),
    ]
    warm: Columns = [
        *words,
        (Column("time", "us"), lambda row: time(row.warm)),
        (Column("a tensor", "us"), lambda row: _number(microseconds_a_tensor(row))),
        (Column("ratio", "to the first"), lambda row: ratio(row.warm_ratio)),
        (Column("verdict", left=True), lambda row: _verdict(row, row.warm_ratio, report)),
    ]
    features = f", with {', '.join(report.features)}" if report.features else ""
    made = [
        _table(
            f"One step on {report.device}, {report.dtype}{features}",
            cold,
            report.rows,
            _note(report),
        )
    ]
    in_cache = [row for row in report.rows if row.warm]
    if in_cache:
        note = "What fits stays in the caches. Cases that no cache holds are not here."
        made.append(_table("Steps back to back", warm, in_cache, note))
    return made


def time(value: Interval | None) -> str:
    """Microseconds and how far the interval goes from them at most: ``8,441 ±2%``."""
    if value is None:
        return NONE
    beyond = max(value.high - value.mid, value.mid - value.low) / value.mid
    return f"{_digits(1e6 * value.mid)} ±{math.ceil(100 * beyond)}%"


def ratio(value: Interval | None) -> str:
    """The ratio and its interval: ``1.04 [1.03, 1.06]``."""
    if value is None:
        return NONE
    if value.low == value.high:
        return f"{value.mid:g}"
    return f"{value.mid:.2f} [{value.low:.2f}, {value.high:.2f}]"


def microseconds_a_tensor(row: Row) -> float | None:
    """What one of many tensors costs the host; on a CPU, which does all the work, only where caches hold it."""
    seconds = row.host or (row.warm.mid if row.warm else None)
    return None if seconds is None or row.tensors == 1 else 1e6 * seconds / row.tensors


def _table(title: str, columns: Columns, rows: Sequence[Row], note: str) -> Table:
    """The rows, without columns that none of them fills."""
    filled = [(c, cell) for c, cell in columns if any(cell(row) != NONE for row in rows)]
    return Table(
        title, [c for c, _ in filled], [[cell(r) for _, cell in filled] for r in rows], note
    )


def _digits(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _number(value: float | None, factor: float = 1.0) -> str:
    return NONE if value is None else _digits(factor * value)


def _gigabytes(row: Row) -> str:
    return _number(row.step_bytes / row.time.mid if row.time else None, 1e-9)


def _state(row: Row) -> str:
    return _number(row.state_bytes / row.numel if row.time else None)


def _verdict(row: Row, found: Interval | None, report: Report) -> str:
    if row.problem or row.optimizer == report.rows[0].optimizer:
        return row.problem.partition(":")[0] or "the first"
    said = judge(found) if found else NONE
    return "unclear" if report.busy and said in ("slower", "faster") else said


def _note(report: Report) -> str:
    """What the columns mean."""
    rounds = [len(row.turns) for row in report.rows if row.turns]
    if not rounds:
        return ""
    return (
        f"time: after {report.copy_bytes / 2e6:.0f} MB of other data went through the caches; the median of "
        f"{_span(rounds)} rounds, ± its {CONFIDENCE:.0%} interval. ratio: of times of the same round. "
        "moved: parameters and states read and written, gradients read, counted from their dtypes. "
        f"share: of the bandwidth of an in-place copy in the same round, {1e-9 * report.bandwidth:.3g} GB/s."
    )


def remarks(report: Report) -> list[str]:
    """What stands against the figures, a sentence each."""
    problems: dict[str, list[str]] = {}
    for row in report.rows:
        if row.problem:
            problem = textwrap.shorten(row.problem, 120, placeholder=" ...")
            problems.setdefault(f"{row.optimizer} is {problem}", []).append(row.case)
    texts = [f"On {', '.join(cases)}, {problem}." for problem, cases in problems.items()]
    first = report.rows[0].optimizer if report.rows else ""
    alone = dict.fromkeys(row.case for row in report.rows if row.time and not row.ratio)
    if alone:
        texts.append(
            f"No ratios on {', '.join(alone)}: they are to the first, {first}, which has no time there."
        )
    unchecked = dict.fromkeys(row.optimizer for row in report.rows if row.turns and not row.checked)
    if unchecked:
        texts.append(f"Unchecked, as their rule is not known here: {', '.join(unchecked)}.")
    return [*texts, *map(warning, report.warnings)]


def warning(text: str) -> str:
    """The text as the line that warns of it."""
    return f"WARNING: {text}."


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
