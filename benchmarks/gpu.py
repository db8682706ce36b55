"""Measures the step on a GPU, beside torch's fused step and an in-place copy of the same run.

    python benchmarks/gpu.py [--quick] [--json FILE] [--no-fail]

A step is timed by CUDA events, right behind a copy that fills the second-level cache with something else; steps of many
small tensors back to back by the clock, host time included. See README.md beside this file.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence

import torch
from targets import TORCH_ADAMW, Part, arguments, judge, of_copy, seconds, times

from adamfused.bench import Case, bench
from adamfused.bench.case import gpt2, llama
from adamfused.report import optional

SHARE, FASTER = 0.93, 1.0  # of the copy bandwidth; times torch fused
NATIVE = "adamfused:AdamW[backend='native']"
NATIVE_AS_TORCH = "adamfused:AdamW[backend='native',state_dtype='param']"  # 16-bit moments too
CAPTURABLE = "adamfused:AdamW[backend='native',capturable=True]"
TORCH_CAPTURABLE = "torch.optim:AdamW[fused=True,capturable=True]"
APEX = "apex.optimizers:FusedAdam"
NO_ROOM = "GB are free", "OutOfMemoryError"  # the problem of a row that memory is too small for

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SMALL_16, SMALL_1024 = Case.parse("1000x16"), Case.parse("1000x1024")
XL = Case("GPT-2 XL", tuple(gpt2(layers=48, d=1600)))
LLAMA = Case("Llama 3 8B", tuple(llama(32, 4096, 1024, 14336, tied=False)))


def part(
    name: str,
    title: str,
    ours: str,
    others: Sequence[str],
    case: Case,
    dtype: torch.dtype,
    budget: float,
    features: Sequence[str] = (),
) -> Part:
    """A line for each other optimizer, or for the copy if there is none.

    Raises:
        torch.cuda.OutOfMemoryError: if the case is too large for every one of them.
    """
    report = bench(
        [ours, *others],
        [case],
        device="cuda",
        dtype=dtype,
        features=features,
        seconds=budget,
        launches=False,  # see count_launches
    )
    if all(any(words in row.problem for words in NO_ROOM) for row in report.rows):
        raise torch.cuda.OutOfMemoryError(report.rows[0].problem)
    first, *rest = report.rows
    for row in rest:  # what became of ours, judge says
        if row.problem:
            print(f"SKIP  {title}, {row.optimizer}: {row.problem}", flush=True)
    lines = []
    if not first.problem:
        if case.numel == 10**9:
            lines.append(of_copy(f"AdamW, {title}", first, SHARE))
        target = 3 if len(case.shapes) == 1000 else 2 if len(features) == 3 else FASTER
        lines += [times(f"AdamW, {title}", row, target) for row in rest if not row.problem]
    return name, lines, report


def count_launches() -> Part:
    """Of many small tensors. A profiler that has counted slows down what comes later, so this comes last."""
    cases = [SMALL_16, SMALL_1024]
    return "launches", [], bench([NATIVE, TORCH_ADAMW], cases, device="cuda", seconds=0)


def parts(budget: float) -> Iterator[Part]:
    """Every part that the memory of this GPU has room for."""
    giga, apex = Case.parse("1e9"), [APEX] if optional("apex") else []
    around = ["clip", "ema", "scaler"]
    listed: list[tuple[str, str, str, list[str], Case, torch.dtype, list[str]]] = [
        ("small_16", "1,000 tensors of 16", NATIVE, [TORCH_ADAMW], SMALL_16, FLOAT32, []),
        ("small_1024", "1,000 tensors of 1,024", NATIVE, [TORCH_ADAMW], SMALL_1024, FLOAT32, []),
        ("large_float32", "1G float32", NATIVE, [TORCH_ADAMW], giga, FLOAT32, []),
        # No ratio to torch: it keeps 16-bit moments and moves fewer bytes.
        ("large_bfloat16", "1G bfloat16", NATIVE, [], giga, BFLOAT16, []),
        ("gpt2_xl", "GPT-2 XL, float32", NATIVE_AS_TORCH, [TORCH_ADAMW, *apex], XL, FLOAT32, []),
        ("whole_step", "clip, EMA and scaler", NATIVE, [TORCH_ADAMW], XL, FLOAT32, around),
        (
            "whole_step_without_waiting",
            "clip, EMA and scaler, capturable",
            CAPTURABLE,
            [TORCH_CAPTURABLE],
            XL,
            FLOAT32,
            around,
        ),  # fmt: skip
        ("llama_8b", "Llama 8B, bfloat16", NATIVE_AS_TORCH, [TORCH_ADAMW], LLAMA, BFLOAT16, []),
    ]
    for name, title, ours, others, case, dtype, features in listed:
        try:
            yield part(name, title, ours, others, case, dtype, budget, features)
        except torch.cuda.OutOfMemoryError as error:
            print(f"SKIP  {name}: {str(error).splitlines()[0]}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    yield count_launches()


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("Measure the step on a GPU.")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device")
    return judge(parts(seconds(args) / 4), args)


if __name__ == "__main__":
    sys.exit(main())
