"""How far a step may be from exact arithmetic, and from torch.optim.

The steps are compared with the same rules in float64, written here a second time in numpy from the
papers. One step is compared from equal state, element by element, with a bound on every rounding
that it makes; no norms. Each bound is shown to be tight enough to notice a wrong rule.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import give_gradient

from adamfused import Adam, AdamW, RMSprop

pytestmark = pytest.mark.reference

U = 2.0**-24  # half the spacing of float32 numbers at 1: the largest relative error of one rounding
TINY = 2.0**-149  # the smallest float32
N, STEPS = 65_536, 60


# ---- the rules in float64 ------------------------------------------------------------------------


def adam64(p, g, m, v, t, lr, beta1=0.9, beta2=0.999, eps=1e-8, wd=0.0, decoupled=False):
    """Kingma & Ba 2015, Algorithm 1; Loshchilov & Hutter 2019, Algorithm 2. Gives p, m, v."""
    if not decoupled:
        g = g + wd * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    update = lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return p - (lr * wd * p if decoupled else 0) - update, m, v


def rmsprop64(p, g, v, buf, mean, lr, alpha=0.99, eps=1e-8, wd=0.0, mu=0.0, centered=False):
    """Tieleman & Hinton 2012, lecture 6.5; Graves 2013, eq. 38-41. Gives p, v, buf, mean."""
    g = g + wd * p
    v = alpha * v + (1 - alpha) * g**2
    mean = alpha * mean + (1 - alpha) * g
    spread = np.maximum(v - mean**2, 0) if centered else v
    buf = mu * buf + g / (np.sqrt(spread) + eps)
    return p - lr * buf, v, buf, mean


# ---- what rounding can do to one step ------------------------------------------------------------


def ulp(x):
    """The spacing of float32 numbers at ``x``."""
    return np.spacing(np.abs(x).astype(np.float32)).astype(np.float64)


def average_error(a, b, w, e_b=0.0):
    """Of a + w (b - a), where b has an error ``e_b``: b - a, w and their product are rounded, then the sum."""
    return U * (np.abs(a + w * (b - a)) + 3 * w * np.abs(b - a)) + w * e_b + TINY


def gradient_error(p, g, wd):
    """Of g + wd p: wd and the product are rounded, then the sum."""
    return U * (2 * wd * np.abs(p) + np.abs(g + wd * p)) if wd else 0.0 * g


def adam_bounds(p, g, m, v, t, lr, beta1=0.9, beta2=0.999, wd=0.0, decoupled=False, eps=1e-8):
    """The largest errors of p, m and v after one step in float32 from this state."""
    l2 = 0.0 if decoupled else wd
    p_new, m_new, v_new = adam64(p, g, m, v, t, lr, beta1, beta2, eps, wd, decoupled)
    e_g = gradient_error(p, g, l2)
    g = g + l2 * p
    e_m = average_error(m, g, 1 - beta1, e_g)
    e_v = average_error(v, g**2, 1 - beta2, U * g**2 + 2 * np.abs(g) * e_g)
    step_size = lr / (1 - beta1**t)
    denominator = np.sqrt(v_new / (1 - beta2**t)) + eps
    update = np.abs(step_size * m_new / denominator)
    e_p = 1.5 * ulp(np.maximum(np.abs(p), np.abs(p_new))) + 10 * U * update
    e_p += step_size * e_m / denominator + e_v / (2 * v_new) * update
    return e_p, e_m, e_v


def rmsprop_bounds(p, g, v, buf, mean, lr, alpha=0.99, wd=0.0, mu=0.0, centered=False, eps=1e-8):
    """The largest errors of p, v, buf and mean after one step in float32 from this state.

    mean^2 and v - mean^2 are rounded; the root of an interval is an interval, and a quotient is
    largest where its denominator is smallest; root, sum, eps and quotient are 4 more roundings.
    buf - (1 - mu) buf + x rounds 1 - mu, the product and both sums; lr * buf rounds lr and itself.
    """
    p_new, v_new, buf_new, mean_new = rmsprop64(p, g, v, buf, mean, lr, alpha, eps, wd, mu, centered)
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
    e_p = 0.5 * ulp(np.maximum(np.abs(p), np.abs(p_new))) + lr * (e_buf + 2 * U * np.abs(buf_new))
    return e_p, e_v, e_buf, e_mean


# ---- one step from equal state -------------------------------------------------------------------


def gradients(steps, n, seed=0):
    """Of either sign, from 1e-9 to 1e3, a new size for each element at each step: [steps, n]."""
    rng = np.random.default_rng(seed)
    return (rng.choice([-1, 1], (steps, n)) * 10 ** rng.uniform(-9, 3, (steps, n))).astype(np.float32)


def weights(n, scale=1.0):
    return (scale * np.random.default_rng(1).standard_normal(n)).astype(np.float32)


def state64(optimizer, p, keys):
    """The parameter and its states as float64 arrays; zeros where there is none."""
    state = optimizer.state[p]
    zeros = torch.zeros_like(p)
    return [t.detach().double().numpy().copy() for t in (p, *(state.get(k, zeros) for k in keys))]


def worst_ratio(make, kwargs, keys, exact, bounds, n=N, steps=STEPS):
    """The largest |error| / bound of each part, over all elements and steps, and where."""
    p = torch.nn.Parameter(torch.from_numpy(weights(n)))
    optimizer = make([p], **kwargs)
    worst = {}
    for t, g in enumerate(gradients(steps, n), start=1):
        before = state64(optimizer, p, keys)
        give_gradient(p, torch.from_numpy(g))
        optimizer.step()
        after = state64(optimizer, p, keys)
        g = g.astype(np.float64)
        parts = zip(("p", *keys), after, exact(before, g, t), bounds(before, g, t), strict=True)
        for name, got, wanted, bound in parts:
            if name == "p" or name in optimizer.state[p]:
                ratio = float(np.max(np.abs(got - wanted) / bound))
                worst[name] = max(worst.get(name, 0.0), ratio)
    return worst


def adam_ratios(make, exact_changes=None, **kwargs):
    hyper = {"lr": kwargs["lr"], "wd": kwargs["weight_decay"], "decoupled": make is AdamW}
    return worst_ratio(
        make,
        kwargs,
        ("exp_avg", "exp_avg_sq"),
        lambda s, g, t: adam64(s[0], g, s[1], s[2], t, **(hyper | (exact_changes or {}))),
        lambda s, g, t: adam_bounds(s[0], g, s[1], s[2], t, **hyper),
    )


def rmsprop_ratios(exact_changes=None, **kwargs):
    hyper = {"lr": kwargs["lr"], "wd": kwargs["weight_decay"]}
    hyper |= {"mu": kwargs["momentum"], "centered": kwargs["centered"]}
    return worst_ratio(
        RMSprop,
        kwargs,
        ("square_avg", "momentum_buffer", "grad_avg"),
        lambda s, g, t: rmsprop64(s[0], g, *s[1:], **(hyper | (exact_changes or {}))),
        lambda s, g, t: rmsprop_bounds(s[0], g, *s[1:], **hyper),
    )
