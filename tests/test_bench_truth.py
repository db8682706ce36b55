"""Does ``bench`` tell the truth? A slow-down of 10 % is found and one of 0 % is not, in 19 of 20 runs."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from adamfused.bench import turns
from adamfused.bench.compare import compare
from adamfused.bench.interval import FEWEST, Interval, judge
from adamfused.bench.result import Report, Row
from adamfused.bench.turns import ROUNDS, Turn, take_turns

RUNS = 1000
ROUNDS_MADE = ROUNDS[0]
CPU = torch.device("cpu")


class Machine:
    """A machine as bad as they come: it drifts, other work comes and goes, single times spike, tails are heavy."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.drift = 0.0
        self.busy = False

    def time(self, work: float) -> float:
        """How long work that takes so many seconds takes here and now."""
        draw = self.random
        self.drift = 0.995 * self.drift + draw.gauss(0, 0.01)
        self.busy ^= draw.random() < 0.02
        jitter = 1 + 0.01 * draw.paretovariate(1.5)  # without a variance
        spike = 1 + draw.expovariate(0.5) if draw.random() < 0.05 else 1
        return work * math.exp(self.drift) * (1.4 if self.busy else 1) * jitter * spike


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], str]:
    """The verdict on something slower by so much, timed by bench's own loop with the simulated machine's clock."""
    clock = 0.0
    monkeypatch.setattr(turns.benchmark, "timer", lambda: clock)
    monkeypatch.setattr(turns.gc, "collect", lambda: 0)  # takes longer than all else here

    def verdict(seed: int, slower: float) -> str:
        machine = Machine(seed)

        def takes(work: float) -> Callable[[], None]:
            def call() -> None:
                nonlocal clock
                clock += machine.time(work)

            return call

        timed = take_turns([takes(1), takes(1 + slower)], takes(0.1), None, seconds=0, device=CPU)
        return of_turns(*timed)

    return verdict


def of_turns(first: list[Turn] | BaseException, second: list[Turn] | BaseException) -> str:
    """The verdict on the second."""
    assert isinstance(first, list) and isinstance(second, list)
    return judge(Interval.of_ratios([t.cold for t in second], [t.cold for t in first]))


def one_after_the_other(seed: int, slower: float) -> str:
    """The same verdict from two medians that were not taken in turn, each with its interval."""
    machine = Machine(seed)
    first = [machine.time(1.0) for _ in range(ROUNDS_MADE)]
    second = [machine.time(1 + slower) for _ in range(ROUNDS_MADE)]
    return judge(Interval.of(second) / Interval.of(first))


def verdicts(how: Callable[[int, float], str], slower: float) -> Counter[str]:
    return Counter(how(seed, slower) for seed in range(RUNS))


def test_ten_percent_are_found_and_nothing_is_not(in_turn: Callable[[int, float], str]) -> None:
    ten = verdicts(in_turn, 0.10)
    assert ten["slower"] >= 0.95 * RUNS and ten["same"] <= 0.01 * RUNS and ten["faster"] == 0, ten
    assert verdicts(in_turn, 1 / 1.1 - 1)["faster"] >= 0.95 * RUNS
    nothing = verdicts(in_turn, 0.0)
    assert nothing["slower"] + nothing["faster"] <= 0.05 * RUNS


def test_without_turns_the_same_noise_is_taken_for_a_difference() -> None:
    nothing = verdicts(one_after_the_other, 0.0)
    assert nothing["slower"] + nothing["faster"] > 0.10 * RUNS
    assert verdicts(one_after_the_other, 0.10)["slower"] < 0.90 * RUNS


def test_intervals_hold_the_median_as_often_as_they_say() -> None:
    # Lognormal: skewed, and its median is 1. 99 % of 2,000 are 1,980, with a deviation of 4.5; an interval from order
    # statistics holds it a little more often. Of intervals for another number it must not be so.
    draw = random.Random(0)
    for n in (FEWEST, 21, 100):
        found = [Interval.of([draw.lognormvariate(0, 1) for _ in range(n)]) for _ in range(2000)]
        assert sum(i.low <= 1 <= i.high for i in found) >= 1966, n
        assert sum(i.low <= 4 <= i.high for i in found) < 1966, n


