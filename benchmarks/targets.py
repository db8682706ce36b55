"""Measures what the project sets itself as targets, and says which are met.

Every speed is a ratio of two times taken in turn in the same run; see README.md beside this file.

    python benchmarks/targets.py [--quick] [--json FILE] [--no-fail] [--threads N] [--elements N]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from drift import drifts
from measure import Seconds, median_ms, peak_bytes, ratio, side_by_side
from torch import Tensor

import adamfused
from adamfused import backend

COPIED = 2**25  # elements of the tensor that is copied: far more than any cache holds
LARGE = 32_000_000  # elements of the one large parameter


class Line(NamedTuple):
    """One target: what was found and what is asked for."""

    name: str
    value: float
    better: str  # ">=" or "<="
    target: float
    unit: str = ""
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.value >= self.target if self.better == ">=" else self.value <= self.target

    def __str__(self) -> str:
        verdict = "PASS" if self.passed else "FAIL"
        value = f"{self.value:.3g}{self.unit}"
        return f"{verdict}  {self.name:<54}{value:>9}  {self.better} {self.target:g}{self.unit}  {self.note}"


class Section(NamedTuple):
    """A group of lines measured together, with all that was timed for them."""

    lines: list[Line]
    seconds: Seconds


class TorchFused(torch.optim.AdamW):
    """torch's fused AdamW."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, fused=True, **kwargs)


def gpt2_small() -> list[tuple[int, ...]]:
    """The shapes of GPT-2 small's 148 parameters, 124 million numbers, in the model's order."""
    d = 768
    norm = [(d,), (d,)]
    attention = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    mlp = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(12 * (norm + attention + norm + mlp)), *norm]


def parameters(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Parameters of these shapes, with gradients, normally distributed."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        p.grad = (1e-3 * torch.randn(shape, generator=generator)).to(dtype)
        params.append(p)
    return params


def in_place_copy() -> Callable[[], Tensor]:
    """A pass that reads and writes each byte of a large float32 tensor once: 8 bytes an element."""
    return torch.randn(COPIED).neg_


def of_bandwidth(seconds: Seconds, ours: str, step_bytes: int) -> float:
    """What share of the in-place copy's bandwidth a step that moves so many bytes has."""
    return ratio(seconds, "copy", ours, step_bytes / (8 * COPIED))


def millions(numel: int) -> str:
    return f"{numel / 1e6:.4g}M"


def times(seconds: Seconds, *names: str) -> str:
    return "(" + ", ".join(f"{name} {median_ms(seconds, name):.3g} ms" for name in names) + ")"


# ---- the targets ---------------------------------------------------------------------------------


def one_large_tensor(name: str, numel: int, rounds: int) -> Section:
    """Adam or AdamW on one float32 tensor: bytes over bandwidth, and against torch's fused form.

    28 bytes a number: the parameter and both moments are read and written, the gradient is read.
    """
    params = parameters([(numel,)])
    ours = getattr(adamfused, name)(params)
    theirs = getattr(torch.optim, name)(params, fused=True)
    contenders = {"copy": in_place_copy(), name: ours.step, f"torch {name}": theirs.step}
    seconds = side_by_side(contenders, rounds)
    share = of_bandwidth(seconds, name, 28 * numel)
    speed = ratio(seconds, f"torch {name}", name)
    note = times(seconds, *contenders)
    return Section(
        [
            Line(
                f"{name}, {millions(numel)} float32, of the copy bandwidth",
                share,
                ">=",
                0.95,
                "",
                note,
            ),
            Line(f"{name}, {millions(numel)} float32, times torch fused", speed, ">=", 1.0, "x"),
        ],
        seconds,
    )


def large_rmsprop(numel: int, rounds: int) -> Section:
    params = parameters([(numel,)])
    ours = adamfused.RMSprop(params, lr=1e-3)
    theirs = torch.optim.RMSprop(params, lr=1e-3, foreach=True)
    seconds = side_by_side({"RMSprop": ours.step, "torch RMSprop": theirs.step}, rounds)
    speed = ratio(seconds, "torch RMSprop", "RMSprop")
    note = times(seconds, "RMSprop", "torch RMSprop")
    return Section(
        [
            Line(
                f"RMSprop, {millions(numel)} float32, times torch foreach",
                speed,
                ">=",
                3,
                "x",
                note,
            )
        ],
        seconds,
    )


def large_bfloat16(numel: int, rounds: int) -> Section:
    """22 bytes a number: 4 for the parameter, 2 for the gradient, 16 for the moments."""
    optimizer = adamfused.AdamW(parameters([(numel,)], torch.bfloat16))
    seconds = side_by_side({"copy": in_place_copy(), "AdamW": optimizer.step}, rounds)
    share = of_bandwidth(seconds, "AdamW", 22 * numel)
    name = f"AdamW, {millions(numel)} bfloat16, float32 moments, of the same"
    return Section([Line(name, share, ">=", 0.9, "", times(seconds, "copy", "AdamW"))], seconds)


def many_small_tensors(numel: int, target: float, rounds: int) -> Section:
    params = parameters([(numel,)] * 1000)
    ours, theirs = adamfused.AdamW(params), TorchFused(params)
    seconds = side_by_side({"AdamW": ours.step, "torch AdamW": theirs.step}, rounds)
    note = times(seconds, "AdamW", "torch AdamW")
    speed = ratio(seconds, "torch AdamW", "AdamW")
    lines = [
        Line(
            f"AdamW, 1,000 tensors of {numel:,}, times torch fused", speed, ">=", target, "x", note
        )
    ]
    if numel == 16:
        cost = median_ms(seconds, "AdamW")  # ms per 1,000 tensors: microseconds a tensor
        lines.append(Line("AdamW, host cost per tensor", cost, "<=", 0.5, " us"))
    return Section(lines, seconds)


def gpt2(rounds: int) -> Section:
    params = parameters(gpt2_small())
    ours, theirs = adamfused.AdamW(params), TorchFused(params)
    seconds = side_by_side({"AdamW": ours.step, "torch AdamW": theirs.step}, rounds)
    speed = ratio(seconds, "torch AdamW", "AdamW")
    note = times(seconds, "AdamW", "torch AdamW")
    peak = statistics.median(peak_bytes(ours.step) for _ in range(5)) / 1e6
    return Section(
        [
            Line("AdamW, GPT-2 small, times torch fused", speed, ">=", 1.0, "x", note),
            Line("AdamW, GPT-2 small, peak memory in step()", peak, "<=", 1.0, " MB"),
        ],
        seconds,
    )


def import_time() -> Section:
    """What `import adamfused` adds to `import torch`, in fresh processes."""
    code = "import time, torch; t = time.perf_counter(); import adamfused; print(time.perf_counter() - t)"
    env = os.environ | {"PYTHONPATH": str(Path(adamfused.__file__).parent.parent)}
    runs = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], env=env, capture_output=True, check=True
            ).stdout
        )
        for _ in range(5)
    ]
    line = Line("import adamfused, beside import torch", statistics.median(runs), "<=", 0.3, " s")
    return Section([line], {"import": runs})


