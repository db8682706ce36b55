"""What a demo shows: progress while it trains, tables and a picture at the end."""

from __future__ import annotations

import importlib
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

PICTURES = (".png", ".svg", ".pdf")
COLOURS = ("#56B4E9", "#B03A00")  # sky blue and dark vermilion: far apart in lightness too
SMOOTHING = 0.9  # of the running mean of the loss: a memory of about 10 steps


def optional(module: str) -> Any:
    """Return the module of that name, or None where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def header(task: Task, settings: Settings, recipe: str) -> None:
    """Print what is about to be trained, on what, with what."""
    device = str(settings.device)
    if settings.device.type == "cuda":
        device = f"cuda ({torch.cuda.get_device_name(settings.device)})"
    weights = sum(p.numel() for p in task.model().parameters())
    rows = {
        "data": f"{task.data}: {len(task.train[0]):,} to train on, {len(task.test[0]):,} to test",
        "model": f"{task.model_name}, {weights:,} weights",
        "training": recipe,
        "machine": f"{device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}",
        "adamfused": f"{adamfused.__version__}, "
        f"{'reference' if backend.choose(None) == 'reference' else 'native'} backend",
    }
    for name, text in rows.items():
        print(f"{name + ':':<11}{text}")
    print(flush=True)


class Progress:
    """The progress of one run: a bar on a terminal with tqdm, otherwise a line an epoch."""

    def __init__(self, label: str, task: Task, epochs: int, epoch_steps: int) -> None:
        self.label, self.task, self.epochs = label, task, epochs
        self.start = time.perf_counter()
        self.bar: Any = None
        tqdm = optional("tqdm")
        if tqdm is not None and sys.stdout.isatty():
            total = epochs * epoch_steps
            self.bar = tqdm.tqdm(
                total=total, desc=f"{label:<16}", unit="step", file=sys.stdout, dynamic_ncols=True
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self) -> None:
        """Count one more step."""
        if self.bar is not None:
            self.bar.update()

    def epoch(self, number: int, loss: float, score: float) -> None:
        """Show the end of an epoch."""
        done = f"loss {loss:.4f}, {self.task.score_name} {score:.2f}{self.task.score_unit}"
        if self.bar is not None:
            self.bar.set_postfix_str(done)
        else:
            seconds = time.perf_counter() - self.start
            print(
                f"{self.label:<16}  epoch {number} of {self.epochs}: {done}, {seconds:.1f} s",
                flush=True,
            )


def tables(task: Task, runs: dict[str, Run]) -> None:
    """Print loss and score an epoch, and the time in `step()`, of torch's run and of ours."""
    names = list(runs)
    torch_run, our_run = runs.values()
    print()
    print(f"{'':5}  {f'mean training loss, {task.loss_unit}':^34}  ", end="")
    print(f"{f'{task.score_name}, {task.score_unit}':^34}")
    print("epoch" + f"  {names[0]:>16}  {names[1]:>16}" * 2)
    for epoch in range(len(torch_run.scores)):
        losses = "".join(f"  {run.epoch_losses[epoch]:>16.4f}" for run in runs.values())
        scores = "".join(f"  {run.scores[epoch]:>16.2f}" for run in runs.values())
        print(f"{epoch + 1:>5}{losses}{scores}")
    print()
    print(f"{'time in step()':<18}{'median, us':>12}{'sum, ms':>12}{'steps':>8}")
    for name, run in runs.items():
        total = sum(run.step_seconds) * 1e3
        print(f"{name:<18}{run.median_us:>12,.0f}{total:>12,.1f}{len(run.step_seconds):>8,}")
    ratio = torch_run.median_us / our_run.median_us
    print(f"ratio of the medians, {names[0]} / {names[1]}: {ratio:.2f}")


def smoothed(values: list[float]) -> npt.NDArray[np.float64]:
    """Return the exponential running mean of `values` (steps,), unbiased from its first step."""
    out = np.empty(len(values))
    total = weight = 0.0
    for i, value in enumerate(values):
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        out[i] = total / weight
    return out


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
    # The runs nearly coincide: the second is drawn thin and dashed on top of the first.
    for (label, run), colour, style, width in zip(
        runs.items(), COLOURS, ("-", "--"), (4.0, 1.6), strict=True
    ):
        line = {"color": colour, "linestyle": style, "linewidth": width, "label": label}
        steps = np.arange(1, len(run.losses) + 1)
        left.plot(steps, run.losses, color=colour, linewidth=width / 3, alpha=0.3)
        left.plot(steps, smoothed(run.losses), **line)
        epochs = np.arange(1, len(run.scores) + 1)
        right.plot(epochs, run.scores, **line, marker="o", markersize=2.5 * width**0.8)
    left.set(
        xlabel=f"step ({epoch_steps} steps are an epoch)",
        ylabel=f"training loss, {task.loss_unit} (log scale)",
        title="Training loss: every step (faint) and smoothed",
        yscale="log",
    )
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_locator(NullLocator())
    right.set(
        xlabel="epoch",
        ylabel=f"{task.score_name}, {task.score_unit}",
        title=f"{task.score_name.capitalize()} after each epoch",
    )
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(loc="upper right")
    right.legend(loc="center right")
    figure.savefig(path, dpi=130)
    return f"Curves of both runs: {path}"
