"""How things are timed: side by side, so that what slows the machine down slows all of them down."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Seconds = dict[str, list[float]]
"""Seconds per call, one entry per round, by contender."""


def side_by_side(contenders: Mapping[str, Callable[[], object]], rounds: int) -> Seconds:
    """Times every contender once per round, in an order that turns by one each round.

    A contender that takes less than 20 ms is called as often as fills them. Two calls of each come
    first and are not counted: they make the optimizer's state and touch its memory.
    """
    repeats = {}
    for name, call in contenders.items():
        call()
        begin = time.perf_counter()
        call()
        repeats[name] = max(1, int(0.02 / (time.perf_counter() - begin)))
    seconds: Seconds = {name: [] for name in contenders}
    names = list(contenders)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                call, n = contenders[name], repeats[name]
                begin = time.perf_counter()
                for _ in range(n):
                    call()
                seconds[name].append((time.perf_counter() - begin) / n)
    finally:
        gc.enable()
    return seconds


def ratio(seconds: Seconds, of: str, to: str, factor: float = 1.0) -> float:
    """The median over rounds of ``factor`` * seconds of one contender / seconds of another."""
    pairs = zip(seconds[of], seconds[to], strict=True)
    return statistics.median(factor * a / b for a, b in pairs)


def median_ms(seconds: Seconds, name: str) -> float:
    return 1e3 * statistics.median(seconds[name])


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise LookupError(f"/proc/self/status has no {field}")


def peak_bytes(call: Callable[[], object]) -> int:
    """By how much the process's resident memory rises above its start, at the most, during a call.

    Linux keeps the peak (VmHWM) and sets it back when 5 is written to clear_refs. What malloc has
    kept of earlier calls is given back first; else the call could use it again without a rise.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)
