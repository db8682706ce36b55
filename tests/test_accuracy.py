"""How far a step may be from exact arithmetic, and from torch.optim.

The steps are compared with the same rules in float64, written here a second time in numpy from the
papers. One step is compared from equal state, element by element, with a bound on every rounding
that it makes; no norms. Each bound is shown to be tight enough to notice a wrong rule.
"""

from __future__ import annotations

from itertools import product

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
    denominator = np.sqrt(v_new / (1 - beta2**t)) + eps
    update = np.abs(step_size * m_new / denominator)
    e_p = ulp(p_new) / 2 + 10 * U * update + (3 * U * lr * wd * np.abs(p) if decoupled else 0)
    e_p += step_size * e_m / denominator + e_v / (2 * v_new) * update
    return e_p, e_m, e_v


def rmsprop_bounds(p, g, v, buf, mean, lr, alpha=0.99, wd=0.0, mu=0.0, centered=False, eps=1e-8):
    """The largest errors of p, v, buf and mean after one step in float32 from this state.

    mean^2 and v - mean^2 are rounded; the root of an interval is an interval, and a quotient is
    largest where its denominator is smallest; root, sum, eps and quotient are 4 more roundings.
    buf - (1 - mu) buf + x rounds 1 - mu, the product and both sums; lr * buf rounds lr and itself.
    """
    p_new, v_new, buf_new, mean_new = rmsprop64(
        p, g, v, buf, mean, lr, alpha, eps, wd, mu, centered
    )
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


# ---- one step from equal state -------------------------------------------------------------------


def gradients(steps, n, low=-9, high=3, seed=0):
    """Of either sign, from 10^low to 10^high, a new size at each step: float32 [steps, n]."""
    rng = np.random.default_rng(seed)
    sizes = 10 ** rng.uniform(low, high, (steps, n))
    return (rng.choice([-1, 1], (steps, n)) * sizes).astype(np.float32)


def weights(n):
    return np.random.default_rng(1).standard_normal(n).astype(np.float32)


def array(t):
    return t.detach().double().numpy().copy()


def steps_of(make, kwargs, keys, grads, dtype=torch.float32):
    """Runs an optimizer and gives (t, g, before, after) of each step, in float64.

    ``before`` and ``after`` are lists of arrays [n]: the parameter and the states of ``keys``, zeros
    where there is none.
    """
    p = torch.nn.Parameter(torch.from_numpy(weights(grads.shape[1])).to(dtype))
    optimizer = make([p], **kwargs)
    parts = [array(p)] + [np.zeros_like(array(p)) for _ in keys]
    for t, g in enumerate(grads, start=1):
        g = torch.from_numpy(g).to(dtype)
        give_gradient(p, g)
        optimizer.step()
        before, state = parts, optimizer.state[p]
        parts = [array(p)]
        parts += [
            array(state[k]) if k in state else b for k, b in zip(keys, before[1:], strict=True)
        ]
        yield t, array(g), before, parts


ADAM_KEYS = ("exp_avg", "exp_avg_sq")
RMSPROP_KEYS = ("square_avg", "momentum_buffer", "grad_avg")


def worst(make, n=N, steps=STEPS, wrong=None, weight_decay=0.1, **kwargs):
    """The largest |error| / bound of any part of any element in any step.

    ``wrong`` changes settings of the float64 rule only, so that the two are of different rules.
    """
    kwargs |= {"lr": 1e-2, "weight_decay": weight_decay}
    same = {"lr": 1e-2, "wd": weight_decay}
    if make is RMSprop:
        keys, rule, bounds = RMSPROP_KEYS, rmsprop64, rmsprop_bounds
        same |= {"mu": kwargs["momentum"], "centered": kwargs["centered"]}
    else:
        keys, rule, bounds = ADAM_KEYS, adam64, adam_bounds
        same |= {"decoupled": make is AdamW}
    ratio = 0.0
    for t, g, (p, *states), after in steps_of(make, kwargs, keys, gradients(steps, n)):
        age = () if make is RMSprop else (t,)
        exact = rule(p, g, *states, *age, **(same | (wrong or {})))
        limits = bounds(p, g, *states, *age, **same)
        written = [True, *(np.any(x) for x in after[1:])]
        for got, wanted, limit, is_kept in zip(after, exact, limits, written, strict=True):
            if is_kept:
                ratio = max(ratio, float(np.max(np.abs(got - wanted) / limit)))
    return ratio


RULES = [
    (Adam, {}),
    (AdamW, {}),
    (RMSprop, {"centered": False, "momentum": 0.0}),
    (RMSprop, {"centered": False, "momentum": 0.9}),
    (RMSprop, {"centered": True, "momentum": 0.0}),
    (RMSprop, {"centered": True, "momentum": 0.9}),
]


