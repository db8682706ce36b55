"""What was measured, as data: a row an optimizer and case, and a report of all rows."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch.utils.benchmark import Measurement, TaskSpec

from adamfused.bench.interval import Interval
from adamfused.bench.turns import Turn

NOISY = 0.25
"""Of the median: an interquartile range from which torch speaks of significant influence from outside."""


@dataclass(frozen=True)
class Row:
    """One optimizer on one case. Times are in seconds, of one step.

    Args:
        optimizer: its name.
        case: its name.
        tensors: how many it has.
        numel: elements in all of them.
        problem: "", or ``NOT SUPPORTED: why`` (then there are no figures), or ``INVALID: why`` (then there are, but
            the optimizer did not pass its parity check).
        checked: whether there was such a check; there is none for an optimizer of no known family.
        step_bytes: what a step has to move, counted from the tensors' dtypes: parameters and states read and
            written, gradients read.
        state_bytes: what the optimizer keeps.
        time: with caches full of other data.
        ratio: of the time to that of the first optimizer in the same round.
        share: of the bandwidth of the copy in the same round: step_bytes over the time, as a share.
        standing: the time over that of the yardstick in the same round, for comparisons between runs.
        warm: back to back; ``None`` where the case is larger than the caches, for it is the same then.
        warm_ratio: of that to the first optimizer's.
        host: until the step returned; ``None`` on a CPU, where that is the whole step.
        launches: kernels, copies and fills; CUDA only.
        turns: every single measurement.
    """

    optimizer: str
    case: str
    tensors: int
    numel: int
    problem: str = ""
    checked: bool = False
    step_bytes: int = 0
    state_bytes: int = 0
    time: Interval | None = None
    ratio: Interval | None = None
    share: Interval | None = None
    standing: Interval | None = None
    warm: Interval | None = None
    warm_ratio: Interval | None = None
    host: float | None = None
    launches: int | None = None
    turns: Sequence[Turn] = ()

    def timed(self, turns: Sequence[Turn], first: Sequence[Turn], copy_bytes: int) -> Row:
        """The row with these turns and all that they say.

        Args:
            turns: of this optimizer.
            first: of the first optimizer, in the same rounds; empty if that one has none.
            copy_bytes: what the copy moves.
        """
        cold, warm = [t.cold for t in turns], [t.warm for t in turns if t.warm is not None]
        first_warm = [t.warm for t in first if t.warm is not None]
        as_copies = [t.copy * self.step_bytes / copy_bytes for t in turns]
        return dataclasses.replace(
            self,
            time=Interval.of(cold),
            ratio=Interval.of_ratios(cold, [t.cold for t in first]) if first else None,
            share=Interval.of_ratios(as_copies, cold),
            standing=Interval.of_ratios(cold, [t.yardstick for t in turns]),
            warm=Interval.of(warm) if warm else None,
            warm_ratio=Interval.of_ratios(warm, first_warm) if warm and first_warm else None,
            turns=tuple(turns),
        )

    @property
    def noise(self) -> float:
        """The interquartile range of the times over their median, 0 if there are none."""
        if not self.turns:
            return 0.0
        task = TaskSpec(stmt=self.optimizer, setup="")
        found = Measurement(1, [t.cold for t in self.turns], task)
        return float(found.iqr / found.median)


_INTERVALS = [f.name for f in dataclasses.fields(Row) if f.type == "Interval | None"]


@dataclass(frozen=True)
class Report:
    """All that one run measured, and what it holds for.

    Args:
        facts: :func:`adamfused.machine.facts` and ``load``, see :func:`adamfused.machine.others_running`.
        device: of the parameters.
        dtype: of the parameters, without "torch.".
        features: what was timed around the steps.
        copy_bytes: what the copy moves.
        rows: case by case, the optimizers in the order given.
        warnings: why the figures may mislead.
        busy: whether other work had a quarter of the processors or more at the start.
    """

    facts: dict[str, Any]
    device: str
    dtype: str
    features: Sequence[str]
    copy_bytes: int
    rows: Sequence[Row] = ()
    warnings: Sequence[str] = field(default_factory=list)
    busy: bool = False

    @property
    def bandwidth(self) -> float:
        """Bytes a second of the copy, the median over the run; 0 if nothing was timed."""
        copies = [turn.copy for row in self.rows for turn in row.turns]
        return self.copy_bytes / median(copies) if copies else 0.0

    def row(self, optimizer: str, case: str) -> Row:
        """The row of an optimizer and a case.

        Raises:
            KeyError: if there is none.
        """
        for row in self.rows:
            if (row.optimizer, row.case) == (optimizer, case):
                return row
        raise KeyError(f"no row for {optimizer} on {case}")

    def to_json(self) -> str:
        """Everything, as JSON without NaN or infinities; a line a row."""
        found = dataclasses.asdict(self)
        rows = ",\n".join(json.dumps(row, allow_nan=False) for row in found.pop("rows"))
        head = json.dumps(found, indent=1, allow_nan=False).removesuffix("\n}")
        return f'{head},\n "rows": [\n{rows}\n ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: if the text is something else.
        """
        try:
            found = json.loads(text)
            rows = [_row(row) for row in found.pop("rows")]
            return cls(**found, rows=rows)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no report of adamfused bench: {error}") from error

    def to_csv(self) -> str:
        """A line a row; an interval is three columns. The single measurements are in the JSON only."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [f.name for f in dataclasses.fields(Row) if f.name != "turns"]
        ends = ("low", "mid", "high")
        heads = [[f"{n}_{end}" for end in ends] if n in _INTERVALS else [n] for n in names]
        writer.writerow(["device", "dtype", *(head for group in heads for head in group)])
        for row in self.rows:
            cells: list[Any] = [self.device, self.dtype]
            for name in names:
                value = getattr(row, name)
                if name in _INTERVALS:
                    cells += [getattr(value, end, "") for end in ends]
                else:
                    cells.append("" if value is None else value)
            writer.writerow(cells)
        return text.getvalue()


def _row(found: dict[str, Any]) -> Row:
    intervals = {name: Interval(**found[name]) for name in _INTERVALS if found[name] is not None}
    turns = tuple(Turn(*turn) for turn in found["turns"])
    return Row(**{**found, **intervals, "turns": turns})
