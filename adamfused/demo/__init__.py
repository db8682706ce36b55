"""`python -m adamfused demo NAME`: small training jobs on real data, each with a table and a picture.

Each demo is a module with its help, its options and `run`; `train.py` trains for all, `report.py` prints and draws for
all, and `options.py` has the options of all.
"""

from __future__ import annotations

import argparse
import os
import sys

from adamfused.demo import charlm, mnist, regression, speech
from adamfused.demo.options import threads, unusable
from adamfused.demo.train import DataError, UsageError

HELP = "train a small model on real data, and see in a table and a picture how it went"
UNUSABLE = 2  # the exit code where nothing could be run

DEMOS = {"regression": regression, "mnist": mnist, "speech": speech, "charlm": charlm}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demos to `parser`, each with its options."""
    names = parser.add_subparsers(title="demos", metavar="NAME", required=True)
    for name, demo in DEMOS.items():
        child = names.add_parser(name, help=demo.HELP, description=demo.__doc__)
        child.set_defaults(demo=demo)
        demo.add_arguments(child)


def run(args: argparse.Namespace) -> int:
    """Run one demo and return the exit code: 0 all well, 1 a check failed, 2 cannot be run."""
    problem = unusable(args)
    if problem:
        return refuse(problem)
    # cuBLAS reads this when it starts; without it some of its algorithms are not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        with threads(args.threads):
            return int(args.demo.run(args))
    except (DataError, UsageError) as error:
        return refuse(str(error))


def refuse(message: str) -> int:
    """Print why nothing was run, and return the exit code for it."""
    print(f"error: {message}", file=sys.stderr)
    return UNUSABLE
