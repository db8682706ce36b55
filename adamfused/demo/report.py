"""What a demo shows: progress while it trains, tables and a picture at the end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import adamfused
from adamfused import backend
from adamfused.demo.train import Run, Settings, Task
from adamfused.report import optional

COLOURS = ("#56B4E9", "#B03A00")  # sky blue and dark vermilion: far apart in lightness too
WINDOW = 11  # steps that the smoothed loss averages over, half before and half after


def header(task: Task, settings: Settings, recipe: str) -> None:
    """Print what is about to be trained, on what, with what."""
    device = str(settings.device)
    if settings.device.type == "cuda":
        device = f"cuda ({torch.cuda.get_device_name(settings.device)})"
    reference = backend.why_not_native(settings.device) or backend.choose(None) == "reference"
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
    """A table of loss and score that grows by a row an epoch, over a bar on a terminal with tqdm."""

    def __init__(self, task: Task, runs: dict[str, Run], steps: int) -> None:
        """Print the head of the table; ``steps`` is how many each of the two runs will take."""
        self.runs = list(runs.values())
        loss, score = (
            f"mean training loss, {task.loss_unit}",
            f"{task.score_name}, {task.score_unit}",
        )
        print(f"{'':5}  {loss:>26}    {score:>26}")
        first, second = packages(runs)
        print("epoch" + f"  {first:>12}  {second:>12}  " * 2 + "   time, s")
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
        """Count one more step of both runs."""
        if self.bar is not None:
            self.bar.update()

    def epoch(self) -> None:
        """Print the row of the epoch that both runs just ended."""
        losses = "  ".join(f"{run.epoch_losses[-1]:>12.4f}" for run in self.runs)
        scores = "  ".join(f"{run.scores[-1]:>12.2f}" for run in self.runs)
        seconds = time.perf_counter() - self.start
        row = f"{len(self.runs[0].scores):>5}  {losses}    {scores}  {seconds:>10.1f}"
        if self.bar is not None:
            self.bar.write(row, file=sys.stdout)
        else:
            print(row, flush=True)


def packages(runs: dict[str, Run]) -> list[str]:
    """Return the package of each run's optimizer."""
    return [name.split(".")[0] for name in runs]


def times(runs: dict[str, Run]) -> None:
    """Print the time in ``step()`` of torch's run and of ours."""
    print(f"\n{'time in step()':<19}{'median, us':>14}{'sum, ms':>14}{'steps':>10}")
    for name, run in runs.items():
        total = sum(run.step_seconds) * 1e3
        print(f"{name:<19}{run.median_us():>14,.0f}{total:>14,.1f}{len(run.step_seconds):>10,}")
    theirs, ours = (run.median_us() for run in runs.values())
    pair = " / ".join(packages(runs))
    print(f"ratio of the medians, {pair}, each as it comes: {theirs / ours:.2f}")


def smoothed(values: list[float]) -> npt.NDArray[np.float64]:
    """Return the mean of `values` (steps,) in a window around each, cut off at both ends."""
    half = WINDOW // 2
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def picture(path: Path, title: str, task: Task, runs: dict[str, Run], epoch_steps: int) -> str:
    """Draw both runs over each other into `path` and return the line to print about it."""
    if optional("matplotlib") is None:
        return "No picture: matplotlib is not here (pip install matplotlib)."
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    first = next(iter(runs.values()))
    steps, epochs = (np.arange(1, n + 1) for n in (len(first.losses), len(first.scores)))
    # The runs nearly coincide: the second is drawn thin and dashed on top of the first.
    for (label, run), colour, style, width in zip(
        runs.items(), COLOURS, ("-", "--"), (4.0, 1.6), strict=True
    ):
        line = {"color": colour, "linestyle": style, "linewidth": width, "label": label}
        left.plot(steps, run.losses, color=colour, linewidth=width / 3, alpha=0.3)
        left.plot(steps, smoothed(run.losses), **line)
        right.plot(epochs, run.scores, **line, marker="o", markersize=2.5 * width**0.8)
    left.set(
        xlabel=f"step ({epoch_steps} steps are an epoch)",
        ylabel=f"training loss, {task.loss_unit} (log scale)",
        title=f"Training loss: each step (faint), mean of {WINDOW} steps (bold)",
        yscale="log",
    )
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_locator(NullLocator())
    right.set(
        xlabel="epoch",
        xlim=(0.5, len(epochs) + 0.5),
        ylabel=f"{task.score_name}, {task.score_unit}",
        title=f"{task.score_name.capitalize()} after each epoch",
    )
    right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(loc="upper right")
    right.legend(loc="center right")
    figure.savefig(path, dpi=130)
    return f"Curves of both runs: {path}"
