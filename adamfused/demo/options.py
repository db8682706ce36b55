"""The options that all demos have in common, and what is made of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import adamfused
from adamfused import backend
from adamfused.demo.train import Settings
from adamfused.report import SUFFIXES

SHOWN = "(default: %(default)s)"

# What each optimizer is trained with: rates for a small network without normalisation layers.
RECIPES: dict[str, dict[str, Any]] = {
    # It moves by the gradient itself, whose numbers are small here; momentum multiplies that by 10.
    "SGD": {"lr": 0.03, "momentum": 0.9},
    # It divides by the root of a sum that only grows, so its steps shrink: it can start at more.
    "Adagrad": {"lr": 0.01},
    # The size of its steps comes from its own earlier steps; 1 leaves that as it is.
    "Adadelta": {"lr": 1.0},
    # Its running average starts at 0 and is not corrected, so the first steps are 10 times this.
    "RMSprop": {"lr": 1e-3},
    # A step is about this far, whatever the gradient's size.
    "Adam": {"lr": 1e-3},
    "AdamW": {"lr": 1e-3, "weight_decay": 0.01},
    "NAdam": {"lr": 1e-3},
    "RAdam": {"lr": 1e-3},
    # Every weight moves by all of this in every step (only the sign of an average counts), where
    # Adam's weights mostly move by less: so a fraction of Adam's rate.
    "Lion": {"lr": 3e-4},
}


def optimizer(name: str, **more: Any) -> Callable[..., torch.optim.Optimizer]:
    """Return what makes adamfused's optimizer `name` from parameters, by its recipe and `more`."""
    return partial(getattr(adamfused, name), **RECIPES[name] | more)


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


def add_common(parser: argparse.ArgumentParser, demo: str, optimizers: Iterable[str]) -> Any:
    """Add the options of all demos; the first of `optimizers` is the default.

    Returns the group of what excludes `--optimizer`.
    """
    names = {name.lower(): name for name in optimizers}
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--optimizer",
        metavar="NAME",
        type=lambda text: names.get(text.lower(), text),
        choices=list(names.values()),
        # In lower case: for argparse, giving the very string of the default is giving nothing, and
        # what excludes --optimizer would not.
        default=next(iter(names)),
        help=f"{', '.join(names.values())} {SHOWN}",
    )
    options: list[tuple[str, str, Callable[[str], object], object, str]] = [
        ("--seed", "N", seed, 0, f"of the weights and of the batches {SHOWN}"),
        (
            "--threads",
            "N",
            count,
            None,
            "threads on the CPU (default: torch's choice; on a busy machine 1 is faster)",
        ),
        ("--plot", "FILE", Path, f"demo-{demo}.png", f"picture to draw {SHOWN}"),
    ]
    for flag, metavar, kind, default, text in options:
        parser.add_argument(flag, metavar=metavar, type=kind, default=default, help=text)
    parser.add_argument(
        "--backend",
        choices=backend.CHOICES,
        help="of adamfused (default: what ADAMFUSED_BACKEND says, else auto)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)"
    )
    return choice


def add_counts(parser: argparse.ArgumentParser, **defaults: tuple[int, str]) -> None:
    """Add options that are whole numbers above 0: the default of each, and its help."""
    for name, (default, text) in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, metavar="N", type=count, default=default, help=f"{text} {SHOWN}")


def unusable(args: argparse.Namespace) -> str | None:
    """Return what is wrong with the arguments, found before any time is spent on training."""
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no CUDA device here"
    if args.plot.suffix.lower() not in SUFFIXES:
        return f"--plot {args.plot}: expected a name that ends in {' or '.join(SUFFIXES)}"
    if not args.plot.parent.is_dir():
        return f"--plot {args.plot}: there is no folder {args.plot.parent}"
    try:
        backend.choose(args.backend)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def settings(args: argparse.Namespace, batch_size: int) -> Settings:
    """Return how to train: what the arguments say, in batches of that size."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Settings(batch_size, args.seed, torch.device(device))


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Have torch use `number` threads on the CPU inside the block; None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
