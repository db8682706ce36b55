"""Every optimizer against its textbook form in numpy float64: one step from equal state, element by element, within a
bound on every rounding that it makes. Each bound is shown to be tight enough to notice a wrong rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import textbook
import torch
from helpers import EVERY_OPTIMIZER, give_gradient
from textbook import Array

from adamfused import SGD, Adadelta, Adagrad, Adam, AdamW, Lion, NAdam, RAdam, RMSprop

pytestmark = pytest.mark.reference

N, STEPS = 16_384, 40
MOMENTS = ("exp_avg", "exp_avg_sq")


class Case(NamedTuple):
    """An optimizer with its options, the same rule in ``textbook.py`` with the same numbers, and the names of the
    rule's states; where the optimizer keeps none of that name, the rule's own goes on."""

    make: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]
    rule: str
    hyper: dict[str, Any]
    keys: tuple[str, ...]


L2, DECOUPLED = {"wd": 0.1}, {"wd": 0.1, "decoupled": True}
BUFFER, MEANS = ("momentum_buffer",), ("square_avg", "momentum_buffer", "grad_avg")
CASES = {
    "sgd": Case(SGD, {}, "sgd", {}, BUFFER),
    "sgd-l2": Case(SGD, {}, "sgd", L2, BUFFER),
    "momentum": Case(SGD, {"momentum": 0.9}, "sgd", {"mu": 0.9} | L2, BUFFER),
    "momentum-dampened": Case(
        SGD, {"momentum": 0.9, "dampening": 0.3}, "sgd", {"mu": 0.9, "dampening": 0.3}, BUFFER
    ),
    "momentum-low": Case(SGD, {"momentum": 0.3}, "sgd", {"mu": 0.3}, BUFFER),
    "nesterov": Case(
        SGD, {"momentum": 0.9, "nesterov": True}, "sgd", {"mu": 0.9, "nesterov": True} | L2, BUFFER
    ),
    "adagrad": Case(Adagrad, {}, "adagrad", {}, ("sum",)),
    "adagrad-decay": Case(Adagrad, {"lr_decay": 0.1}, "adagrad", {"lr_decay": 0.1} | L2, ("sum",)),
    "adadelta": Case(Adadelta, {}, "adadelta", {}, ("square_avg", "acc_delta")),
    "adadelta-l2": Case(
        Adadelta, {"rho": 0.95}, "adadelta", {"rho": 0.95} | L2, ("square_avg", "acc_delta")
    ),
    "rmsprop": Case(RMSprop, {}, "rmsprop", L2, MEANS),
    "rmsprop-momentum": Case(RMSprop, {"momentum": 0.9}, "rmsprop", {"mu": 0.9} | L2, MEANS),
    "rmsprop-centered": Case(RMSprop, {"centered": True}, "rmsprop", {"centered": True}, MEANS),
    "lion": Case(Lion, {}, "lion", {}, ("exp_avg",)),
    "lion-decay": Case(Lion, {}, "lion", L2, ("exp_avg",)),
    "adam": Case(Adam, {}, "adam", {}, MOMENTS),
    "adam-l2": Case(Adam, {}, "adam", L2, MOMENTS),
    "adam-other-numbers": Case(
        Adam, {"betas": (0.9, 0.99), "eps": 1e-6}, "adam", {"beta2": 0.99, "eps": 1e-6}, MOMENTS
    ),
    "adam-uncorrected": Case(
        Adam, {"bias_correction": False}, "adam", {"corrected": False}, MOMENTS
    ),
    "adamw": Case(AdamW, {}, "adam", DECOUPLED, MOMENTS),
    "nadam": Case(NAdam, {}, "nadam", L2, MOMENTS),
    "nadam-decoupled": Case(
        NAdam,
        {"decoupled_weight_decay": True, "momentum_decay": 0.1},
        "nadam",
        DECOUPLED | {"psi": 0.1},
        MOMENTS,
    ),
    "radam": Case(RAdam, {}, "radam", L2, MOMENTS),
    "radam-decoupled": Case(RAdam, {"decoupled_weight_decay": True}, "radam", DECOUPLED, MOMENTS),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def steps(case: Case, n: int, count: int) -> Iterator[tuple[int, Array, list[Array], list[Array]]]:
    """Of an optimizer that runs: t, the gradient, and the parameter and states before and after.

    Gradients have either sign and are from 1e-6 to 1e3, a new size at each step.
    """
    rng = np.random.default_rng(0)
    sizes = 10 ** rng.uniform(-6, 3, (count, n))
    p = torch.nn.Parameter(torch.from_numpy(rng.standard_normal(n).astype(np.float32)))
    optimizer = case.make([p], lr=0.01, weight_decay=case.hyper.get("wd", 0.0), **case.options)
    after = [p.detach().double().numpy().copy()] + [np.zeros(n) for _ in case.keys]
    for t in range(1, count + 1):
        g = torch.from_numpy((rng.choice([-1, 1], n) * sizes[t - 1]).astype(np.float32))
        give_gradient(p, g)
        optimizer.step()
        before, state = after, optimizer.state[p]
        parts = [p, *(state.get(key) for key in case.keys)]
        after = [
            b if part is None else part.detach().double().numpy().copy()
            for b, part in zip(before, parts, strict=True)
        ]
        yield t, g.double().numpy(), before, after


def worst(case: Case, n: int = N, count: int = STEPS, wrong: dict[str, Any] | None = None) -> float:
    """The largest |error| / bound of any part of any element in any step; ``wrong`` numbers for the textbook's rule
    alone make it another one."""
    rule, bound = getattr(textbook, case.rule), getattr(textbook, f"{case.rule}_bound")
    ratio, hyper = 0.0, {"lr": 0.01} | case.hyper
    for t, g, before, after in steps(case, n, count):
        exact = rule(t, before[0], g, *before[1:], **(hyper | (wrong or {})))
        limits = bound(t, before[0], g, *before[1:], **hyper)
        for got, old, wanted, limit in zip(after, before, exact, limits, strict=True):
            if got is not old:  # the optimizer keeps it
                error = np.abs(got - wanted)
                by = np.divide(error, limit.error, out=np.zeros(n), where=error > 0)
                ratio = max(ratio, float(by.max()))
    return ratio


@cases
def test_one_step_is_within_the_sum_of_its_roundings(case: Case) -> None:
    assert 0.1 < worst(case) <= 1.0


# Of each rule, numbers that are wrong by little.
WRONG = {
    "sgd": [{"wd": 0.1001}, {"mu": 0.9001}, {"dampening": 0.01}],
    "adagrad": [{"eps": 1e-7}, {"wd": 0.1001}, {"lr_decay": 0.1001}],
    "adadelta": [{"rho": 0.9001}, {"eps": 1.01e-6}, {"wd": 0.1001}],
    "rmsprop": [{"alpha": 0.99001}, {"eps": 1.1e-8}, {"wd": 0.1001}, {"mu": 0.01}],
    "lion": [{"beta1": 0.91}, {"beta2": 0.9901}, {"wd": 0.1001}],
    "adam": [{"beta1": 0.9001}, {"beta2": 0.99901}, {"eps": 1.1e-8}, {"wd": 0.1001}],
    "nadam": [{"beta1": 0.9001}, {"beta2": 0.99901}, {"psi": 4.1e-3}, {"wd": 0.1001}],
    "radam": [{"beta1": 0.9001}, {"beta2": 0.99901}, {"eps": 2e-8}, {"wd": 0.1001}],
}


@cases
def test_the_bounds_notice_a_wrong_rule(case: Case) -> None:
    for wrong in [{"lr": 0.01 * (1 + 2e-6)}, *WRONG[case.rule]]:
        if "wd" in wrong and "wd" not in case.hyper:
            wrong = {"wd": 1e-4}
        if (
            case.make in (SGD, RMSprop)
            and "mu" not in case.hyper
            and not {"mu", "dampening"}.isdisjoint(wrong)
        ):
            continue  # it keeps no buffer
        assert worst(case, 8192, 12, wrong) > 1.2, wrong


def test_every_optimizer_has_a_case() -> None:
    assert set(EVERY_OPTIMIZER) == {case.make for case in CASES.values()}
