"""Measures the step on a GPU, beside torch's fused step and an in-place copy of the same run.

    python benchmarks/gpu.py [--quick] [--json FILE] [--no-fail]

A large step is timed by CUDA events, with the second-level cache filled by something else before; one of many small
tensors by the clock from the call to the end of its kernels, host time included. All are taken in turn, medians over
rounds; see README.md beside this file.
"""

from __future__ import annotations

import datetime
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from measure import Seconds, ratio
from targets import Line, Section, TorchFused, arguments, times

import adamfused

GPU = "cuda"
SHARE, FASTER = 0.93, 1.0  # of the copy bandwidth; times torch fused


def gpt2_xl() -> list[tuple[int, ...]]:
    """The shapes of GPT-2 XL's 580 parameters, 1.56 billion numbers."""
    d = 1600
    norm = [(d,), (d,)]
    attention = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    mlp = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(48 * (norm + attention + norm + mlp)), *norm]


def llama_8b() -> list[tuple[int, ...]]:
    """The shapes of Llama 3 8B's 291 parameters, 8.03 billion numbers."""
    d, kv, ff = 4096, 1024, 14336
    layer = [(d, d), (kv, d), (kv, d), (d, d), (ff, d), (ff, d), (d, ff), (d,), (d,)]
    return [(128256, d), *(32 * layer), (d,), (128256, d)]


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters of these shapes on the GPU, with gradients."""
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, device=GPU, dtype=dtype))
        p.grad = torch.randn(shape, device=GPU, dtype=dtype).mul_(1e-3)
        params.append(p)
    return params


def by_events(contenders: Mapping[str, Callable[[], object]], rounds: int) -> Seconds:
    """Seconds on the device of one call of each in every round, the caches full of something else."""
    flush = torch.empty(2**28, dtype=torch.uint8, device=GPU)
    for call in contenders.values():
        for _ in range(3):
            call()
    seconds: Seconds = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            contenders[name]()
            end.record()
            end.synchronize()
            seconds[name].append(1e-3 * begin.elapsed_time(end))
    return seconds


def by_clock(
    contenders: Mapping[str, Callable[[], object]], rounds: int, calls: int = 20
) -> Seconds:
    """Seconds per call of each in every round, from the first call to the end of its last kernel."""
    for call in contenders.values():
        for _ in range(3):
            call()
    seconds: Seconds = {name: [] for name in contenders}
    names = list(contenders)
    gc.disable()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                contenders[name]()
            torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - begin) / calls)
    gc.enable()
    return seconds


def large(title: str, numel: int, dtype: torch.dtype, step_bytes: int, rounds: int) -> Section:
    """One tensor: the bytes of a step over the bandwidth of an in-place copy, and against torch fused."""
    params = parameters([(numel,)], dtype)
    copied = torch.randn(min(numel, 2**30), device=GPU)
    contenders = {
        "copy": copied.neg_,
        "AdamW": adamfused.AdamW(params, backend="native").step,
        "torch AdamW": TorchFused(params).step,
    }
    seconds = by_events(contenders, rounds)
    share = ratio(seconds, "copy", "AdamW", step_bytes * numel / (8 * copied.numel()))
    lines = [
        Line(
            f"AdamW, {title}, of the copy bandwidth",
            share,
            ">=",
            SHARE,
            "",
            times(seconds, *contenders),
        )
    ]
    if dtype is torch.float32:  # in 16 bits torch keeps 16-bit moments and moves fewer bytes
        speed = ratio(seconds, "torch AdamW", "AdamW")
        lines.append(Line(f"AdamW, {title}, times torch fused", speed, ">=", FASTER, "x"))
    return Section(lines, seconds)


def small(numel: int, rounds: int) -> Section:
    params = parameters([(numel,)] * 1000, torch.float32)
    ours, theirs = adamfused.AdamW(params, backend="native"), TorchFused(params)
    seconds = by_clock({"AdamW": ours.step, "torch AdamW": theirs.step}, rounds)
    name = f"AdamW, 1,000 tensors of {numel:,}, times torch fused"
    speed = ratio(seconds, "torch AdamW", "AdamW")
    return Section([Line(name, speed, ">=", 3, "x", times(seconds, *seconds))], seconds)


def model(name: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, rounds: int) -> Section:
    """A model's list of parameters, moments of the parameters' dtype in all contenders."""
    params = parameters(shapes, dtype)
    contenders = {
        "AdamW": adamfused.AdamW(params, state_dtype="param", backend="native").step,
        "torch AdamW": TorchFused(params).step,
    }
    try:
        from apex.optimizers import FusedAdam  # type: ignore[import-not-found]

        if dtype is torch.float32:
            contenders["apex FusedAdam"] = FusedAdam(params).step
    except ImportError:
        pass
    seconds = by_events(contenders, rounds)
    lines = [
        Line(f"AdamW, {name}, times {other}", ratio(seconds, other, "AdamW"), ">=", FASTER, "x")
        for other in contenders
        if other != "AdamW"
    ]
    lines[0] = lines[0]._replace(note=times(seconds, *contenders))
    return Section(lines, seconds)


def all_sections(rounds: int) -> Iterator[tuple[str, Callable[[], Section]]]:
    giga, f32, bf16 = 10**9, torch.float32, torch.bfloat16
    yield "large_float32", lambda: large("1G float32", giga, f32, 28, rounds)
    yield "large_bfloat16", lambda: large("1G bfloat16, float32 moments", giga, bf16, 22, rounds)
    yield "small_16", lambda: small(16, rounds)
    yield "small_4096", lambda: small(4096, rounds)
    yield "gpt2_xl", lambda: model("GPT-2 XL, float32", gpt2_xl(), f32, rounds)
    yield "llama_8b", lambda: model("Llama 8B, bfloat16", llama_8b(), bf16, rounds)


def facts() -> dict[str, Any]:
    """The machine and the software that the figures hold for."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "adamfused": adamfused.__version__,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("Measure the step on a GPU.")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device")
    about = facts()
    print(", ".join(f"{key} {value}" for key, value in about.items() if key != "command"))
    lines: list[Line] = []
    raw: dict[str, Any] = {}
    for name, measure in all_sections(5 if args.quick else 21):
        try:
            section = measure()
        except torch.cuda.OutOfMemoryError as error:
            print(f"SKIP  {name}: {str(error).splitlines()[0]}", flush=True)
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        lines += section.lines
        raw[name] = section.seconds
        if "copy" in section.seconds:
            gigabytes = (
                8e-9 * 10**9 / sorted(section.seconds["copy"])[len(section.seconds["copy"]) // 2]
            )
            print(f"      in-place copy in this part: {gigabytes:.0f} GB/s")
        for line in section.lines:
            print(line, flush=True)
        if args.json:  # after every part, so that what was measured is kept if time runs out
            found = [line._asdict() | {"passed": line.passed} for line in lines]
            args.json.write_text(
                json.dumps(about | {"targets": found, "seconds": raw}, indent=1) + "\n"
            )
    missed = [line.name for line in lines if not line.passed]
    print(f"{len(lines) - len(missed)} of {len(lines)} targets met")
    return 1 if (missed or not lines) and not args.no_fail else 0


if __name__ == "__main__":
    sys.exit(main())
