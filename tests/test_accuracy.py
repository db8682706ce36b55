"""How far a step may be from exact arithmetic, and from torch.optim.

The steps are compared with the same rules in float64, written a second time from the papers. One
step is compared from equal state, element by element, with a bound on every rounding that it makes;
no norms. Each bound is shown to be tight enough to notice a wrong rule.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from float64_rules import (
    U,
    adam64,
    adam_bounds,
    nearest16,
    rmsprop64,
    rmsprop_bounds,
    spacing16,
    ulp,
)
from helpers import give_gradient

from adamfused import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop

pytestmark = pytest.mark.reference

N, STEPS = 65_536, 60


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


ADAM_OPTIONS = {"amsgrad": (False, True), "betas": ((0.9, 0.999), (0.3, 0.95))}
RMSPROP_OPTIONS = {"centered": (False, True), "momentum": (0.0, 0.9)}
SGD_OPTIONS = {"momentum": (0.9, 0.0), "dampening": (0.0, 0.3)}
NESTEROV_OPTIONS = {"momentum": (0.9, 0.3), "nesterov": (True,)}
ADAGRAD_OPTIONS = {"lr_decay": (0.0, 0.1), "initial_accumulator_value": (0.0, 0.1)}
ADADELTA_OPTIONS = {"rho": (0.9, 0.3)}
NADAM_OPTIONS = {"momentum_decay": (4e-3, 0.1), "decoupled_weight_decay": (False, True)}
RADAM_OPTIONS = {"betas": ((0.9, 0.999), (0.3, 0.95)), "decoupled_weight_decay": (False, True)}
RATES = {SGD: 0.1, Adagrad: 0.1, Adadelta: 10.0, RAdam: 0.1}  # of those that move less than Adam
COMMON_OPTIONS = {"weight_decay": (0.0, 0.1), "maximize": (False, True)}


@pytest.mark.parametrize(
    "ours, theirs, how, options",
    [
        (Adam, torch.optim.Adam, {"foreach": False}, ADAM_OPTIONS),
        (Adam, torch.optim.Adam, {"foreach": True}, ADAM_OPTIONS),
        (Adam, torch.optim.Adam, {"fused": True}, ADAM_OPTIONS),
        (AdamW, torch.optim.AdamW, {"foreach": False}, ADAM_OPTIONS),
        (AdamW, torch.optim.AdamW, {"foreach": True}, ADAM_OPTIONS),
        (AdamW, torch.optim.AdamW, {"fused": True}, ADAM_OPTIONS),
        (RMSprop, torch.optim.RMSprop, {"foreach": False}, RMSPROP_OPTIONS),
        (RMSprop, torch.optim.RMSprop, {"foreach": True}, RMSPROP_OPTIONS),
        (SGD, torch.optim.SGD, {"foreach": False}, SGD_OPTIONS),
        (SGD, torch.optim.SGD, {"fused": True}, SGD_OPTIONS),
        (SGD, torch.optim.SGD, {"foreach": True}, NESTEROV_OPTIONS),
        (Adagrad, torch.optim.Adagrad, {"foreach": False}, ADAGRAD_OPTIONS),
        (Adagrad, torch.optim.Adagrad, {"fused": True}, ADAGRAD_OPTIONS),
        (Adadelta, torch.optim.Adadelta, {"foreach": False}, ADADELTA_OPTIONS),
        (Adadelta, torch.optim.Adadelta, {"foreach": True}, ADADELTA_OPTIONS),
        (NAdam, torch.optim.NAdam, {"foreach": False}, NADAM_OPTIONS),
        (NAdam, torch.optim.NAdam, {"foreach": True}, NADAM_OPTIONS),
        (RAdam, torch.optim.RAdam, {"foreach": False}, RADAM_OPTIONS),
        (RAdam, torch.optim.RAdam, {"foreach": True}, RADAM_OPTIONS),
    ],
)
def test_twenty_steps_agree_with_torch_optim_in_every_setting(ours, theirs, how, options):
    options = options | COMMON_OPTIONS
    for values in product(*options.values()):
        kwargs = {"lr": RATES.get(ours, 0.01)} | dict(zip(options, values, strict=True))
        kwargs |= {"eps": 1e-6} if ours is not SGD else {}
        a, b = history(ours, kwargs), history(theirs, kwargs | how)
        assert disagreement(a, b) <= 1.0, kwargs


def adam_with_eps_in_the_root(p, g, m, v, t):
    _, m, v = adam64(p, g, m, v, t, 1e-2)
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


def rounded_once(make, dtype, **kwargs):
    """How parameters, and states in 16 bits, compare with the exact step from equal state.

    Gives the smallest share, over steps and parts, of bits equal to the exact number rounded once to
    nearest, and the largest error over what a float32 step and that one rounding can do.

    An element's gradients have a size of their own and vary by a normal distribution. The betas are
    odd because 0.9 m + 0.1 g of short numbers often lies exactly between two: in 1 % of bfloat16's.
    """
    grads = np.random.default_rng(2).standard_normal((20, 16_384)).astype(np.float32)
    grads *= np.abs(gradients(1, 16_384, low=-9 if dtype == torch.bfloat16 else -4, high=1))
    kwargs |= {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9137, 0.99871)}
    settings = (1e-2, *kwargs["betas"], 1e-8, 0.1, make is not Adam)
    shares, errors = [], []
    for t, g, before, after in steps_of(make, kwargs, ADAM_KEYS, grads, dtype):
        exact, limits = (f(before[0], g, *before[1:], t, *settings) for f in (adam64, adam_bounds))
        in_16_bits = 1 if kwargs.get("state_dtype", "param") is None else 3
        for got, wanted, limit in list(zip(after, exact, limits, strict=True))[:in_16_bits]:
            shares.append(np.mean(got == nearest16(wanted, dtype)))
            limit = limit + spacing16(wanted, dtype) / 2
            errors.append(np.max(np.abs(got - wanted) / limit))
        assert np.mean(after[0] != before[0]) > 0.25  # else doing nothing would do
    return min(shares), max(errors)


SHARES = pytest.mark.parametrize("dtype, share", [(torch.bfloat16, 0.999), (torch.float16, 0.995)])


@SHARES
@pytest.mark.parametrize("state_dtype", [None, "param"])
@pytest.mark.parametrize("make", [Adam, AdamW])
def test_a_16_bit_step_is_the_exact_one_rounded_once(make, state_dtype, dtype, share):
    same, error = rounded_once(make, dtype, state_dtype=state_dtype)
    assert same >= share and error <= 1.0


@pytest.mark.filterwarnings("ignore:invalid value")  # torch's weights overflow
@SHARES
def test_the_16_bit_check_notices_a_rounding_of_every_operation(dtype, share):
    same, error = rounded_once(torch.optim.AdamW, dtype, foreach=False, eps=1e-6)
    assert same < share and not error <= 1.0


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
