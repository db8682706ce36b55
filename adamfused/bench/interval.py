"""What a list of timings says: medians with intervals, and whether one thing is slower than another.

All of it is arithmetic on given numbers; nothing here reads a clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import median

CONFIDENCE = 0.99
"""Of every interval. A sweep shows dozens: at 95 % one in twenty would cry wolf."""

FEWEST = 8
"""The values that a median needs for an interval of that confidence: 2 * 2**-8 is the first below 1 %."""

NOTABLE = 1.1
"""A ratio that two things which are called the same must not have: their interval excludes it."""

ALLOWANCE = 0.02
"""What differs by less is called the same: where the states of an optimizer lie in memory moves its step by as much."""


@dataclass(frozen=True)
class Interval:
    """A median, and between what the true one lies with :data:`CONFIDENCE`."""

    low: float
    mid: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The median of ``values`` and its interval from order statistics, whatever their distribution.

        How many of n values lie below the true median is binomial with 1/2. So the k-th smallest and the k-th
        largest enclose it, but for twice the chance of fewer than k below.

        Raises:
            ValueError: if there are fewer than :data:`FEWEST` values.

        Example:
            >>> Interval.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 80.0])
            Interval(low=1.0, mid=4.5, high=80.0)
        """
        n = len(values)
        allowed = Fraction(1 - CONFIDENCE) / 2 * 2**n
        k = below = 0
        while (below := below + math.comb(n, k)) <= allowed:
            k += 1
        if k == 0:
            raise ValueError(
                f"values: got {n}, expected at least {FEWEST} to say where their median lies"
            )
        ordered = sorted(values)
        return cls(ordered[k - 1], median(ordered), ordered[n - k])

    @classmethod
    def of_ratios(cls, over: Sequence[float], under: Sequence[float]) -> Interval:
        """The median of ``over[i] / under[i]``, two times taken in the same round.

        A machine that drifts moves both times of a round alike, and not their ratio. Without the pairing it moves
        the medians, and no interval made of each alone knows of that.
        """
        return cls.of([a / b for a, b in zip(over, under, strict=True)])

    def __mul__(self, factor: float) -> Interval:
        """Scaled by a number above 0."""
        return Interval(self.low * factor, self.mid * factor, self.high * factor)

    def __truediv__(self, other: Interval) -> Interval:
        """The quotient of two numbers known from different runs: as low and as high as the two allow."""
        return Interval(self.low / other.high, self.mid / other.mid, self.high / other.low)


def judge(ratio: Interval, allowance: float = ALLOWANCE) -> str:
    """What a ratio of times, candidate over standard, says of the candidate.

    Args:
        ratio: with its interval.
        allowance: how much slower, or faster, counts as the same; 0.05 is 5 %.

    Returns:
        ``"slower"`` or ``"faster"`` if the whole interval lies beyond the allowance, ``"same"`` if it excludes a
        difference of 10 % (or of the allowance, where that is more) either way, else ``"unclear"``.
    """
    if ratio.low > 1 + allowance:
        return "slower"
    if ratio.high * (1 + allowance) < 1:
        return "faster"
    notable = max(NOTABLE, 1 + allowance)
    return "same" if 1 / notable < ratio.low and ratio.high < notable else "unclear"