def drift() -> Section:
    """Errors against float64 after 3,000 float32 steps: torch's over ours."""
    (ours_p, ours_v), (torch_p, torch_v) = drifts(adamfused.AdamW, TorchFused)
    of_p = f"({torch_p:.2g} / {ours_p:.2g} of the path)"
    of_v = f"({torch_v:.2g} / {ours_v:.2g})"
    return Section(
        [
            Line(
                "AdamW, 3,000 steps, error of p, torch / ours",
                torch_p / ours_p,
                ">=",
                10,
                "x",
                of_p,
            ),
            Line("AdamW, the same, of second moments", torch_v / ours_v, ">=", 10, "x", of_v),
        ],
        {},
    )


def all_sections(numel: int, rounds: int) -> Iterator[tuple[str, Section]]:
    yield "large_adamw", one_large_tensor("AdamW", numel, rounds)
    yield "large_adam", one_large_tensor("Adam", numel, rounds)
    yield "large_rmsprop", large_rmsprop(numel, rounds)
    yield "large_bfloat16", large_bfloat16(numel, rounds)
    yield "small_16", many_small_tensors(16, 20, rounds)
    yield "small_1024", many_small_tensors(1024, 5, rounds)
    yield "gpt2", gpt2(rounds)
    yield "import", import_time()
    yield "drift", drift()


# ---- the report ----------------------------------------------------------------------------------


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def facts() -> dict[str, Any]:
    """The machine and the software that the figures hold for."""
    native = backend.native()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu": cpu_model(),
        "isa": native.isa() if native is not None else f"none: {backend.NATIVE_ERROR}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "adamfused": adamfused.__version__,
    }


def arguments(description: str) -> argparse.ArgumentParser:
    """What every script of targets takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 21")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all that was measured")
    parser.add_argument("--no-fail", action="store_true", help="exit 0 even if a target is missed")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("Measure adamfused's targets.")
    parser.add_argument("--threads", metavar="N", type=int, help="instead of torch's default")
    parser.add_argument(
        "--elements",
        metavar="N",
        type=int,
        default=LARGE,
        help="of the one large tensor (32,000,000)",
    )
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    about = facts()
    print(f"{about['cpu']}, {about['isa']}, {about['threads']} threads, torch {about['torch']}")
    lines: list[Line] = []
    raw: dict[str, Any] = {}
    bandwidth = math.nan
    for name, section in all_sections(args.elements, 5 if args.quick else 21):
        lines += section.lines
        raw[name] = section.seconds
        if "copy" in section.seconds:
            gb = [8e-9 * COPIED / s for s in section.seconds["copy"]]
            bandwidth = statistics.median(gb)
            print(f"      in-place copy in this part: {bandwidth:.1f} GB/s")
        for line in section.lines:
            print(line, flush=True)
    missed = [line.name for line in lines if not line.passed]
    print(f"{len(lines) - len(missed)} of {len(lines)} targets met")
    if args.json:
        found = [line._asdict() | {"passed": line.passed} for line in lines]
        args.json.write_text(
            json.dumps(about | {"targets": found, "seconds": raw}, indent=1) + "\n"
        )
    return 1 if missed and not args.no_fail else 0


if __name__ == "__main__":
    sys.exit(main())