def test_too_few_times_are_refused() -> None:
    with pytest.raises(ValueError, match=f"values: got {FEWEST - 1}, expected at least {FEWEST}"):
        Interval.of([1.0] * (FEWEST - 1))


def test_verdicts_have_the_allowance_between_them() -> None:
    assert judge(Interval(1.03, 1.04, 1.05)) == "slower"
    assert judge(Interval(1.03, 1.04, 1.05), allowance=0.05) == "same"
    assert judge(Interval(0.95, 0.96, 0.97)) == "faster"
    assert judge(Interval(0.90, 1.00, 1.10)) == "unclear"
    assert judge(Interval(1.00, 2.00, 3.00)) == "unclear"
    # What leaves 10 % open is not called the same, however narrow it is.
    assert judge(Interval(1.01, 1.07, 1.105)) == "unclear"
    assert judge(Interval(1.01, 1.07, 1.095)) == "same"
    assert judge(Interval(0.905, 0.95, 1.0)) == "unclear"
    assert judge(Interval(1.01, 1.07, 1.105), allowance=0.2) == "same"


# ---- between runs --------------------------------------------------------------------------------


def run_of(
    seed: int, slower: float = 0.0, speed: float = 1.0, step: float = 1.0, cpu: str = "this"
) -> Report:
    """A report of one row on a machine slower by ``speed`` in all, and by ``step`` in the step alone."""
    machine = Machine(seed)
    made = []
    for _ in range(101):
        copy = machine.time(speed)
        made.append(Turn(copy, copy, machine.time(speed * step * (1 + slower)), None))
    row = Row("mine:AdamW", "1e7", 1, 10**7, step_bytes=280_000_000).timed(made, made, 10**8)
    return Report({"cpu": cpu}, "cpu", "float32", [], 10**8, [row])


def found(old: Report, new: Report) -> str:
    return compare(old, new, allowance=0.05).changes[0].verdict.partition(":")[0]


def test_a_regression_between_runs_is_found_and_another_speed_of_the_machine_is_not() -> None:
    of = {name: Counter[str]() for name in ("nothing", "speed", "slower", "elsewhere", "quiet")}
    for seed in range(100):
        old, again = run_of(seed), 1000 + seed
        of["nothing"][found(old, run_of(again))] += 1
        of["speed"][found(old, run_of(again, speed=1.5))] += 1
        of["slower"][found(old, run_of(again, slower=0.1, speed=1.5))] += 1
        of["elsewhere"][found(old, run_of(again, slower=0.1, speed=0.5, cpu="another"))] += 1
        # Other work slowed the old run's copies by 2.3 and its steps by 1.6: it holds up unlike work unlike.
        of["quiet"][found(run_of(again, speed=2.3, step=0.7), old)] += 1
    assert of["slower"]["FAIL"] >= 95 and of["elsewhere"]["FAIL"] >= 95, of
    for same in ("nothing", "speed", "quiet"):
        assert of[same]["FAIL"] <= 5, of
    assert of["nothing"]["PASS"] >= 95, of


# ---- with real work ------------------------------------------------------------------------------


def spin(work: int) -> Callable[[], object]:
    return lambda: sum(range(work))


def real(slower: float) -> str:
    calls = [spin(20_000), spin(round(20_000 * (1 + slower)))]
    return of_turns(*take_turns(calls, spin(1000), None, seconds=0.1, device=CPU))


@pytest.mark.parametrize(("slower", "expected"), [(0.1, "slower"), (0.0, "same")])
def test_ten_percent_of_real_work_are_found_and_nothing_is_not(
    slower: float, expected: str
) -> None:
    # Of 200 runs on two processors with twice as much to do as they can, 157 found the 10 % and 146 found nothing where
    # there was none; all others said "unclear", which is no error. Neighbours on a real machine may mislead one run.
    said = Counter(real(slower) for _ in range(10))
    assert said[expected] >= 1 and said[expected] + said["unclear"] >= 9, said
