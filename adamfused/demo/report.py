"""What a demo shows: progress while it trains, a table and a picture at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import adamfused
from adamfused import backend
from adamfused.demo.train import Run, Settings, Task
from adamfused.report import COLOURS, LINESTYLES, Column, Table, figure, optional, save, show

WINDOW = 11  # steps that the smoothed loss averages over, half before and half after
Unit = tuple[str, int]  # rows are told in this, "epoch" or "step"; so many steps are between two
FEW = 3  # so many runs are drawn and printed in full; of more, only what can be told apart


def header(task: Task, settings: Settings, recipe: str, chosen: str | None) -> None:
    """Print what is about to be trained, on what, with what; `chosen` is the `--backend`."""
    device = str(settings.device)
    if settings.device.type == "cuda":
        device = f"cuda ({torch.cuda.get_device_name(settings.device)})"
    reference = (
        backend.why_not_native(settings.device) or backend.choose(chosen) == "reference"
    )  # choose() warns where it falls back
    weights = sum(p.numel() for p in task.model().parameters())
    rows = {
        "data": f"{task.data}: {len(task.train[0]):,} to train on, {len(task.test[0]):,} to test",
        "model": f"{task.model_name}, {weights:,} weights",
        "training": recipe,
        "machine": f"{device}, CPU threads: {torch.get_num_threads()}, torch {torch.__version__}",
        "adamfused": f"{adamfused.__version__}, {'reference' if reference else 'native'} backend",
    }
    for name, text in rows.items():
        print(f"{name + ':':<11}{text}")
    print(flush=True)


class Progress:
    """A table of loss and score that grows by a row an epoch, over a bar on a terminal with tqdm.

    Of many runs it shows the score only.
    """

    def __init__(
        self,
        task: Task,
        runs: Mapping[str, Run],
        steps: int,
        unit: Unit,
        heads: Sequence[str] = (),
        every: int = 1,
    ) -> None:
        """Print the head of the table.

        ``steps`` is how many each run will take, and ``heads`` are short names of the runs. There is
        a row for every ``every``-th epoch.
        """
        self.runs, self.every = list(runs.values()), every
        name, size = unit
        self.stride = size if name == "step" else 1
        self.what = {f"{task.score_name}, {task.score_unit}": "scores"}
        if len(runs) <= FEW:
            self.what = {f"mean training loss, {task.loss_unit}": "epoch_losses"} | self.what
        self.percent = task.score_unit == "%"
        self.widths = [max(7, len(head)) for head in heads or runs]
        columns = "".join(
            f"  {head:>{width}}" for head, width in zip(heads or runs, self.widths, strict=True)
        )
        self.group = max(len(columns), *(len(title) + 2 for title in self.what))
        print(f"{'':5}" + "  ".join(f"{title:>{self.group}}" for title in self.what))
        print(f"{name:>5}" + f"{columns:>{self.group}}  " * len(self.what) + " time, s")
        self.start = time.perf_counter()
        self.bar: Any = None
        tqdm = optional("tqdm")
        if tqdm is not None and sys.stdout.isatty():
            self.bar = tqdm.tqdm(total=steps, unit="step", file=sys.stdout, leave=False, ncols=72)

    def __enter__(self) -> Progress:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()

    def step(self) -> None:
        """Count one more step of all runs."""
        if self.bar is not None:
            self.bar.update()

    def epoch(self) -> None:
        """Print the row of the epoch that all runs just ended."""
        if len(self.runs[0].scores) % self.every:
            return
        row = f"{len(self.runs[0].scores) * self.stride:>5}"
        for kind in self.what.values():
            digits = 2 if kind == "scores" and self.percent else 4
            cells = (
                f"  {getattr(run, kind)[-1]:>{width}.{digits}f}"
                for run, width in zip(self.runs, self.widths, strict=True)
            )
            row += f"{''.join(cells):>{self.group}}  "
        row += f"{time.perf_counter() - self.start:>8.1f}"
        if self.bar is not None:
            self.bar.write(row, file=sys.stdout)
        else:
            print(row, flush=True)


def results(task: Task, runs: Mapping[str, Run]) -> None:
    """Print how each run ended, and what its optimizer took."""
    columns = [
        Column("", left=True),
        Column("loss", task.loss_unit),
        Column(task.score_name, task.score_unit),
        Column("step()", "median, us"),
        Column("step()", "sum, ms"),
        Column("state", "B/weight"),
        Column("steps"),
    ]
    rows = [
        [
            name,
            f"{run.epoch_losses[-1]:.4f}",
            f"{run.scores[-1]:.{2 if task.score_unit == '%' else 4}f}",
            f"{run.median_us():,.0f}",
            f"{sum(run.step_seconds) * 1e3:,.1f}",
            f"{run.state_bytes():.2f}",
            f"{len(run.losses):,}",
        ]
        for name, run in runs.items()
    ]
    print()
    show(Table("Results", columns, rows))


# ---- The picture -------------------------------------------------------------------------------

Curve = tuple[Sequence[float], Sequence[float]]  # x and y


@dataclass
class Curves:
    """One half (or third) of a picture: a curve for each run.

    With `smooth` the mean of `WINDOW` steps is drawn, over a faint line of all where the runs are few.
    """

    title: str
    xlabel: str
    ylabel: str
    curves: Mapping[str, Curve]
    log: bool = False
    smooth: bool = False
    marker: str = ""

    def draw(self, axes: Any) -> None:
        """Draw into matplotlib's `axes`."""
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

        few = len(self.curves) <= FEW
        # Few runs may nearly coincide: each is thinner than the one below it, and dashed otherwise.
        widths = np.linspace(4.0, 1.6, len(self.curves)) if few else [1.8] * len(self.curves)
        for i, (label, (x, y)) in enumerate(self.curves.items()):
            width, colour = float(widths[i]), COLOURS[i % len(COLOURS)]
            line = {"color": colour, "linestyle": LINESTYLES[i % len(LINESTYLES)]}
            if self.smooth and few:
                axes.plot(x, y, color=colour, linewidth=width / 3, alpha=0.3)
            axes.plot(
                x,
                smoothed(y) if self.smooth else y,
                **line,
                linewidth=width,
                label=label,
                marker=self.marker,
                markersize=2.5 * width**0.8,
            )
        axes.set(title=self.title, xlabel=self.xlabel, ylabel=self.ylabel)
        if self.log:
            axes.set(ylabel=f"{self.ylabel} (log scale)", yscale="log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
        axes.legend()


@dataclass
class Bars:
    """One part of a picture: a bar for each run, in the colour of its curves, with its number."""

    title: str
    unit: str
    values: Mapping[str, float]
    digits: int = 1

    def draw(self, axes: Any) -> None:
        """Draw into matplotlib's `axes`."""
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(self.values))]
        bars = axes.barh(list(self.values), list(self.values.values()), color=colours, height=0.6)
        axes.bar_label(bars, fmt=f"{{:,.{self.digits}f}}", padding=3)
        axes.invert_yaxis()  # the first on top
        axes.margins(x=0.18)  # room for the numbers
        axes.set(title=self.title, xlabel=self.unit)
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)


