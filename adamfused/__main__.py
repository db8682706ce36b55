"""The command line: `python -m adamfused COMMAND ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import adamfused
from adamfused import bench, demo, info
from adamfused.parity import command as parity


class Command(NamedTuple):
    """One subcommand: its line of help, its arguments and what runs it (returns the exit code)."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "info": Command(info.HELP, info.add_arguments, info.run),
    "bench": Command(bench.HELP, bench.add_arguments, bench.run),
    "parity": Command(parity.HELP, parity.add_arguments, parity.run),
    "demo": Command(demo.HELP, demo.add_arguments, demo.run),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="adamfused", description="Fused optimizers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"adamfused {adamfused.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        child = commands.add_parser(name, help=command.help, description=command.help)
        command.add_arguments(child)
        child.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    try:
        code: int = args.run(args)
    except (
        BrokenPipeError
    ):  # what reads our output has gone, as `head` does; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
