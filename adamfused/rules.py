"""Every update rule in torch operations, simplest first: the oracle. The twin of ``csrc/rules.h``, line by line.

A rule may use ``+ - * /``, :func:`root`, comparisons and :func:`torch.where`, each correctly rounded. Never
``lerp_``, ``addcmul_``, ``addcdiv_`` or ``add(alpha=)``: those may fuse a multiplication with an addition.
Numbers that are the same for all elements are Python floats, made once per step in double by ``prepare`` and
rounded once to the arithmetic's type by the rounding function that ``prepare`` is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

Round = Callable[[float], float]


def round_to(dtype: torch.dtype) -> Round:
    """The function that rounds a Python float to ``dtype`` (float32 or float64), overflow going to infinity."""
    if dtype == torch.float64:
        return float

    def to_float32(x: float) -> float:
        with np.errstate(over="ignore"):
            return float(np.float32(x))

    return to_float32


def root(x: Tensor) -> Tensor:
    """The correctly rounded square root, the root of a negative being NaN.

    ``torch.sqrt`` on a CPU is not correctly rounded; numpy's is the processor's instruction. On other devices a
    float32 goes through double, whose root rounds to the right float32.
    """
    if x.device.type == "cpu":
        result = torch.empty_like(x)
        with np.errstate(invalid="ignore"):
            np.sqrt(x.numpy(), out=result.numpy())
        return result
    return x.double().sqrt().float() if x.dtype == torch.float32 else x.sqrt()


def power(x: float, n: int) -> float:
    """``x ** n`` by squaring: libraries' pow differ in the last bit."""
    result = 1.0
    while n > 0:
        if n & 1:
            result = result * x
        x = x * x
        n >>= 1
    return result


