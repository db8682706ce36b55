"""The rules of every family in float64, and what rounding can do to one step of them.

Written from the papers, apart from :mod:`adamfused.rules` and on purpose without a look at it: what the package claims
of itself is measured against this. All arrays are float64 of shape [n].

To add a family: its function of an arithmetic's numbers, a line in ``FAMILIES``, its name in :mod:`adamfused.spec`,
and its hyper-parameters in :class:`Hyper`, if they are new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..spec import Spec
from .arithmetic import Array, Exact, Precision, Rounding

Parts = dict[str, Array]
"""The parameter as ``"param"`` and its states by torch's names."""

Numbers = dict[str, Any]
"""The same as numbers of an arithmetic."""


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters by torch's names. A family looks at those that its torch.optim class has."""

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False
    alpha: float = 0.99
    rho: float = 0.9
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    centered: bool = False
    lr_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False

    def arguments(self, family: str, spec: Spec) -> dict[str, Any]:
        """Those of the family that an optimizer takes, as its keyword arguments."""
        return {name: getattr(self, name) for name in FAMILIES[family].fields if spec.takes(name)}


# ---- the rules -----------------------------------------------------------------------------------
# `k` is an arithmetic, `g` the gradient as it is to be descended, without decay.


def _l2(h: Hyper) -> float:
    """How much of the parameter is added to the gradient."""
    return 0.0 if h.decoupled_weight_decay else h.weight_decay


def _decay(h: Hyper) -> float:
    """How much of the parameter is taken away beside the move."""
    return h.lr * h.weight_decay if h.decoupled_weight_decay else 0.0


def _with_l2(k: Any, g: Any, p: Any, l2: float) -> Any:
    return g + k.coefficient(l2) * p if l2 else g


def _power_error(t: int, *betas: float) -> float:
    """A power b^t has up to t roundings in double, which 1 - b^t magnifies."""
    return sum(2.0**-53 * (2 + t * b**t / (1 - b**t)) for b in betas)


def _moments(k: Any, h: Hyper, parts: Numbers) -> tuple[Any, Any]:
    g = _with_l2(k, parts["grad"], parts["param"], _l2(h))
    m, v, (beta1, beta2) = parts["exp_avg"], parts["exp_avg_sq"], h.betas
    return k.mean(m, g, beta1), k.mean_square(v, g, beta2)


def sgd(k: Any, h: Hyper, t: int, parts: Numbers) -> Numbers:
    """Polyak 1964; Sutskever et al. 2013, eq. 3-4, as torch.optim writes them: the first sum is the first gradient."""
    p, buf = parts["param"], parts["momentum_buffer"]
    g = move = _with_l2(k, parts["grad"], p, h.weight_decay)
    if h.momentum:
        taken = k.coefficient(1 - h.dampening) * g if h.dampening else g
        buf = g if t == 1 else k.decayed(buf, h.momentum) + taken
        move = g + k.decayed(buf, h.momentum) if h.nesterov else buf
    return {"param": k.step(p, k.coefficient(h.lr) * move), "momentum_buffer": buf}


def adagrad(k: Any, h: Hyper, t: int, parts: Numbers) -> Numbers:
    """Duchi, Hazan & Singer 2011, figure 1 (diagonal)."""
    p = parts["param"]
    g = _with_l2(k, parts["grad"], p, h.weight_decay)
    total = parts["sum"] + g * g
    lr = k.coefficient(h.lr / (1 + (t - 1) * h.lr_decay))
    move = lr * (g / (k.root(total) + k.coefficient(h.eps)))
    return {"param": k.step(p, move), "sum": total}


def adadelta(k: Any, h: Hyper, t: int, parts: Numbers) -> Numbers:
    """Zeiler 2012 (arXiv:1212.5701), Algorithm 1, with torch.optim's lr."""
    p, eps = parts["param"], k.coefficient(h.eps)
    g = _with_l2(k, parts["grad"], p, h.weight_decay)
    v = k.mean_square(parts["square_avg"], g, h.rho)
    delta = k.root(parts["acc_delta"] + eps) / k.root(v + eps) * g
    u = k.mean_square(parts["acc_delta"], delta, h.rho)
    p = k.step(p, k.coefficient(h.lr) * delta)
    return {"param": p, "square_avg": v, "acc_delta": u}


