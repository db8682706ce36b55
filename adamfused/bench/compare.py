"""Two reports of different times: which rows are slower than they were.

What two runs measured was not measured in turn, and on a shared machine the seconds of yesterday say little about those
of today. So each run has a yardstick, timed before every step: the in-place copy, or for steps that caches hold an
in-place pass over tensors of the same sizes. What is compared is the time of a step over that of its yardstick, each
run's median of it with its interval.

A machine that is as a whole slower or faster than it was moves both alike. One where other work takes a processor or
the memory away does not: a yardstick may then say "slower" of what is not. So on the same machine no row fails that
became faster by the clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from adamfused.bench.interval import Interval, judge
from adamfused.bench.result import Report, Row
from adamfused.bench.table import ratio
from adamfused.report import Column, Table

MACHINE = ("cpu", "gpus", "isa", "threads", "machine", "python", "torch", "cuda")
"""The facts that a comparison is sound between."""

VERDICTS = {
    "slower": "FAIL: slower by more than {}",
    "disputed": "slower by the yardstick, faster by the clock: other work came or went; measure again",
    "unclear": "too noisy to tell: measure longer, with --seconds, or on a machine that does nothing else",
    "same": "PASS",
    "faster": "PASS: faster",
}
"""By what :func:`adamfused.bench.interval.judge` finds; ``{}`` is the allowance."""


@dataclass(frozen=True)
class Change:
    """What became of one row.

    Args:
        optimizer: its name.
        case: its name.
        ratio: new over old, of times in units of each run's own yardstick; ``None`` where one of them has none.
        verdict: ``PASS``, ``FAIL: why``, or in words why there is none.
    """

    optimizer: str
    case: str
    ratio: Interval | None
    verdict: str

    @property
    def failed(self) -> bool:
        return self.verdict.startswith("FAIL")


@dataclass(frozen=True)
class Comparison:
    """All changes, and why the comparison may mislead."""

    changes: list[Change]
    warnings: list[str]

    @property
    def failed(self) -> bool:
        """Whether a row is slower than allowed, or no longer valid."""
        return any(change.failed for change in self.changes)

    def table(self) -> Table:
        """A row a change."""
        columns = [
            Column("optimizer", left=True),
            Column("case", left=True),
            Column("new over old"),
            Column("", left=True),
        ]
        note = "new over old: times in units of an in-place copy, or of a pass over the same tensors, in the same run."
        rows = [[c.optimizer, c.case, ratio(c.ratio), c.verdict] for c in self.changes]
        return Table("Against the old report", columns, rows, note)


def compare(old: Report, new: Report, allowance: float) -> Comparison:
    """What became of every row of ``old`` in ``new``, and which rows are new.

    Args:
        old: as it was.
        new: as it is.
        allowance: how much slower a row may be; 0.05 is 5 %.

    Raises:
        ValueError: if they measured different things.
    """
    for what in ("device", "dtype", "features"):
        was, is_ = (getattr(report, what) for report in (old, new))
        if was != is_:
            raise ValueError(
                f"the reports cannot be compared: {what} was {was!r} and is {is_!r}; measure both alike"
            )
    before = {(row.optimizer, row.case): row for row in old.rows}
    after = {(row.optimizer, row.case): row for row in new.rows}
    if not before.keys() & after.keys():
        raise ValueError(
            "the reports cannot be compared: no optimizer and case is in both; measure both alike"
        )
    differing = [
        f"{name} was {old.facts.get(name)} and is {new.facts.get(name)}"
        for name in MACHINE
        if old.facts.get(name) != new.facts.get(name)
    ]
    changes = [
        _change(*key, before.get(key), after.get(key), allowance, by_clock=not differing)
        for key in {**before, **after}
    ]
    warnings = [f"another machine or software: {'; '.join(differing)}"] if differing else []
    return Comparison(changes, warnings)


def _change(
    name: str, case: str, old: Row | None, new: Row | None, allowance: float, by_clock: bool
) -> Change:
    if new is None:
        return Change(name, case, None, "vanished: the new report does not have it")
    if old is None:
        return Change(name, case, None, "new")
    if new.problem:
        return Change(name, case, None, new.problem if old.problem else f"FAIL: {new.problem}")
    if old.standing is None or new.standing is None or old.time is None or new.time is None:
        return Change(name, case, None, f"was {old.problem}")
    change = new.standing / old.standing
    found = judge(change, allowance)
    if found == "slower" and by_clock and judge(new.time / old.time) == "faster":
        found = "disputed"
    return Change(name, case, change, VERDICTS[found].format(f"{100 * allowance:g}%"))
