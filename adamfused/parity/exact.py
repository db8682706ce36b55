"""The rules of Adam, AdamW and RMSprop in float64, and what rounding can do to one step of them.

Written from the papers, apart from :mod:`adamfused.rules` and on purpose without a look at it: what the package claims
of itself is measured against this. All arrays are float64 of shape [n].

The bounds hold for every usual way to write a rule in an arithmetic that rounds each operation once and takes its
coefficients from double precision: ``b a + (1-b) x`` as well as ``a + (1-b)(x-a)``, decay before or together with the
update, fused multiply-add or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..spec import Spec

Array = NDArray[np.float64]
Parts = dict[str, Array]
"""The parameter as ``"param"`` and its states by torch's names."""

STATES = {
    "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "RMSprop": ("square_avg", "momentum_buffer", "grad_avg"),
}
"""By family: every state that its rule may have."""

_COMMON = ("lr", "eps", "weight_decay", "maximize")
FIELDS = {
    "Adam": (*_COMMON, "betas", "amsgrad"),
    "AdamW": (*_COMMON, "betas", "amsgrad"),
    "RMSprop": (*_COMMON, "alpha", "momentum", "centered"),
}
"""By family: its hyper-parameters, by torch's names."""


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
    momentum: float = 0.0
    centered: bool = False

    def arguments(self, family: str, spec: Spec) -> dict[str, Any]:
        """Those of the family that an optimizer takes, as its keyword arguments."""
        return {name: getattr(self, name) for name in FIELDS[family] if spec.takes(name)}


@dataclass(frozen=True)
class Precision:
    """An arithmetic: ``u`` is the largest relative error of one rounding, ``tiny`` the smallest number."""

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


def step(family: str, h: Hyper, t: int, g: Array, parts: Parts) -> Parts:
    """One step, the ``t``-th of the parameter, counted from 1. A state that the rule has no use for stays.

    Kingma & Ba 2015 (arXiv:1412.6980), Algorithm 1; Loshchilov & Hutter 2019 (arXiv:1711.05101), Algorithm 2; Reddi
    et al. 2018 (arXiv:1904.09237) with the maximum of the uncorrected averages, as in torch; Tieleman & Hinton 2012,
    lecture 6.5; Graves 2013 (arXiv:1308.0850), eq. 38-41.
    """
    p = parts["param"]
    g = (-g if h.maximize else g) + (
        h.weight_decay * p if h.weight_decay and family != "AdamW" else 0.0
    )
    if family == "RMSprop":
        v, buf, mean = (parts[name] for name in STATES[family])
        v = h.alpha * v + (1 - h.alpha) * g**2
        mean = h.alpha * mean + (1 - h.alpha) * g if h.centered else mean
        spread = np.maximum(v - mean**2, 0) if h.centered else v
        moved = g / (np.sqrt(spread) + h.eps)
        buf = h.momentum * buf + moved if h.momentum else buf
        p = p - h.lr * (buf if h.momentum else moved)
        return {"param": p, "square_avg": v, "momentum_buffer": buf, "grad_avg": mean}
    m, v, top = (parts[name] for name in STATES[family])
    beta1, beta2 = h.betas
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    top = np.maximum(top, v) if h.amsgrad else top
    root = np.sqrt((top if h.amsgrad else v) / (1 - beta2**t))
    decay = h.lr * h.weight_decay * p if h.weight_decay and family == "AdamW" else 0.0
    p = p - decay - h.lr / (1 - beta1**t) * (m / (root + h.eps))
    return {"param": p, "exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": top}


def bounds(family: str, h: Hyper, t: int, g: Array, parts: Parts, to: Precision) -> Parts:
    """The largest error that rounding can make in each part in the step that :func:`step` makes exactly.

    An average with the decay rate b rounds b, 1 - b, two products (or a difference and a product) and a sum: at most
    3 u of what goes in and u of what comes out; of squares, which are rounded too, at most 5 u of what comes out. An
    update is at most ten roundings of itself, besides what the errors of the averages do to it; decoupled decay rounds
    a coefficient and a product of the size of the parameter, the sum is rounded once: 1.5 units in the last place
    together. A power b^t has up to t roundings in double, which 1 - b^t magnifies. Infinite where the denominator may
    be zero.
    """
    with np.errstate(all="ignore"):
        u, new = to.u, step(family, h, t, g, parts)
        p, coupled = parts["param"], h.weight_decay if family != "AdamW" else 0.0
        e_g = u * (2 * np.abs(coupled * p) + np.abs(g + coupled * p)) if coupled else 0 * g
        g = (-g if h.maximize else g) + (coupled * p if coupled else 0.0)

        def mean_error(a: Array, after: Array, beta: float) -> Array:
            went_in = max(beta, 1 - beta) * np.abs(a) + (1 - beta) * np.abs(g)
            return u * (np.abs(after) + 3 * went_in) + (1 - beta) * e_g + to.tiny

        def square_error(after: Array, beta: float) -> Array:
            return 5 * u * after + (1 - beta) * (2 * np.abs(g) + e_g) * e_g + 3 * to.tiny

        if family == "RMSprop":
            v, mean = new["square_avg"], new["grad_avg"]
            e_v, e_mean = square_error(v, h.alpha), mean_error(parts["grad_avg"], mean, h.alpha)
            spread, e_spread = v, e_v
            if h.centered:
                spread = np.maximum(v - mean**2, 0)
                e_spread = e_v + (2 * np.abs(mean) + e_mean) * e_mean + u * (mean**2 + spread)
            least = np.sqrt(np.maximum(spread - e_spread, 0)) + h.eps
            exact = np.abs(g) / (np.sqrt(spread) + h.eps)
            e_moved = (np.abs(g) + e_g) / least * (1 + 6 * u) - exact
            moved, e_buf = exact, e_moved
            if h.momentum:
                moved = np.abs(new["momentum_buffer"])
                e_buf = e_moved + u * (
                    3 * h.momentum * np.abs(parts["momentum_buffer"]) + 2 * moved
                )
            e_p = h.lr * (e_buf + 3 * u * moved)
            errors = {"square_avg": e_v, "momentum_buffer": e_buf, "grad_avg": e_mean}
            roundings = 0.5
        else:
            m, v = new["exp_avg"], new["exp_avg_sq"]
            e_m, e_v = mean_error(parts["exp_avg"], m, h.betas[0]), square_error(v, h.betas[1])
            size, c2 = h.lr / (1 - h.betas[0] ** t), 1 - h.betas[1] ** t
            by = new["max_exp_avg_sq"] if h.amsgrad else v
            e_root = np.sqrt(by / c2) - np.sqrt(np.maximum(by - e_v, 0) / c2)  # the larger side
            denominator = np.sqrt(by / c2) + h.eps
            update = np.abs(size * m / denominator)
            powers = sum(2.0**-53 * (2 + t * b**t / (1 - b**t)) for b in h.betas)
            e_p = (10 * u + powers) * update + (size * e_m + update * e_root) / (
                denominator - e_root
            )
            errors = {"exp_avg": e_m, "exp_avg_sq": e_v, "max_exp_avg_sq": e_v}
            roundings = 1.5 if h.weight_decay and family == "AdamW" else 0.5
        if h.lr == 0:
            e_p = 0 * g
        e_p = e_p + roundings * to.ulp(np.maximum(np.abs(p), np.abs(new["param"])))
        errors["param"] = np.where(np.isnan(e_p), np.inf, e_p)
        return errors


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