def rmsprop(k: Any, h: Hyper, t: int, parts: Numbers) -> Numbers:
    """Tieleman & Hinton 2012, lecture 6.5; centered: Graves 2013 (arXiv:1308.0850), eq. 38-41."""
    p, buf, mean = parts["param"], parts["momentum_buffer"], parts["grad_avg"]
    g = _with_l2(k, parts["grad"], p, h.weight_decay)
    v = spread = k.mean_square(parts["square_avg"], g, h.alpha)
    if h.centered:
        mean = k.mean(mean, g, h.alpha)
        spread = k.positive(v - mean * mean)
    move = g / (k.root(spread) + k.coefficient(h.eps))
    if h.momentum:
        move = buf = k.decayed(buf, h.momentum) + move
    p = k.step(p, k.coefficient(h.lr) * move)
    return {"param": p, "square_avg": v, "momentum_buffer": buf, "grad_avg": mean}


def adam(k: Any, h: Hyper, t: int, parts: Numbers) -> Numbers:
    """Kingma & Ba 2015 (arXiv:1412.6980), Algorithm 1; decoupled: Loshchilov & Hutter 2019 (arXiv:1711.05101),
    Algorithm 2; AMSGrad: Reddi et al. 2018 (arXiv:1904.09237) with the maximum of the uncorrected averages, as torch.
    """
    m, v = _moments(k, h, parts)
    top, (beta1, beta2) = parts["max_exp_avg_sq"], h.betas
    top = k.larger(top, v) if h.amsgrad else top
    by, error = top if h.amsgrad else v, _power_error(t, beta1, beta2)
    root = k.root(by / k.coefficient(1 - beta2**t)) + k.coefficient(h.eps)
    move = k.coefficient(h.lr / (1 - beta1**t), error) * (m / root)
    p = k.step(parts["param"], move, decay=_decay(h))
    return {"param": p, "exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": top}


def adamw(k: Any, h: Hyper, t: int, parts: Numbers) -> Numbers:
    """:func:`adam` with decoupled decay."""
    return adam(k, Hyper(**vars(h) | {"decoupled_weight_decay": True}), t, parts)


def nadam(k: Any, h: Hyper, t: int, parts: Numbers) -> Numbers:
    """Dozat 2016, Algorithm 2, with the schedule mu_t = beta1 (1 - 0.96^(t psi) / 2) that he proposes.

    The product of all mu is kept in float32 (torch's state ``mu_product``), and rounded at every step.
    """
    g = _with_l2(k, parts["grad"], parts["param"], _l2(h))
    m, v = _moments(k, h, parts)
    beta1, beta2 = h.betas
    mu = beta1 * (1 - 0.5 * 0.96 ** (np.arange(1, t + 2) * h.momentum_decay))
    now, next_, product = mu[-2], mu[-1], float(np.prod(mu[:-1]))
    off = t * 2.0**-24 * product / (1 - product)
    root = k.root(v / k.coefficient(1 - beta2**t)) + k.coefficient(h.eps)
    error = off + _power_error(t, beta2)
    of_g = k.coefficient(h.lr * (1 - now) / (1 - product), error)
    of_m = k.coefficient(h.lr * next_ / (1 - product * next_), error + 2.0**-24)
    p = k.step(parts["param"], of_g * (g / root), of_m * (m / root), decay=_decay(h))
    return {"param": p, "exp_avg": m, "exp_avg_sq": v}


def radam(k: Any, h: Hyper, t: int, parts: Numbers) -> Numbers:
    """Liu et al. 2020 (arXiv:1908.03265), Algorithm 2, with torch.optim's bound of 5."""
    m, v = _moments(k, h, parts)
    beta1, beta2 = h.betas
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    size, error = h.lr / (1 - beta1**t), _power_error(t, beta1, beta2)
    move = m
    if length > 5:
        r2 = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        size *= float(np.sqrt(r2 * (1 - beta2**t)))
        error += 2 * longest * _power_error(t, beta2) / (length - 4)  # what cancels in the length
        move = m / (k.root(v) + k.coefficient(h.eps))
    p = k.step(parts["param"], k.coefficient(size, error) * move, decay=_decay(h))
    return {"param": p, "exp_avg": m, "exp_avg_sq": v}


