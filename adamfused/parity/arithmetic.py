"""Two arithmetics that the rules are written for: float64 itself, and float64 beside what rounding makes of it.

A rule of :mod:`adamfused.parity.exact` is one function of numbers. With :class:`Exact` they are float64 arrays, and it
gives the step. With a :class:`Rounding` they are :class:`Rounded`, and it also gives how far a step may be off that
was made in float32 (running error analysis: Higham, Accuracy and Stability of Numerical Algorithms, section 3.3).

The bounds hold for every usual way to write a rule in an arithmetic that rounds each operation once and takes its
coefficients from double precision: ``b a + (1-b) x`` as well as ``a + (1-b)(x-a)``, decay before or together with the
update, products in any order, fused multiply-add or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Precision:
    """How numbers are rounded: ``u`` is the largest relative error of one rounding, ``tiny`` the smallest number."""

    u: float
    tiny: float
    largest: float

    def ulp(self, x: Array) -> Array:
        """The spacing of its numbers at ``x``."""
        exponent = np.frexp(np.minimum(np.abs(x), self.largest))[1].astype(np.float64)
        return np.maximum(np.exp2(exponent) * self.u, self.tiny)


SINGLE = Precision(2.0**-24, 2.0**-149, float(np.finfo(np.float32).max))
DOUBLE = Precision(2.0**-53, 2.0**-1074, float(np.finfo(np.float64).max))


def precision(dtype: torch.dtype) -> Precision:
    """The arithmetic that parameters of a dtype are moved in: 16-bit ones in float32."""
    return DOUBLE if dtype.to_real() == torch.float64 else SINGLE


class Exact:
    """float64 itself: numbers are arrays."""

    def coefficient(self, c: float, error: float = 0.0) -> Any:
        """A number that is the same for all elements, computed in double precision with a relative ``error``."""
        return c

    def mean(self, a: Any, x: Any, beta: float) -> Any:
        """``beta a + (1 - beta) x``."""
        return beta * a + (1 - beta) * x

    def mean_square(self, v: Any, g: Any, beta: float) -> Any:
        """``beta v + (1 - beta) g^2``."""
        return beta * v + (1 - beta) * g * g

    def decayed(self, a: Any, mu: float) -> Any:
        """``mu a``."""
        return mu * a

    def root(self, x: Any) -> Any:
        """The square root."""
        return np.sqrt(x)

    def positive(self, x: Any) -> Any:
        """``x``, or 0 where it is below."""
        return np.maximum(x, 0)

    def larger(self, a: Any, b: Any) -> Any:
        """The larger of two."""
        return np.maximum(a, b)

    def sign(self, x: Any) -> Any:
        """1, -1 or 0."""
        return np.sign(x)

    def step(self, p: Any, *moves: Any, decay: float = 0.0) -> Any:
        """``p - decay p - moves``, each of which may be taken by itself."""
        return (p - decay * p if decay else p) - sum(moves)


class Rounded:
    """An exact number, or an array of them, and the largest error that rounding may have made of it."""

    def __init__(self, x: Any, error: Any, to: Precision) -> None:
        self.x, self.error, self.to = x, error, to

    def once(self, x: Any, error: Any) -> Rounded:
        """What is within ``error`` of x, after one rounding."""
        return Rounded(x, error + self.to.u * (np.abs(x) + error) + self.to.tiny, self.to)

    def __add__(self, other: Rounded) -> Rounded:
        return self.once(self.x + other.x, self.error + other.error)

    def __sub__(self, other: Rounded) -> Rounded:
        return self.once(self.x - other.x, self.error + other.error)

    def __mul__(self, other: Rounded) -> Rounded:
        mixed = np.abs(self.x) * other.error + np.abs(other.x) * self.error
        return self.once(self.x * other.x, mixed + self.error * other.error)

    def __truediv__(self, other: Rounded) -> Rounded:
        quotient, least = self.x / other.x, np.abs(other.x) - other.error
        error = (self.error + np.abs(quotient) * other.error) / least
        return self.once(quotient, np.where(least > 0, error, np.inf))


class Rounding:
    """float64 with what rounding to a precision makes of it: numbers are :class:`Rounded`."""

    def __init__(self, to: Precision) -> None:
        self.to = to

    def number(self, x: Array) -> Rounded:
        """An array as a number, without an error."""
        return Rounded(x, 0.0, self.to)

    def coefficient(self, c: float, error: float = 0.0) -> Rounded:
        """Rounded once."""
        return Rounded(c, abs(c) * (error + self.to.u) + self.to.tiny, self.to)

    def mean(self, a: Rounded, x: Rounded, beta: float) -> Rounded:
        """Rounds beta, 1 - beta, two products (or a difference and a product) and a sum."""
        exact = beta * a.x + (1 - beta) * x.x
        went_in = max(beta, 1 - beta) * np.abs(a.x) + (1 - beta) * np.abs(x.x)
        error = beta * a.error + (1 - beta) * x.error
        own = self.to.u * (np.abs(exact) + 3 * went_in) + self.to.tiny
        return Rounded(exact, error + np.where(went_in == 0, 0.0, own), self.to)

    def mean_square(self, v: Rounded, g: Rounded, beta: float) -> Rounded:
        """Rounds the square, too; nothing cancels."""
        exact = beta * v.x + (1 - beta) * g.x * g.x
        error = beta * v.error + (1 - beta) * (2 * np.abs(g.x) + g.error) * g.error
        return Rounded(exact, error + 5 * self.to.u * exact + 3 * self.to.tiny, self.to)

    def decayed(self, a: Rounded, mu: float) -> Rounded:
        """Rounds mu and the product, or 1 - mu, its product and a difference."""
        exact = mu * a.x
        own = 3 * self.to.u * np.abs(exact) + self.to.tiny
        return Rounded(exact, mu * a.error + own, self.to)

    def root(self, x: Rounded) -> Rounded:
        """Rounded once."""
        root, below = np.sqrt(x.x), np.sqrt(np.maximum(x.x - x.error, 0))
        return x.once(root, root - below)  # the larger side

    def positive(self, x: Rounded) -> Rounded:
        """Nothing is rounded."""
        return Rounded(np.maximum(x.x, 0), x.error, self.to)

    def larger(self, a: Rounded, b: Rounded) -> Rounded:
        """Nothing is rounded."""
        return Rounded(np.maximum(a.x, b.x), np.maximum(a.error, b.error), self.to)

    def sign(self, x: Rounded) -> Rounded:
        """In doubt where there is an error as large as the number."""
        doubt = (np.abs(x.x) <= x.error) & (x.error > 0)
        return Rounded(np.sign(x.x), 2.0 * doubt, self.to)

    def step(self, p: Rounded, *moves: Rounded, decay: float = 0.0) -> Rounded:
        """A move in up to three more roundings of itself, and each rounds the parameter; so does decay, whose
        coefficient and product are of the size of the parameter."""
        after = (p.x - decay * p.x if decay else p.x) - sum(move.x for move in moves)
        way = sum(np.abs(move.x) for move in moves)
        largest = np.maximum(np.abs(p.x), np.abs(after))
        if len(moves) > 1:  # on the way between
            largest = np.maximum(largest, np.abs(p.x) + way)
        halves = len(moves) + (2 if decay else 0)
        own = 3 * self.to.u * way + 0.5 * halves * self.to.ulp(largest)
        return Rounded(after, p.error + sum(move.error for move in moves) + own, self.to)


def spacing16(x: Array, dtype: torch.dtype) -> Array:
    """The distance to the next number of float16 or bfloat16 at ``x``."""
    digits, lowest = (11, -13) if dtype == torch.float16 else (8, -125)
    return np.exp2((np.maximum(np.frexp(x)[1], lowest) - digits).astype(np.float64))


def spacing(x: Array, dtype: torch.dtype) -> Array:
    """The distance to the next number at ``x`` of the dtype that a parameter rests in."""
    if dtype in (torch.float16, torch.bfloat16):
        return spacing16(x, dtype)
    return precision(dtype).ulp(x)


def nearest16(x: Array, dtype: torch.dtype) -> Array:
    """``x`` rounded once, to nearest even, to float16 or bfloat16; too large numbers become infinite."""
    spacing = spacing16(x, dtype)
    rounded = np.rint(x / spacing) * spacing
    return np.where(np.abs(rounded) > torch.finfo(dtype).max, np.copysign(np.inf, x), rounded)
