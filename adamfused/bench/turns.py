"""How calls are timed: in turn, so that what slows the machine down slows all of them down."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import benchmark

Call = Callable[[], object]

ROUNDS = (21, 201)
"""At least, at most. With 21, 10 % are found in 19 of 20 runs on a machine as bad as the tests simulate."""

BLOCK = 5e-3
"""Seconds of calls back to back in a round: 100,000 times what reading the clock takes."""

_IN_CACHE = 2
_BEYOND_CACHE = 4


class Turn(NamedTuple):
    """One turn of one call, in seconds.

    The copy goes first and leaves the caches full of something else. Then come what the call is measured by, the
    ``yardstick`` (the copy itself where there is no other), the call (``cold``), and calls back to back (``warm``,
    each; None where they were not asked for).
    """

    copy: float
    yardstick: float
    cold: float
    warm: float | None


def cache_bytes(device: torch.device) -> int:
    """The bytes of all last-level caches of the machine, or of the GPU's; 32 MiB where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    levels: dict[
        tuple[int, str], int
    ] = {}  # one entry a cache, by its level and the processors that share it
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, shared, size = (
                (folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
            )
            levels[int(level), shared] = 1024 * int(size.removesuffix("K"))
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in levels), default=0)
    return sum(size for (level, _), size in levels.items() if level == last) or 2**25


def stays_in_cache(step_bytes: float, device: torch.device) -> bool:
    """Whether a step that moves so many bytes may find some of them in a cache when it is called again."""
    return step_bytes < _IN_CACHE * cache_bytes(device)


class Copy:
    """An in-place pass over a tensor that no cache holds: reads and writes each of its bytes once.

    It is the bandwidth that steps are judged by, and what empties the caches before them: its lines are dirty, as those
    of a backward pass are. On a GPU it is long enough to hide the host's part of the call behind it.
    """

    def __init__(self, device: torch.device) -> None:
        floor = 2**30 if device.type == "cuda" else 2**27
        size = max(floor, _BEYOND_CACHE * cache_bytes(device))
        self.tensor = torch.randn(size // 4, device=device)
        self.bytes = 2 * 4 * self.tensor.numel()

    def __call__(self) -> None:
        self.tensor.neg_()


def laps(calls: Sequence[Call], device: torch.device) -> list[float]:
    """Seconds, to the nanosecond, that each call takes right after the one before; on CUDA by events of the device."""
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        torch.cuda._sleep(10_000_000)  # about 5 ms, in which the host gets ahead: it is timed apart
        marks[0].record()
        for call, mark in zip(calls, marks[1:], strict=True):
            call()
            mark.record()
        torch.cuda.synchronize(device)
        return [round(1e-3 * begin.elapsed_time(end), 9) for begin, end in pairwise(marks)]
    times = [benchmark.timer()]
    for call in calls:
        call()
        times.append(benchmark.timer())
    return [round(end - begin, 9) for begin, end in pairwise(times)]


def seconds_per_call(call: Call, calls: int) -> float:
    """Seconds of one of so many calls back to back, to the end of what they started on a device."""
    begin = benchmark.timer()
    for _ in range(calls):
        call()
    return round((benchmark.timer() - begin) / calls, 9)


def host_seconds(call: Call, calls: int = 10) -> float:
    """The least seconds, of so many calls, until one returns, its device idle before and not waited for."""
    seconds = []
    for _ in range(calls):
        begin = benchmark.timer()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def take_turns(
    calls: Sequence[Call],
    copy: Call,
    yardstick: Call | None,
    seconds: float,
    device: torch.device,
    warm: bool = False,
    tell: Callable[[int, int], None] = lambda done, rounds: None,
) -> list[list[Turn] | BaseException]:
    """Times every call once a round, in an order that turns by one each round, until the seconds are used up.

    The calls have been warmed up. Python's garbage collector is off meanwhile.

    Args:
        calls: what is timed.
        copy: called, and timed, before each of them.
        yardstick: called, and timed, after the copy; ``None``: the copy is the yardstick.
        seconds: for all of it. At least ``ROUNDS[0]`` and at most ``ROUNDS[1]`` rounds are made.
        device: where the calls work.
        warm: whether to time them back to back too.
        tell: called after each round with the rounds made and to be made.

    Returns:
        For each call its turns, one a round, or what it raised (``SystemExit`` too); the others then go on without it.
    """
    before = [copy] if yardstick is None else [copy, yardstick]
    repeats = [0 for _ in calls]

    def turn(i: int) -> Turn:
        times = laps([*before, calls[i]], device)
        back_to_back = seconds_per_call(calls[i], repeats[i]) if warm else None
        return Turn(times[0], times[-2], times[-1], back_to_back)

    turns: list[list[Turn]] = [[] for _ in calls]
    failed: dict[int, BaseException] = {}
    order = deque(range(len(calls)))

    def each(do: Callable[[int], object]) -> None:
        for i in order:
            if i not in failed:
                try:
                    do(i)
                except (Exception, SystemExit) as error:
                    failed[i] = error

    def count(i: int) -> None:
        repeats[i] = max(1, int(BLOCK / seconds_per_call(calls[i], 2)))

    def take_round() -> None:
        each(lambda i: turns[i].append(turn(i)))
        order.rotate(-1)

    if warm:
        each(count)
    gc.collect()
    gc.disable()
    try:
        begin = benchmark.timer()
        take_round()
        rounds = int(seconds / (benchmark.timer() - begin))
        rounds = min(max(rounds, ROUNDS[0]), ROUNDS[1])
        for done in range(1, rounds + 1):
            take_round()
            tell(done, rounds)
    finally:
        gc.enable()
    # The first round is not counted: it was to say how long one takes.
    return [failed.get(i, its[1:]) for i, its in enumerate(turns)]
