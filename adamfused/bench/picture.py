"""A report as pictures: time against size, shares of the bandwidth, the cost of a small tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from adamfused import report as shown
from adamfused.bench.result import Report, Row
from adamfused.bench.table import microseconds_a_tensor
from adamfused.report import COLOURS, LINESTYLES, MARKERS, Picture

GREY = "#808080"


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One picture: which rows it shows, and how.

    Args:
        shows: whether a row gives it a point.
        fewest: cases that make it worth drawing.
        draw: called with matplotlib's axes, the report and the rows of each optimizer.
        caption: below it.
    """

    shows: Callable[[Row], bool]
    fewest: int
    draw: Callable[[Any, Report, dict[str, list[Row]]], None]
    caption: str

    def rows(self, report: Report) -> dict[str, list[Row]]:
        """The rows that it shows by optimizer; none if there are too few cases."""
        rows = [row for row in report.rows if row.turns and self.shows(row)]
        if len({row.case for row in rows}) < self.fewest:
            return {}
        return {
            name: [r for r in rows if r.optimizer == name]
            for name in dict.fromkeys(r.optimizer for r in rows)
        }


def pictures(report: Report) -> list[Picture]:
    """Those that the report has rows for; none without matplotlib or where nothing was timed."""
    made = []
    for drawing, rows in _wanted(report):
        figure = shown.figure()
        if figure is not None:
            drawing.draw(figure.subplots(), report, rows)
            alt = f"{drawing.caption} Optimizers: {', '.join(rows)}. The table has the figures."
            made.append(Picture(figure, drawing.caption, alt))
    return made


def poster(report: Report) -> Any:
    """All pictures side by side as one figure; None without matplotlib or where nothing was timed."""
    wanted = _wanted(report)
    figure = shown.figure(5.4 * len(wanted)) if wanted else None
    if figure is not None:
        every = figure.subplots(1, len(wanted), squeeze=False)[0]
        for axes, (drawing, rows) in zip(every, wanted, strict=True):
            drawing.draw(axes, report, rows)
    return figure


def _wanted(report: Report) -> list[tuple[Drawing, dict[str, list[Row]]]]:
    """The drawings that the cases are made for, or else the shares of all of them."""
    for drawings in DRAWINGS, [dataclasses.replace(SHARES, shows=lambda row: True)]:
        wanted = [(drawing, rows) for drawing in drawings if (rows := drawing.rows(report))]
        if wanted:
            return wanted
    return []


def _draw_times(axes: Any, report: Report, rows: dict[str, list[Row]]) -> None:
    for i, (name, its) in enumerate(rows.items()):
        its = sorted(its, key=lambda row: row.numel)
        elements = [row.numel for row in its]
        times = [row.time * 1e6 for row in its if row.time]
        axes.plot(elements, [time.mid for time in times], label=name, **_style(i))
        ends = [time.low for time in times], [time.high for time in times]
        axes.fill_between(elements, *ends, color=COLOURS[i % len(COLOURS)], alpha=0.25, linewidth=0)
    sizes = sorted({row.numel for its in rows.values() for row in its})
    for each in sorted({row.step_bytes // row.numel for its in rows.values() for row in its}):
        floor = [1e6 * each * size / report.bandwidth for size in sizes]
        label = f"{each} bytes an element, at the copy's bandwidth"
        axes.plot(sizes, floor, color=GREY, linestyle=":", linewidth=1, label=label)
    axes.set(xlabel="elements", ylabel="time of a step, us")
    _log_log(axes, sizes)
    _legend(axes)


def _draw_shares(axes: Any, report: Report, rows: dict[str, list[Row]]) -> None:
    cases = list(dict.fromkeys(row.case for its in rows.values() for row in its))
    height = 0.8 / len(rows)
    for i, (name, its) in enumerate(rows.items()):
        at = [cases.index(row.case) + (i - (len(rows) - 1) / 2) * height for row in its]
        shares = [row.share.mid for row in its if row.share]
        bars = axes.barh(at, shares, 0.9 * height, label=name, color=COLOURS[i % len(COLOURS)])
        axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.axvline(1, color=GREY, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="share of the copy's bandwidth")
    _legend(axes)


def _draw_tensors(axes: Any, report: Report, rows: dict[str, list[Row]]) -> None:
    for i, (name, its) in enumerate(rows.items()):
        its = sorted(its, key=lambda row: row.numel / row.tensors)
        sizes = [row.numel / row.tensors for row in its]
        axes.plot(sizes, [microseconds_a_tensor(row) for row in its], label=name, **_style(i))
    axes.set(xlabel="elements of a tensor", ylabel="time a tensor, us")
    _log_log(axes, sorted({row.numel // row.tensors for its in rows.values() for row in its}))
    _legend(axes)


def _log_log(axes: Any, sizes: Sequence[int]) -> None:
    """Both axes logarithmic, in plain numbers: exponents are too small to be read on a phone."""
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(
        sizes,
        [f"{size:,}" if size < 10_000 else f"{size:.3g}".replace("e+0", "e") for size in sizes],
    )
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:,.7g}")


def _legend(axes: Any) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _style(i: int) -> dict[str, Any]:
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": LINESTYLES[i % len(LINESTYLES)],
        "markersize": 4,
    }


TIMES = Drawing(
    lambda row: row.tensors == 1,
    2,
    _draw_times,
    "Time of a step of one tensor against its size, and what moving its bytes takes at the copy's bandwidth.",
)
SHARES = Drawing(
    lambda row: row.warm is None,
    1,
    _draw_shares,
    "Share of the copy's bandwidth that a step has.",
)
TENSORS = Drawing(
    lambda row: microseconds_a_tensor(row) is not None,
    2,
    _draw_tensors,
    "What one of many tensors costs, steps back to back, against its size.",
)
DRAWINGS = (TIMES, SHARES, TENSORS)