def divide(a: float, b: float) -> float:
    """IEEE division: by zero it gives infinity or NaN where Python raises."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return float(np.float64(a) / np.float64(b))


class Now(NamedTuple):
    """What a step knows besides a rule's own numbers.

    ``t`` counts the parameter's own steps, this one too; ``factor`` is what unscaling and clipping multiply the
    gradient by; ``ema_decay`` is that of the average of the weights; ``carried`` is the number that some rules carry
    from step to step (see :data:`CARRIED`).
    """

    lr: float
    t: float
    factor: float = 1.0
    ema_decay: float = 0.0
    carried: float = 1.0


class Weight(NamedTuple):
    """The weight of the new value in a running average with decay rate ``beta``.

    Rounding ``1 - beta`` keeps the small number exact to 2^-24 of itself; rounding ``beta``, as
    ``beta * a + (1 - beta) * b`` does, is what drifts. Below one half ``beta`` is the small number, so the average
    is told from its far end; ``beta = 0`` is then exactly the new value.
    """

    c: float
    far: bool


def weight(beta: float, r: Round) -> Weight:
    return Weight(r(-beta), True) if beta < 0.5 else Weight(r(1.0 - beta), False)


def average(a: Tensor, b: Tensor, w: Weight) -> Tensor:
    d = b - a
    return (b if w.far else a) + w.c * d


def decayed_sum(a: Tensor, b: Tensor, w: Weight) -> Tensor:
    """``beta * a + b``, with the same care for ``beta``."""
    return ((0.0 if w.far else a) - w.c * a) + b


def gradient_factor(now: Now, maximize: float, r: Round) -> float:
    """What the gradient is multiplied by: unscaled, clipped and, to climb, turned round in one."""
    return r(-now.factor if maximize else now.factor)


def directed(p: Tensor, g: Tensor, factor: float, l2: float) -> Tensor:
    """The gradient as the rule sees it, with coupled (L2) decay.

    A decay of 0 is skipped, not multiplied: 0 * inf is NaN.
    """
    g = factor * g
    return g + l2 * p if l2 != 0 else g


def larger(a: Tensor, b: Tensor) -> Tensor:
    """The larger of two; a NaN in either stays."""
    return torch.where((b > a) | (b != b), b, a)


def sign(x: Tensor) -> Tensor:
    """1, -1, or what is neither above nor below zero: a zero, or a NaN, which stays."""
    one = torch.ones_like(x)
    return torch.where(x > 0, one, torch.where(x < 0, -one, x))


class SGD:
    """Stochastic gradient descent: Robbins & Monro 1951, as torch.optim has it."""

    states: ClassVar[int] = 0

    def __init__(self, hyper: Sequence[float], now: Now, r: Round) -> None:
        weight_decay, momentum, dampening, nesterov, maximize = hyper
        first = now.t == 1
        self.factor = gradient_factor(now, maximize, r)
        self.l2 = r(weight_decay)
        self.lr = r(now.lr)
        self.mu, self.ahead = weight(0.0 if first else momentum, r), weight(momentum, r)
        self.taken = r(1.0 if first else 1.0 - dampening)
        self.nesterov = bool(nesterov)

    def __call__(self, p: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return (p - self.lr * directed(p, g, self.factor, self.l2),)


class SGDMomentum(SGD):
    """With momentum (Polyak 1964), or Nesterov's (Sutskever et al. 2013). The first gradient is the first sum, not
    dampened."""

    states = 1

    def __call__(self, p: Tensor, g: Tensor, buf: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        g = directed(p, g, self.factor, self.l2)
        buf = decayed_sum(buf, self.taken * g, self.mu)
        p = p - self.lr * (decayed_sum(buf, g, self.ahead) if self.nesterov else buf)
        return p, buf


class Adagrad:
    """Adagrad: Duchi, Hazan & Singer 2011, with a learning rate that may decay as in torch.optim."""

    states: ClassVar[int] = 1

    def __init__(self, hyper: Sequence[float], now: Now, r: Round) -> None:
        lr_decay, eps, weight_decay, maximize = hyper
        self.factor = gradient_factor(now, maximize, r)
        self.l2 = r(weight_decay)
        self.lr = r(divide(now.lr, 1.0 + (now.t - 1.0) * lr_decay))
        self.eps = r(eps)

    def __call__(self, p: Tensor, g: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        g = directed(p, g, self.factor, self.l2)
        total = total + g * g
        p = p - self.lr * (g / (root(total) + self.eps))
        return p, total


class RMSprop:
    """RMSprop: Tieleman & Hinton 2012, lecture 6.5; epsilon outside the root as in torch.optim."""

    states: ClassVar[int] = 1

    def __init__(self, hyper: Sequence[float], now: Now, r: Round) -> None:
        alpha, eps, weight_decay, momentum, maximize = hyper
        self.w, self.mu = weight(alpha, r), weight(momentum, r)
        self.factor = gradient_factor(now, maximize, r)
        self.l2 = r(weight_decay)
        self.lr = r(now.lr)
        self.eps = r(eps)

    def __call__(self, p: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        g = directed(p, g, self.factor, self.l2)
        v = average(v, g * g, self.w)
        p = p - self.lr * (g / (root(v) + self.eps))
        return p, v


class RMSpropMomentum(RMSprop):
    states = 2

    def __call__(self, p: Tensor, g: Tensor, v: Tensor, buf: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        g = directed(p, g, self.factor, self.l2)
        v = average(v, g * g, self.w)
        buf = decayed_sum(buf, g / (root(v) + self.eps), self.mu)
        p = p - self.lr * buf
        return p, v, buf


def spread(v: Tensor, mean: Tensor) -> Tensor:
    """``v - mean^2``, which is never negative, but rounded it may be, and the root of that would be NaN."""
    d = v - mean * mean
    return torch.where(d < 0, torch.zeros_like(d), d)


class RMSpropCentered(RMSprop):
    """Centered (Graves 2013, arXiv:1308.0850, eq. 38-41): divide by the spread of g instead of its size."""

    states = 2

    def __call__(self, p: Tensor, g: Tensor, v: Tensor, mean: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        g = directed(p, g, self.factor, self.l2)
        v = average(v, g * g, self.w)
        mean = average(mean, g, self.w)
        p = p - self.lr * (g / (root(spread(v, mean)) + self.eps))
        return p, v, mean


class RMSpropCenteredMomentum(RMSprop):
    states = 3

    def __call__(  # type: ignore[override]
        self, p: Tensor, g: Tensor, v: Tensor, buf: Tensor, mean: Tensor
    ) -> tuple[Tensor, ...]:
        g = directed(p, g, self.factor, self.l2)
        v = average(v, g * g, self.w)
        mean = average(mean, g, self.w)
        buf = decayed_sum(buf, g / (root(spread(v, mean)) + self.eps), self.mu)
        p = p - self.lr * buf
        return p, v, buf, mean


class Adadelta:
    """Adadelta: Zeiler 2012 (arXiv:1212.5701), Algorithm 1, with a learning rate as in torch.optim."""

    states: ClassVar[int] = 2

    def __init__(self, hyper: Sequence[float], now: Now, r: Round) -> None:
        rho, eps, weight_decay, maximize = hyper
        self.w = weight(rho, r)
        self.factor = gradient_factor(now, maximize, r)
        self.l2 = r(weight_decay)
        self.lr = r(now.lr)
        self.eps = r(eps)

    def __call__(self, p: Tensor, g: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        g = directed(p, g, self.factor, self.l2)
        v = average(v, g * g, self.w)
        d = root(u + self.eps) / root(v + self.eps) * g
        u = average(u, d * d, self.w)
        p = p - self.lr * d
        return p, v, u


class Lion:
    """Lion: Chen et al. 2023 (arXiv:2302.06675), Algorithm 2. Decay and update are added and rounded together."""

    states: ClassVar[int] = 1

    def __init__(self, hyper: Sequence[float], now: Now, r: Round) -> None:
        beta1, beta2, weight_decay, maximize = hyper
        self.w1, self.w2 = weight(beta1, r), weight(beta2, r)
        self.factor = gradient_factor(now, maximize, r)
        self.decay = r(now.lr * weight_decay)
        self.lr = r(now.lr)

    def __call__(self, p: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        g = self.factor * g
        move = self.lr * sign(average(m, g, self.w1))
        p = p - (self.decay * p + move if self.decay != 0 else move)
        m = average(m, g, self.w2)
        return p, m


class Moments:
    """What Adam and its kin share: averages of the gradient and of its square, and that decay and update are added and
    rounded together. Decay is coupled (``l2``, Adam) or decoupled (``decay``, AdamW: Loshchilov & Hutter 2019,
    arXiv:1711.05101, Algorithm 2)."""

    states: ClassVar[int] = 2

    def __init__(self, hyper: Sequence[float], now: Now, r: Round) -> None:
        beta1, beta2, eps, weight_decay, decoupled, maximize = hyper
        self.w1, self.w2 = weight(beta1, r), weight(beta2, r)
        self.factor = gradient_factor(now, maximize, r)
        self.l2 = r(0.0 if decoupled else weight_decay)
        self.decay = r(now.lr * weight_decay if decoupled else 0.0)
        self.eps = r(eps)

    def seen(self, p: Tensor, g: Tensor) -> Tensor:
        """The gradient as the rule sees it."""
        return directed(p, g, self.factor, self.l2)

    def gather(self, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return average(m, g, self.w1), average(v, g * g, self.w2)

    def moved(self, p: Tensor, move: Tensor) -> Tensor:
        return p - (self.decay * p + move if self.decay != 0 else move)

    update: Callable[..., Tensor]

    def __call__(self, p: Tensor, g: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        g = self.seen(p, g)
        states = self.gather(g, *states)
        return self.moved(p, self.update(g, *states)), *states


class Adam(Moments):
    """Adam: Kingma & Ba 2015 (arXiv:1412.6980), Algorithm 1."""

    def __init__(self, hyper: Sequence[float], now: Now, r: Round) -> None:
        *shared, bias_correction = hyper
        super().__init__(shared, now, r)
        c1 = 1.0 - power(hyper[0], int(now.t)) if bias_correction else 1.0
        c2 = 1.0 - power(hyper[1], int(now.t)) if bias_correction else 1.0
        self.step_size = r(divide(now.lr, c1))
        self.inv_root_c2 = r(divide(1.0, math.sqrt(c2)))

    def update(self, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return self.step_size * (m / (root(v) * self.inv_root_c2 + self.eps))


class AmsGrad(Adam):
    """AMSGrad: Reddi, Kale & Kumar 2018 (arXiv:1904.09237), as torch.optim has it: the largest uncorrected v."""

    states = 3

    def gather(  # type: ignore[override]
        self, g: Tensor, m: Tensor, v: Tensor, top: Tensor
    ) -> tuple[Tensor, ...]:
        m, v = super().gather(g, m, v)
        return m, v, larger(top, v)

    def update(  # type: ignore[override]
        self, g: Tensor, m: Tensor, v: Tensor, top: Tensor
    ) -> Tensor:
        return super().update(g, m, top)


class NAdam(Moments):
    """NAdam: Dozat 2016 (ICLR workshop), Algorithm 2, with the decay of the momentum that torch.optim has."""

    def __init__(self, hyper: Sequence[float], now: Now, r: Round) -> None:
        *shared, q = hyper
        super().__init__(shared, now, r)
        mu, mu_next = nadam_mu(hyper[0], q, now.t), nadam_mu(hyper[0], q, now.t + 1.0)
        c2 = 1.0 - power(hyper[1], int(now.t))
        self.of_g = r(divide(now.lr * (1.0 - mu), 1.0 - now.carried))
        self.of_m = r(divide(now.lr * mu_next, 1.0 - now.carried * mu_next))
        self.inv_root_c2 = r(divide(1.0, math.sqrt(c2)))

    def update(self, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return (self.of_g * g + self.of_m * m) / (root(v) * self.inv_root_c2 + self.eps)


def nadam_mu(beta1: float, q: float, t: float) -> float:
    """``q`` is 0.96 to the power of the decay."""
    return beta1 * (1.0 - 0.5 * power(q, int(t)))


def nadam_product(hyper: Sequence[float], t: float, before: float) -> float:
    """The product of all mu so far."""
    return before * nadam_mu(hyper[0], hyper[6], t)


class RAdam(Moments):
    """RAdam: Liu et al. 2020 (arXiv:1908.03265), Algorithm 2, with epsilon beside the uncorrected root as in
    torch.optim."""

    def __init__(self, hyper: Sequence[float], now: Now, r: Round) -> None:
        super().__init__(hyper, now, r)
        power2 = power(hyper[1], int(now.t))
        c2 = 1.0 - power2
        most = divide(2.0, 1.0 - hyper[1]) - 1.0
        length = most - divide(2.0 * now.t * power2, c2)
        self.rectified = length > 5.0  # there are steps enough to tell the variance
        size = divide(now.lr, 1.0 - power(hyper[0], int(now.t)))
        if self.rectified:
            above = (length - 4.0) * (length - 2.0) * most
            below = (most - 4.0) * (most - 2.0) * length
            size = size * math.sqrt(divide(above, below)) * math.sqrt(c2)
        self.step_size = r(size)

    def update(self, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return self.step_size * (m / (root(v) + self.eps) if self.rectified else m)


class Averaged:
    """A rule that also keeps an average of the weights, told of the new ones before they are rounded to the parameter's
    format. Its first value is the first new weight, as in ``torch.optim.swa_utils.AveragedModel``, be that infinite."""

    def __init__(self, rule: str, hyper: Sequence[float], now: Now, r: Round) -> None:
        self.rule = RULES[rule](hyper, now, r)
        self.ema = weight(0.0 if now.t == 1 else now.ema_decay, r)

    def __call__(self, p: Tensor, g: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        *states_before, e = states
        p, *states_after = self.rule(p, g, *states_before)
        return p, *states_after, self.averaged(e, p)

    def averaged(self, e: Tensor, p: Tensor) -> Tensor:
        """Decays of 0 and 1 are exact, also where 0 * inf would be NaN."""
        if self.ema.c != 0:
            return average(e, p, self.ema)
        return p if self.ema.far else e


RULES: dict[str, Callable[..., Any]] = {
    "sgd": SGD,
    "sgd_momentum": SGDMomentum,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "rmsprop_momentum": RMSpropMomentum,
    "rmsprop_centered": RMSpropCentered,
    "rmsprop_centered_momentum": RMSpropCenteredMomentum,
    "adadelta": Adadelta,
    "lion": Lion,
    "adam": Adam,
    "amsgrad": AmsGrad,
    "nadam": NAdam,
    "radam": RAdam,
}
"""Every rule by its name; the names and their order are those of ``ADAMFUSED_RULES`` in ``csrc/rules.h``."""

CARRIED: dict[str, Callable[[Sequence[float], float, float], float]] = {"nadam": nadam_product}
"""Some rules carry a number from step to step that is the same for all elements and cannot be told from the count. It
begins with 1 and lies beside the count; called with the rule's numbers, ``t`` and the one before, this is what it is
in step ``t``."""
