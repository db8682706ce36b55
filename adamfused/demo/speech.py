"""Who is speaking? Nine speakers say two vowels; a GRU tells them apart.

It is trained twice, with two of torch's schedulers for the learning rate: a cosine that decays once, and one that
restarts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LRScheduler

from adamfused.demo import report, vowels
from adamfused.demo.mnist import accuracy
from adamfused.demo.options import RECIPES, add_common, add_counts, optimizer, settings
from adamfused.demo.train import Run, Task, steps_per_epoch, train

HELP = "nine speakers, told apart by a GRU, with learning rates that decay and that restart"
RATE = 5  # times the rate of the recipe: a small network that is to learn in 500 steps
NOISE = 0.4  # in standard deviations of the coefficients
CYCLES = 3  # of the schedule that restarts
LINES = 7  # of the table that grows during training


class Listener(nn.Module):
    """Maps recordings (N, time, 12), NaN after the end of each, to logits (N, 9) of the speakers."""

    def __init__(self, coefficients: int, speakers: int, width: int = 64) -> None:
        super().__init__()
        self.gru = nn.GRU(coefficients, width, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(width, speakers)

    def forward(self, recordings: Tensor) -> Tensor:
        """Return the logits."""
        lengths = (~recordings[..., 0].isnan()).sum(1)
        sounds = recordings.nan_to_num(0.0)
        if self.training:  # few recordings: noise, new each time, makes more of them
            sounds = sounds + NOISE * torch.randn_like(sounds)
        heard, _ = self.gru(sounds)
        at_the_end = heard[torch.arange(len(heard)), lengths - 1]
        return self.head(self.dropout(at_the_end))


def load(data_dir: Path | None = None) -> Task:
    """Return the task, on the recordings of a folder or of aeon."""
    recordings = vowels.load(data_dir)
    coefficients, speakers = recordings.train[0].shape[2], int(recordings.train[1].max()) + 1
    return Task(
        data=recordings.name,
        model_name="GRU",
        model=lambda: Listener(coefficients, speakers),
        train=recordings.train,
        test=recordings.test,
        loss=cross_entropy,
        loss_unit="nats",
        score=accuracy,
        score_name="test accuracy",
        score_unit="%",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_common(parser, "speech", ["Adam", *(name for name in RECIPES if name != "Adam")])
    add_counts(parser, epochs=(42, "passes over the data"), batch_size=(30, "recordings a step"))
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        type=Path,
        help=f"folder with {vowels.NAME}_TRAIN.ts and {vowels.NAME}_TEST.ts (default: those that "
        "aeon carries)",
    )


def run(args: argparse.Namespace) -> int:
    """Train with both schedules and show how they did."""
    task, how = load(args.data_dir), settings(args, args.batch_size)
    epoch_steps = steps_per_epoch(task, how)
    steps = args.epochs * epoch_steps
    lr = RATE * RECIPES[args.optimizer]["lr"]
    schedules: dict[str, Callable[[Optimizer], LRScheduler]] = {
        "cosine decay": partial(CosineAnnealingLR, T_max=steps),
        "warm restarts": partial(CosineAnnealingWarmRestarts, T_0=-(-steps // CYCLES)),
    }
    recipe = f"{args.optimizer}, lr {lr:g}, batch {how.batch_size}, seed {how.seed}"
    report.header(task, how, f"{recipe}, epochs {args.epochs}", args.backend)
    made = optimizer(args.optimizer, lr=lr, backend=args.backend)
    runs = {name: Run(task, how, made, schedule) for name, schedule in schedules.items()}
    unit = ("epoch", epoch_steps)
    with report.Progress(task, runs, steps, unit, every=-(-args.epochs // LINES)) as progress:
        train(runs.values(), args.epochs, epoch_steps, progress)
    report.results(task, runs)
    rates = report.Curves(
        title="Learning rate",
        xlabel=report.step_label(unit),
        ylabel="learning rate",
        curves={name: (range(1, steps + 1), run.rates) for name, run in runs.items()},
    )
    panels = [[rates], [report.losses(task, runs, unit)], [report.scores(task, runs, unit)]]
    title = f"{task.model_name} on {task.data}\n{recipe}"
    print(f"\n{report.picture(args.plot, title, panels)}")
    return 0