@pytest.mark.parametrize("make, kwargs", RULES)
def test_one_step_is_within_the_sum_of_its_roundings(make, kwargs):
    assert worst(make, **kwargs) <= 1.0


@pytest.mark.parametrize("make, kwargs", RULES)
def test_the_bounds_notice_a_wrong_rule(make, kwargs):
    changes = [{"eps": 1.01e-8}, {"lr": 1e-2 * (1 + 2e-6)}, {"wd": 0.1001}]
    decays = (
        [{"alpha": 0.99 + 1e-7}] if make is RMSprop else [{"beta1": 0.9001}, {"beta2": 0.9990001}]
    )
    for wrong in changes + decays:
        assert worst(make, n=8192, steps=10, wrong=wrong, **kwargs) > 1.2, wrong


# ---- 3,000 steps ---------------------------------------------------------------------------------


def drifts(makes, mean, n=1024, steps=3000):
    """Root mean square errors of p (per path length) and of v (relative) of AdamW classes, free running."""
    rng = np.random.default_rng(0)
    start = (0.02 * rng.standard_normal(n)).astype(np.float32)
    params = [torch.nn.Parameter(torch.from_numpy(start.copy())) for _ in makes]
    optimizers = [
        make([p], lr=1e-3, weight_decay=0.01) for make, p in zip(makes, params, strict=True)
    ]
    p, m, v, path = start.astype(np.float64), np.zeros(n), np.zeros(n), np.zeros(n)
    for t in range(1, steps + 1):
        g = (rng.standard_normal(n) + mean).astype(np.float32)
        for param, optimizer in zip(params, optimizers, strict=True):
            give_gradient(param, torch.from_numpy(g))
            optimizer.step()
        before = p
        p, m, v = adam64(p, g.astype(np.float64), m, v, t, 1e-3, wd=0.01, decoupled=True)
        path += np.abs(p - before)
    rms = lambda x: float(np.sqrt(np.mean(x**2)))  # noqa: E731
    seconds = [o.state[q]["exp_avg_sq"] for o, q in zip(optimizers, params, strict=True)]
    return [
        (rms((array(q) - p) / path), rms(array(s) / v - 1))
        for q, s in zip(params, seconds, strict=True)
    ]


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_drift_is_a_tenth_of_that_of_torch(mean):
    def torchs(params, **kwargs):
        return torch.optim.AdamW(params, fused=True, **kwargs)

    (p_error, v_error), (p_of_torch, v_of_torch) = drifts([AdamW, torchs], mean)
    assert p_error <= 8e-6 and v_error <= 20 * U
    assert 10 * p_error < p_of_torch and 10 * v_error < v_of_torch


# ---- agreement with torch.optim ------------------------------------------------------------------


def history(make, kwargs, steps=20, n=4096):
    """The parameter before and after each step: [steps + 1, n]."""
    ran = list(steps_of(make, kwargs, (), gradients(steps, n, low=-6, high=0)))
    return np.array([ran[0][2][0], *(after[0] for *_, after in ran)])


def disagreement(a, b):
    """The largest difference of two histories over what rounding can do: above 1 they differ.

    In each step each of the two may round p up to 1.5 times, half an ulp each, and an update by up to
    10 u of itself, plus the like for its averages. That is 1e-4 of the movement at most.
    """
    steps = len(a) - 1
    path = np.abs(np.diff(b, axis=0)).sum(axis=0)
    limit = steps * 1.5 * ulp(np.abs(b).max(axis=0)) + 30 * U * path
    assert np.median(limit / path) < 1e-4
    return float(np.max(np.abs(a - b) / limit))


