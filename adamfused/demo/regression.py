"""A line through 100 points: what Adam's bias correction is for.

Adam with and without it, and SGD, fit y = 3x + 2 + noise. All must end at the least-squares line, which numpy gives;
if one does not, the exit code is 1.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector

from adamfused.demo import report
from adamfused.demo.options import add_common, add_counts, optimizer, settings
from adamfused.demo.train import Run, Task, equal_parts, train
from adamfused.report import Column, Table, show

HELP = "a line through 100 points: what Adam's bias correction is for"
POINTS, SLOPE, INTERCEPT, NOISE = 100, 3.0, 2.0, 0.5
LR = 0.1
ROWS = 5  # of the table that grows during training
FIRST, SHOWN = 20, 100  # steps whose sizes, and whose losses, are drawn

# The noise leaves the true line uncertain by NOISE / sqrt(POINTS) = 0.05, so a fit that is 0.001
# beside the least-squares line is as good as that line. Float32 itself would allow 1e-6.
CLOSE = 1e-3


def points(seed: int) -> tuple[Tensor, Tensor]:
    """Return x, evenly spaced in -1..1, and y = 3x + 2 + noise, both (100, 1)."""
    x = torch.linspace(-1, 1, POINTS).unsqueeze(1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return x, SLOPE * x + INTERCEPT + NOISE * noise


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """Return the slope and the intercept of the line that fits best, (2,) float64."""
    matrix = np.stack([x.squeeze(1).double(), np.ones(len(x))], axis=1)
    return torch.from_numpy(np.linalg.lstsq(matrix, y.squeeze(1).double().numpy(), rcond=None)[0])


def watched(run: Run) -> list[Tensor]:
    """Return a list that will hold slope and intercept, (2,), at the start and after each step."""
    path: list[Tensor] = []

    def note(*_: object) -> None:
        path.append(parameters_to_vector(run.model.parameters()).detach().cpu().double())

    note()
    run.optimizer.register_step_post_hook(note)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_common(parser, "regression", ["Adam", "AdamW"])  # those that have bias_correction
    add_counts(parser, epochs=(500, "passes over the points, each one step"))


def run(args: argparse.Namespace) -> int:
    """Fit the line three times; return 0 if each fit is the least-squares line, else 1."""
    x, y = points(args.seed)
    best = least_squares(x, y)
    task = Task(
        data=f"y = {SLOPE:g}x + {INTERCEPT:g} + noise of {NOISE:g}",
        model_name="A line",
        model=lambda: nn.Linear(1, 1),
        train=(x, y),
        test=(x, (x * best[0] + best[1]).float()),
        loss=mse_loss,
        loss_unit="y²",
        score=lambda fitted, line: (fitted - line).abs().max().item(),
        score_name="distance from the least-squares line",
        score_unit="y",
    )
    # No weight decay: it would pull the line away from the best one.
    plain = {"lr": LR, "weight_decay": 0.0, "backend": args.backend}
    name = args.optimizer
    optimizers = {
        name: optimizer(name, **plain),
        f"{name}, no bias correction": optimizer(name, **plain, bias_correction=False),
        "SGD": optimizer("SGD", **plain, momentum=0.0),
    }
    how = settings(args, POINTS)
    report.header(task, how, f"lr {LR:g}, seed {how.seed}, epochs {args.epochs}", args.backend)
    runs = {label: Run(task, how, made) for label, made in optimizers.items()}
    paths = {label: watched(run) for label, run in runs.items()}
    rows = equal_parts(args.epochs, ROWS)
    row_steps = args.epochs // rows
    with report.Progress(
        task, runs, rows * row_steps, ("step", row_steps), [name, "uncorrected", "SGD"]
    ) as progress:
        train(runs.values(), rows, row_steps, progress)

    # The size of a step is how far it moves the weight that it moves most.
    sizes = {
        label: [(b - a).abs().max().item() for a, b in zip(path, path[1 : FIRST + 1], strict=False)]
        for label, path in paths.items()
    }
    gaps = {label: (path[-1] - best).abs().max().item() for label, path in paths.items()}
    columns = [
        Column("", left=True),
        Column("slope"),
        Column("intercept"),
        Column("off by at most"),
        Column("first step"),
        Column("largest step", f"of {FIRST}"),
    ]
    cells = [
        [
            label,
            *(f"{value:.5f}" for value in path[-1].tolist()),
            f"{gaps[label]:.1e}",
            f"{sizes[label][0]:.3f}",
            f"{max(sizes[label]):.3f}",
        ]
        for label, path in paths.items()
    ]
    cells.append(["least squares", *(f"{value:.5f}" for value in best.tolist()), "", "", ""])
    note = (
        f"The averages of {name} start at 0. Uncorrected, that of the squares is behind for a thousand steps, and what "
        f"is divided by its root is too long: the first step by sqrt(10), the next ones by more. Corrected, no step "
        f"here is longer than lr."
    )
    print()
    show(Table("The lines", columns, cells, note))

    losses = {label: run.losses[:SHOWN] for label, run in runs.items()}
    curves = {label: (range(1, len(values) + 1), values) for label, values in losses.items()}
    steps = {label: (range(1, len(moves) + 1), moves) for label, moves in sizes.items()}
    panels = [
        [
            report.Curves(
                f"Training loss, first {SHOWN} steps",
                "step",
                "mean squared error, y²",
                curves,
                log=True,
            )
        ],
        [
            report.Curves(
                f"First {FIRST} steps: corrected, they are at most lr = {LR:g}",
                "step",
                "size of the step (largest move of a weight)",
                steps,
                marker="o",
            )
        ],
    ]
    title = f"A line fitted to {task.data}, {POINTS} points"
    print(f"\n{report.picture(args.plot, title, panels)}\n")

    far = [label for label, gap in gaps.items() if not gap < CLOSE]
    if far:
        print(f"NOT at the least-squares line (off by {CLOSE:g} or more): {'; '.join(far)}.")
        return 1
    print(f"All {len(runs)} are at the least-squares line, off by less than {CLOSE:g}.")
    return 0