def lion(k: Any, h: Hyper, t: int, parts: Numbers) -> Numbers:
    """Chen et al. 2023 (arXiv:2302.06675), Algorithm 2."""
    g, m, (beta1, beta2) = parts["grad"], parts["exp_avg"], h.betas
    move = k.coefficient(h.lr) * k.sign(k.mean(m, g, beta1))
    p = k.step(parts["param"], move, decay=h.lr * h.weight_decay)
    return {"param": p, "exp_avg": k.mean(m, g, beta2)}


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A rule, and what to know of the optimizers that have it.

    Attributes:
        rule: its function.
        states: every state that it may have, by torch's name, and what else optimizers call it.
        fields: its hyper-parameters, by torch's names.
        lr: one that moves parameters of the size of 1 visibly.
        second: the state that is a running average or sum of squares.
        rates: those of ``fields`` that are decay rates.
        in_float32: whether torch keeps a number of it in float32 whatever the dtype, so that it drifts as that does.
    """

    rule: Callable[[Any, Hyper, int, Numbers], Numbers]
    states: Mapping[str, tuple[str, ...]]
    fields: tuple[str, ...]
    lr: float = 1e-2
    second: str | None = None
    rates: tuple[str, ...] = ("betas",)
    in_float32: bool = False

    def every_rate(self, beta: float) -> dict[str, Any]:
        """Hyper-parameters in which all decay rates are ``beta``."""
        return {name: (beta, beta) if name == "betas" else beta for name in self.rates}


_COMMON = ("lr", "weight_decay", "maximize")
_M, _V = ("m", "state1"), ("v", "state2")
_MOMENTS = {"exp_avg": _M, "exp_avg_sq": _V}
_ADAM = {**_MOMENTS, "max_exp_avg_sq": ()}
_MEANS = {"square_avg": ("v", "state1"), "momentum_buffer": ("buf",), "grad_avg": ()}
_BETAS = (*_COMMON, "betas", "eps")
_EITHER = (*_BETAS, "decoupled_weight_decay")

FAMILIES = {
    "SGD": Family(
        sgd, {"momentum_buffer": ("buf", "state1")},
        (*_COMMON, "momentum", "dampening", "nesterov"), rates=("momentum",),
    ),
    "Adagrad": Family(
        adagrad, {"sum": ("state1", "exp_avg_sq")},
        (*_COMMON, "eps", "lr_decay", "initial_accumulator_value"), second="sum", rates=(),
    ),
    "Adadelta": Family(
        adadelta, {"square_avg": (), "acc_delta": ()}, (*_COMMON, "rho", "eps"),
        lr=1.0, second="square_avg", rates=("rho",),
    ),
    "RMSprop": Family(
        rmsprop, _MEANS, (*_COMMON, "eps", "alpha", "momentum", "centered"),
        second="square_avg", rates=("alpha",),
    ),
    "Adam": Family(adam, _ADAM, (*_BETAS, "amsgrad"), second="exp_avg_sq"),
    "AdamW": Family(adamw, _ADAM, (*_BETAS, "amsgrad"), second="exp_avg_sq"),
    "NAdam": Family(
        nadam, _MOMENTS, (*_EITHER, "momentum_decay"), second="exp_avg_sq", in_float32=True
    ),
    "RAdam": Family(radam, _MOMENTS, _EITHER, second="exp_avg_sq"),
    "Lion": Family(lion, {"exp_avg": _M}, (*_COMMON, "betas")),
}  # fmt: skip


def start(family: str, h: Hyper, param: Array) -> Parts:
    """A parameter and its states before the first step."""
    parts = {"param": param}
    for name in FAMILIES[family].states:
        begin = h.initial_accumulator_value if name == "sum" else 0.0
        parts[name] = np.full_like(param, begin)
    return parts


def step(family: str, h: Hyper, t: int, g: Array, parts: Parts) -> Parts:
    """One step, the ``t``-th of the parameter, counted from 1. A state that the rule has no use for stays."""
    given = parts | {"grad": -g if h.maximize else g}
    return FAMILIES[family].rule(Exact(), h, t, given)


def bounds(family: str, h: Hyper, t: int, g: Array, parts: Parts, to: Precision) -> Parts:
    """The largest error that rounding can make in each part in the step that :func:`step` makes exactly. Infinite
    where the denominator may be zero."""
    k = Rounding(to)
    given = {name: k.number(x) for name, x in (parts | {"grad": -g if h.maximize else g}).items()}
    with np.errstate(all="ignore"):
        moved = FAMILIES[family].rule(k, h, t, given)
        errors = {name: number.error + np.zeros_like(g) for name, number in moved.items()}
    return {name: np.where(np.isnan(error), np.inf, error) for name, error in errors.items()}