def losses(task: Task, runs: Mapping[str, Run], unit: Unit) -> Curves:
    """Return the training loss of the runs, step by step."""
    every = [loss for run in runs.values() for loss in run.losses]
    each = "each step (faint), " if len(runs) <= FEW else ""
    return Curves(
        title=f"Training loss: {each}mean of {WINDOW} steps{' (bold)' if each else ''}",
        xlabel=step_label(unit),
        ylabel=f"training loss, {task.loss_unit}",
        curves={name: (range(1, len(run.losses) + 1), run.losses) for name, run in runs.items()},
        log=max(every) > 5 * min(every),
        smooth=True,
    )


def scores(task: Task, runs: Mapping[str, Run], unit: Unit) -> Curves:
    """Return the score of the runs, epoch by epoch."""
    name, size = unit
    count = len(next(iter(runs.values())).scores)
    stride = size if name == "step" else 1
    after = f"every {size} steps" if name == "step" else "after each epoch"
    return Curves(
        title=f"{task.score_name.capitalize()} {after}",
        xlabel=name,
        ylabel=f"{task.score_name}, {task.score_unit}",
        curves={
            label: (range(stride, stride * (count + 1), stride), run.scores)
            for label, run in runs.items()
        },
        marker="o" if count <= 20 else "",
    )


def step_label(unit: Unit) -> str:
    """Return what stands below an axis of steps."""
    return "step" if unit[0] == "step" else f"step ({unit[1]} steps are an epoch)"


def smoothed(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return the mean of `values` (steps,) in a window around each, cut off at both ends."""
    half = WINDOW // 2
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def picture(path: Path, title: str, columns: Sequence[Sequence[Curves | Bars]]) -> str:
    """Draw panels side by side, those of a column below one another, and return the line to print."""
    if optional("matplotlib") is None:
        return "No picture: matplotlib is not here (pip install matplotlib)."
    drawn = figure(5.5 * len(columns), 4.8)
    drawn.suptitle(title)
    for i, column in enumerate(columns):
        grid = drawn.add_gridspec(1, len(columns))[i].subgridspec(len(column), 1)
        for j, panel in enumerate(column):
            panel.draw(drawn.add_subplot(grid[j]))
    save(drawn, path)
    return f"Picture: {path}"
