"""The update rules in float64 numpy, and what rounding can do to one float32 step of them.

Written from the papers, a second time and on purpose without a look at the package's own rules.
Arrays are float64 of shape [n]; a step takes the state before it and gives the one after it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

U = 2.0**-24  # half the spacing of float32 numbers at 1: the largest relative error of one rounding
TINY = 2.0**-149  # the smallest float32


# ---- the rules in float64 ------------------------------------------------------------------------


def adam64(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    t: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    wd: float = 0.0,
    decoupled: bool = False,
) -> tuple[Array, Array, Array]:
    """Kingma & Ba 2015, Algorithm 1; Loshchilov & Hutter 2019, Algorithm 2. Gives p, m, v."""
    if not decoupled:
        g = g + wd * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    update = lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return p - (lr * wd * p if decoupled else 0) - update, m, v


def rmsprop64(
    p: Array,
    g: Array,
    v: Array,
    buf: Array,
    mean: Array,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    wd: float = 0.0,
    mu: float = 0.0,
    centered: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """Tieleman & Hinton 2012, lecture 6.5; Graves 2013, eq. 38-41. Gives p, v, buf, mean."""
    g = g + wd * p
    v = alpha * v + (1 - alpha) * g**2
    mean = alpha * mean + (1 - alpha) * g
    spread = np.maximum(v - mean**2, 0) if centered else v
    buf = mu * buf + g / (np.sqrt(spread) + eps)
    return p - lr * buf, v, buf, mean


# ---- what rounding can do to one step ------------------------------------------------------------


def ulp(x: Array) -> Array:
    """The spacing of float32 numbers at ``x``."""
    return np.spacing(np.abs(x).astype(np.float32)).astype(np.float64)


def average_error(a: Array, b: Array, w: float, e_b: Array) -> Array:
    """Of a + w (b - a): b - a, w and their product are rounded, then the sum; b has an error ``e_b``."""
    return U * (np.abs(a + w * (b - a)) + 3 * w * np.abs(b - a)) + w * e_b + TINY


def gradient_error(p: Array, g: Array, wd: float) -> Array:
    """Of g + wd p: wd and the product are rounded, then the sum."""
    return U * (2 * wd * np.abs(p) + np.abs(g + wd * p)) if wd else np.zeros_like(g)


def adam_bounds(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    t: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    wd: float = 0.0,
    decoupled: bool = False,
) -> tuple[Array, Array, Array]:
    """The largest errors of p, m and v after one step in float32 from this state.

    The update: root, two scalars, eps, sum, two products and quotient are 8 roundings, of which eps
    and the sum with the decay may count twice; the decay rounds lr wd, its product and the sum. The
    subtraction is rounded once: half an ulp of the new p.
    """
    l2 = 0.0 if decoupled else wd
    p_new, m_new, v_new = adam64(p, g, m, v, t, lr, beta1, beta2, eps, wd, decoupled)
    e_g = gradient_error(p, g, l2)
    g = g + l2 * p
    e_m = average_error(m, g, 1 - beta1, e_g)
    e_v = average_error(v, g**2, 1 - beta2, U * g**2 + 2 * np.abs(g) * e_g)
    step_size = lr / (1 - beta1**t)
    c2 = 1 - beta2**t
    denominator = np.sqrt(v_new / c2) + eps
    update = np.abs(step_size * m_new / denominator)
    e_p = ulp(p_new) / 2 + 10 * U * update + (3 * U * lr * wd * np.abs(p) if decoupled else 0)
    e_root = np.sqrt(v_new / c2) - np.sqrt(np.maximum(v_new - e_v, 0) / c2)  # the larger side
    e_p += (step_size * e_m + update * e_root) / (denominator - e_root)
    return e_p, e_m, e_v


def rmsprop_bounds(
    p: Array,
    g: Array,
    v: Array,
    buf: Array,
    mean: Array,
    lr: float,
    alpha: float = 0.99,
    eps: float = 1e-8,
    wd: float = 0.0,
    mu: float = 0.0,
    centered: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """The largest errors of p, v, buf and mean after one step in float32 from this state.

    mean^2 and v - mean^2 are rounded; the root of an interval is an interval, and a quotient is
    largest where its denominator is smallest; root, sum, eps and quotient are 4 more roundings.
    buf - (1 - mu) buf + x rounds 1 - mu, the product and both sums; lr * buf rounds lr and itself.
    """
    new = rmsprop64(p, g, v, buf, mean, lr, alpha, eps, wd, mu, centered)
    p_new, v_new, buf_new, mean_new = new
    e_g = gradient_error(p, g, wd)
    g = g + wd * p
    e_v = average_error(v, g**2, 1 - alpha, U * g**2 + 2 * np.abs(g) * e_g)
    e_mean = average_error(mean, g, 1 - alpha, e_g)
    spread, e_spread = v_new, e_v
    if centered:
        spread = np.maximum(v_new - mean_new**2, 0)
        e_spread = e_v + (2 * np.abs(mean_new) + e_mean) * e_mean + U * (mean_new**2 + spread)
    exact = np.abs(g) / (np.sqrt(spread) + eps)
    largest = (np.abs(g) + e_g) / (np.sqrt(np.maximum(spread - e_spread, 0)) + eps) * (1 + 4 * U)
    e_buf = largest - exact
    if mu:
        e_buf += U * ((2 * (1 - mu) + mu) * np.abs(buf) + np.abs(buf_new))
    e_p = ulp(p_new) / 2 + lr * (e_buf + 2 * U * np.abs(buf_new))
    return e_p, e_v, e_buf, e_mean


def spacing16(x: Array, dtype: torch.dtype) -> Array:
    """The distance to the next number of a 16-bit ``dtype``."""
    if dtype == torch.float16:
        return np.spacing(np.abs(x).astype(np.float16)).astype(np.float64)
    return 2.0 ** (np.maximum(np.frexp(x)[1], -125) - 8)  # bfloat16 keeps 8 bits


def nearest16(x: Array, dtype: torch.dtype) -> Array:
    """float64 numbers rounded once, to nearest even, to a 16-bit ``dtype``."""
    if dtype == torch.float16:
        return x.astype(np.float16).astype(np.float64)
    return np.rint(x / spacing16(x, dtype)) * spacing16(x, dtype)
