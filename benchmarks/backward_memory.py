"""Measures how much less memory training takes when each parameter moves inside the backward pass.

    python benchmarks/backward_memory.py [--parameters N] [--json FILE] [--no-fail]

The model is 100 equal layers, so that gradients come one after the other, each 1 % of them all. Each loop trains it in
a process of its own, from the first step on. The peak is that of resident memory, above what the process had before it
made the model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from memory import peak_bytes
from targets import Line, Part, judge

import adamfused

LAYERS = 100
LOOPS = ("plain", "in backward", "in backward, accumulate=2")


def train(loop: str, width: int) -> None:
    """Trains for three iterations of one backward pass each: where two are awaited, step() finds all gradients."""
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*layers)
    if loop == "plain":
        optimizer = adamfused.AdamW(model.named_parameters())
    else:
        passes = 2 if loop.endswith("accumulate=2") else 1
        handle = adamfused.step_in_backward(model, adamfused.AdamW, accumulate=passes)
        optimizer = handle.optimizer
    for _ in range(3):
        model(torch.ones(1, width)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def peak(loop: str, width: int) -> int:
    """The bytes that training adds to a fresh process, at the most.

    Resident memory is then what tensors take: glibc gives memory above this threshold back as soon as it is freed, and
    the threshold stays where it is set. Left to itself it rises with what is freed, up to 32 MiB; memory below it comes
    from heaps whose holes depend on the order of all calls, and would be counted.
    """
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    command = [sys.executable, __file__, "--train", loop, str(width)]
    return int(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)


def peaks(parameters: int) -> tuple[int, dict[str, int]]:
    """The bytes of the parameters, and so of the gradients, and the peak of each loop."""
    width = round((parameters / LAYERS) ** 0.5)
    return 4 * LAYERS * width**2, {loop: peak(loop, width) for loop in LOOPS}


def parts(parameters: int) -> Iterator[Part]:
    size, found = peaks(parameters)
    plain, in_backward, control = found.values()
    print(
        f"      {size / 4e6:.4g}M float32 parameters: {megabytes(size)}, their gradients: {megabytes(size)}"
    )
    for loop, its in found.items():
        print(f"      peak, {loop}: {megabytes(its)}")
    name = "AdamW in backward, memory saved, of the gradients'"
    difference = f"({megabytes(plain)} - {megabytes(in_backward)}) / {megabytes(size)}"
    yield (
        "backward_memory",
        [
            # One of 100 gradients is there at a time, and 1 % for what else may come and go.
            Line(name, (plain - in_backward) / size, ">=", 0.98, "", difference),
            # Gradients that are kept are seen.
            Line("the same with accumulate=2, a control", (plain - control) / size, "<=", 0.02),
        ],
        None,
    )


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure the memory that a step in backward saves."
    )
    parser.add_argument("--parameters", metavar="N", type=int, default=100_000_000)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all that was measured")
    parser.add_argument("--no-fail", action="store_true", help="exit 0 even if a target is missed")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.train:
        loop, width = args.train
        print(peak_bytes(lambda: train(loop, int(width))))
        return 0
    return judge(parts(args.parameters), args)


if __name__ == "__main__":
    sys.exit(main())