@pytest.mark.parametrize("how", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_twenty_steps_agree_with_torch_optim_in_every_setting(name, how):
    if name == "RMSprop":
        if how == "fused":
            pytest.skip("torch.optim.RMSprop has no fused form")
        options = {"centered": (False, True), "momentum": (0.0, 0.9)}
        ours, theirs = RMSprop, torch.optim.RMSprop
    else:
        options = {"amsgrad": (False, True), "betas": ((0.9, 0.999), (0.3, 0.95))}
        ours, theirs = (Adam, torch.optim.Adam) if name == "Adam" else (AdamW, torch.optim.AdamW)
    options |= {"weight_decay": (0.0, 0.1), "maximize": (False, True)}
    flags = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    for values in product(*options.values()):
        kwargs = {"lr": 1e-2, "eps": 1e-6} | dict(zip(options, values, strict=True))
        a, b = history(ours, kwargs), history(theirs, kwargs | flags[how])
        assert disagreement(a, b) <= 1.0, kwargs


def adam_with_eps_in_the_root(p, g, m, v, t):
    """And eps before the bias correction, a common slip too, would differ as much."""
    new, m, v = adam64(p, g, m, v, t, 1e-2, wd=0.1, decoupled=True)
    update = 1e-2 * m / (1 - 0.9**t) / np.sqrt(v / (1 - 0.999**t) + 1e-6**2)
    return p - 1e-3 * p - update, m, v


def adam_with_decay_last(p, g, m, v, t):
    moved, m, v = adam64(p, g, m, v, t, 1e-2, eps=1e-6)
    return moved * (1 - 1e-3), m, v


def adam_with(**changes):
    settings = {"lr": 1e-2, "eps": 1e-6, "wd": 0.1, "decoupled": True} | changes
    return lambda p, g, m, v, t: adam64(p, g, m, v, t, **settings)


@pytest.mark.parametrize(
    "rule, agrees",
    [
        (adam_with(), True),
        (adam_with_eps_in_the_root, False),
        (adam_with_decay_last, False),
        (adam_with(beta2=0.9989), False),
        (adam_with(decoupled=False), False),
        (adam_with(eps=1.1e-6), False),
    ],
)
def test_the_agreement_check_tells_rules_apart(rule, agrees):
    kwargs = {"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.1}
    ours = history(AdamW, kwargs)
    p, m, v, exact = ours[0], 0.0, 0.0, [ours[0]]
    for t, g in enumerate(gradients(20, 4096, low=-6, high=0).astype(np.float64), start=1):
        p, m, v = rule(p, g, m, v, t)
        exact.append(p)
    assert (disagreement(np.array(exact), ours) <= 1.0) == agrees


# ---- 16-bit parameters ---------------------------------------------------------------------------


def nearest(x, dtype):
    """float64 numbers rounded once, to nearest even, to a 16-bit dtype."""
    if dtype == torch.float16:
        return x.astype(np.float16).astype(np.float64)
    spacing = 2.0 ** (np.maximum(np.frexp(x)[1], -125) - 8)  # bfloat16 keeps 8 bits
    return np.rint(x / spacing) * spacing


@pytest.mark.parametrize(
    "dtype, state_dtype, share, low",
    [
        (torch.bfloat16, None, 0.999, -9),
        (torch.bfloat16, "param", 0.999, -9),
        (torch.float16, None, 0.995, -4),
        (torch.float16, "param", 0.995, -4),
    ],
)
@pytest.mark.parametrize("make", [Adam, AdamW])
def test_a_16_bit_step_is_the_exact_one_rounded_once(make, dtype, state_dtype, share, low):
    kwargs = {"lr": 1e-2, "weight_decay": 0.1, "state_dtype": state_dtype}
    grads = gradients(20, 16_384, low=low, high=1)
    hits = []
    for t, g, before, after in steps_of(make, kwargs, ADAM_KEYS, grads, dtype):
        exact = adam64(before[0], g, *before[1:], t, 1e-2, wd=0.1, decoupled=make is AdamW)
        stored = 3 if state_dtype == "param" else 1
        for got, wanted in zip(after[:stored], exact[:stored], strict=True):
            hits.append(np.mean(got == nearest(wanted, dtype)))
        moved = np.mean(after[0] != before[0])
        assert moved > 0.5  # else doing nothing would do
    assert min(hits) >= share


def mean_decay(make, **kwargs):
    """By how much 64 steps with lr * weight_decay = 2^-12 shrink the mean of bfloat16 weights.

    Relative to the same steps without decay. The updates are as large as the spacing of the weights,
    so that one rounding of the sum keeps, on average, what is far below half of that spacing.
    """
    rng = np.random.default_rng(0)
    start = torch.from_numpy(rng.uniform(1, 2, 32_768)).bfloat16()
    grads = rng.standard_normal((64, 32_768)).astype(np.float32)
    means = []
    for weight_decay in (0.0, 2.0**-6):
        p = torch.nn.Parameter(start.clone())
        optimizer = make([p], lr=2.0**-6, weight_decay=weight_decay, **kwargs)
        for g in grads:
            give_gradient(p, torch.from_numpy(g).bfloat16())
            optimizer.step()
        means.append(float(p.detach().double().mean()))
    return 1 - means[1] / means[0]


def test_a_decay_below_the_spacing_of_bfloat16_is_not_lost():
    assert mean_decay(AdamW) == pytest.approx(64 * 2.0**-12, rel=0.1)


def test_a_decay_that_is_rounded_by_itself_is_lost():
    """The control: torch's loop multiplies the weights by 1 - 2^-12 first, which rounds to the same."""
    assert abs(mean_decay(torch.optim.AdamW, foreach=False)) < 0.2 * 64 * 2.0**-12
