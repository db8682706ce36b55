"""Measures the optimizers beside Adam, AdamW and RMSprop (those are in targets.py), and says which targets are met.

Every speed is a ratio of two times taken in turn in the same run; see README.md beside this file. Torch's fastest form
is the other one: fused where there is one, else foreach.

    python benchmarks/family.py [--quick] [--json FILE] [--no-fail] [--elements N]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from targets import LARGE, Part, arguments, judge, millions, of_copy, seconds, times

from adamfused.bench import bench

FAMILY = {
    "SGD": ("SGD", "SGD[fused=True]", 1),
    "SGD, momentum": ("SGD[momentum=0.9]", "SGD[momentum=0.9,fused=True]", 1),
    "Adagrad": ("Adagrad", "Adagrad[fused=True]", 1),
    "Adadelta": ("Adadelta", "Adadelta[foreach=True]", 3),
    "NAdam": ("NAdam", "NAdam[foreach=True]", 3),
    "RAdam": ("RAdam", "RAdam[foreach=True]", 3),
    "Lion": ("Lion", None, None),
}
"""By name: ours, torch's, and how many times as long as ours torch's is to take."""


def parts(elements: int, seconds: float) -> Iterator[Part]:
    for name, (ours, theirs, target) in FAMILY.items():
        optimizers = [f"adamfused:{ours}", *([f"torch.optim:{theirs}"] if theirs else [])]
        report = bench(optimizers, [str(elements)], seconds=seconds)
        full = f"{name}, {millions(elements)} float32"
        lines = [of_copy(full, report.rows[0], 0.95)]
        if target is not None:
            lines.append(times(full, report.rows[1], target))
        yield name, lines, report


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--elements",
        metavar="N",
        type=int,
        default=LARGE,
        help="of the one large tensor (32,000,000)",
    )
    args = parser.parse_args(argv)
    return judge(parts(args.elements, seconds(args)), args)


if __name__ == "__main__":
    sys.exit(main())
