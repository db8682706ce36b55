"""Cases of rounding: one step from equal state, and free runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import arithmetic, exact
from .lab import FLOATS, Lab, Unsupported, case, need
from .walk import DRIFT, DRIFT_DOUBLE, bits, numbers, plain_step, states_of

ADAMS = ("Adam", "AdamW")
MOMENTS = (*ADAMS, "NAdam", "RAdam")
WIDE = (torch.float32, torch.float64)


def one_step(lab: Lab, n: int = 16_421, steps: int = 12, **wanted: Any) -> None:
    """Steps from states that gradients of 1e-9 to 1e3 made, an odd number of elements."""
    lab.run([lab.weights(n)], steps, lab.hyper(**wanted))


@case("quick", "full")
def defaults(lab: Lab) -> None:
    """One step from equal state, the optimizer's defaults, decay 0.1"""
    one_step(lab)


@case("quick", "full")
def no_decay(lab: Lab) -> None:
    """The same without weight decay"""
    one_step(lab, weight_decay=0.0)


@case("hostile", "full")
def strong_decay(lab: Lab) -> None:
    """Weight decay 10, small gradients: coupled and decoupled decay cannot be mistaken"""
    params = [lab.weights(4099)]
    hyper = lab.hyper(weight_decay=10.0)
    lab.run(params, 10, hyper, lambda p: lab.gradient(p, -3, 0))


@case("quick", "full", families=MOMENTS)
def other_betas(lab: Lab) -> None:
    """betas (0.3, 0.95), eps 1e-6"""
    one_step(lab, betas=(0.3, 0.95), eps=1e-6)


@case("quick", "full", families=(*MOMENTS, "Adagrad", "Adadelta"))
def large_eps(lab: Lab) -> None:
    """eps 0.1, of the size of the gradients: where it is added matters"""
    params = [lab.weights(4099)]
    lab.run(params, 10, lab.hyper(eps=0.1), lambda p: lab.gradient(p, -3, 1))


@case("quick", "full", families=ADAMS)
def amsgrad(lab: Lab) -> None:
    """amsgrad=True"""
    one_step(lab, amsgrad=True)


@case("quick", "full")
def maximize(lab: Lab) -> None:
    """maximize=True"""
    one_step(lab, maximize=True)


@case("quick", "full", families=("SGD", "RMSprop"))
def momentum(lab: Lab) -> None:
    """momentum 0.9"""
    one_step(lab, momentum=0.9)


@case("quick", "full", families=("SGD",))
def dampened(lab: Lab) -> None:
    """momentum 0.9, dampening 0.3, which the first gradient has not"""
    one_step(lab, momentum=0.9, dampening=0.3)


@case("quick", "full", families=("SGD",))
def nesterov(lab: Lab) -> None:
    """nesterov=True, momentum 0.9"""
    one_step(lab, momentum=0.9, nesterov=True)


@case("full", families=("SGD",))
def low_momentum(lab: Lab) -> None:
    """momentum 0.3"""
    one_step(lab, momentum=0.3)


@case("quick", "full", families=("Adagrad",))
def lr_decay(lab: Lab) -> None:
    """lr_decay 0.1: the first step has the whole lr"""
    one_step(lab, lr_decay=0.1)


@case("full", families=("Adagrad",))
def initial_accumulator(lab: Lab) -> None:
    """initial_accumulator_value 0.1"""
    one_step(lab, initial_accumulator_value=0.1)


@case("full", families=("Adadelta",))
def other_rho(lab: Lab) -> None:
    """rho 0.5, eps 1e-3"""
    one_step(lab, rho=0.5, eps=1e-3)


@case("quick", "full", families=("Lion",))
def other_lion_betas(lab: Lab) -> None:
    """betas (0.95, 0.98), as for language models"""
    one_step(lab, betas=(0.95, 0.98))


@case("quick", "full", families=("NAdam", "RAdam"))
def decoupled_decay(lab: Lab) -> None:
    """decoupled_weight_decay=True, decay 0.1"""
    one_step(lab, decoupled_weight_decay=True)


@case("full", families=("NAdam",))
def momentum_decay(lab: Lab) -> None:
    """momentum_decay 0.1"""
    one_step(lab, momentum_decay=0.1)


@case("full", families=("RAdam",))
def rectified_from_another_step_on(lab: Lab) -> None:
    """betas (0.9, 0.9): when the variance counts depends on beta2"""
    one_step(lab, steps=20, betas=(0.9, 0.9))


@case("quick", "full", families=("RMSprop",))
def centered(lab: Lab) -> None:
    """centered=True"""
    one_step(lab, centered=True)


@case("full", families=("RMSprop",))
def centered_momentum(lab: Lab) -> None:
    """centered=True, momentum 0.9"""
    one_step(lab, centered=True, momentum=0.9)


@case("full", families=("RMSprop",))
def other_alpha(lab: Lab) -> None:
    """alpha 0.5, eps 1e-3"""
    one_step(lab, alpha=0.5, eps=1e-3)


@case("full")
def many_steps(lab: Lab) -> None:
    """60 steps of 65,536 elements"""
    one_step(lab, 65_536, 60)


@case("full")
def old_parameters(lab: Lab) -> None:
    """300 steps of 17 elements: the step count passes what 8 bits can count"""
    one_step(lab, 17, 300)


def in_dtype(lab: Lab, dtype: torch.dtype) -> None:
    if lab.dtype != torch.float32 and lab.dtype == dtype:
        raise Unsupported("this dtype is what all cases run in")
    lab.run([lab.weights(8209, dtype=dtype)], 12)


@case("full")
def bfloat16(lab: Lab) -> None:
    """bfloat16 parameters: the nearest to the exact result in 99.9 % of all elements, else a neighbour"""
    in_dtype(lab, torch.bfloat16)


@case("full")
def float16(lab: Lab) -> None:
    """float16 parameters: the nearest to the exact result in 99.5 %, else a neighbour"""
    params = [lab.weights(8209, dtype=torch.float16)]
    lab.run(params, 12, lab.hyper(eps=1e-6), lambda p: lab.gradient(p, -4, 3))


@case("full")
def float64(lab: Lab) -> None:
    """float64 parameters"""
    in_dtype(lab, torch.float64)


@case("full")
def complex64(lab: Lab) -> None:
    """complex64 parameters, as pairs of real numbers"""
    in_dtype(lab, torch.complex64)


@case("full", dtypes=(torch.float32,))
def mixed_dtypes(lab: Lab) -> None:
    """float32, bfloat16 and float64 parameters in one group"""
    lab.run([lab.weights(n, dtype=d) for n, d in zip((999, 501, 77), FLOATS[:3], strict=True)], 6)


# ---- free runs -----------------------------------------------------------------------------------


def rms(x: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.mean(x**2))) if len(x) else 0.0


def free_run(lab: Lab, steps: int, mean: float) -> None:
    """Notes the drift after 1, 10, 100, ... steps and compares it with the limit."""
    p = lab.leaf(lab.normal((1024,), torch.float64).mul_(0.02).to(lab.dtype))
    lr = exact.FAMILIES[lab.family].lr / 10
    h = lab.hyper(lr=lr, weight_decay=0.01 if lab.spec.takes("weight_decay") else 0.0)
    optimizer = lab.spec.make([p], **h.arguments(lab.family, lab.spec))
    other, q = None, p.detach().clone().requires_grad_()
    if lab.twin is not None:
        other = lab.twin.make([q], **h.arguments(lab.family, lab.spec))
    parts = exact.start(lab.family, h, numbers(p))
    path = np.zeros(1024)
    for t in range(1, steps + 1):
        g = (lab.normal((1024,), torch.float64) + mean).to(lab.dtype)
        plain_step(optimizer, [p], [g])
        before = parts["param"]
        if other is not None:
            plain_step(other, [q], [g])
            need(not lab.same_bits or bits(p) == bits(q), f"bits differ after {t:,} steps")
            parts = {"param": numbers(q)}
        else:
            parts = exact.step(lab.family, h, t, numbers(g), parts)
        path += np.abs(parts["param"] - before)
        if t == 10 ** round(math.log10(t)) or t == steps:
            _compare(lab, t, p, optimizer, parts, path)


def _compare(
    lab: Lab, t: int, p: Tensor, optimizer: Any, parts: exact.Parts, path: arithmetic.Array
) -> None:
    family = exact.FAMILIES[lab.family]
    second = family.second
    states = states_of(optimizer, p, lab.family, lab.hyper())
    error, v_error = rms((numbers(p) - parts["param"])[path > 0] / path[path > 0]), None
    need(math.isfinite(error), f"after {t:,} steps the parameters are not finite")
    if states and second in parts and second in states and states[second].judged:
        v_error = rms(states[second].values / parts[second] - 1)
        need(math.isfinite(v_error), f"after {t:,} steps second moments are not finite")
    lab.curve[t] = error, v_error
    later = t > min(DRIFT)
    if lab.dtype == torch.float64 and not family.in_float32:
        limit, v_limit = DRIFT_DOUBLE[later], DRIFT_DOUBLE[later]
    else:
        limit, v_limit = DRIFT[max(DRIFT)] if later else DRIFT[min(DRIFT)]
        # Until it has gone some way, a parameter's own half ulp is what one sees.
        limit += 2 * rms(arithmetic.SINGLE.ulp(parts["param"])[path > 0] / path[path > 0])
    need(
        error <= limit,
        f"after {t:,} steps the parameters are {error:.2g} of their way off, more than {limit:.2g}",
    )
    if v_error is not None and v_error > 0.1 and t == 1:
        lab.found.free = "its states are not the rule's running averages"
    if v_error is not None and not lab.found.free:
        need(
            v_error <= v_limit,
            f"after {t:,} steps second moments are {v_error:.2g} off, more than {v_limit:.2g}",
        )


@case("quick", "full", dtypes=WIDE)
def drift(lab: Lab) -> None:
    """100 steps, free running, gradients of mean 0"""
    free_run(lab, 100, 0.0)


@case("full", dtypes=WIDE)
def long_drift(lab: Lab) -> None:
    """--steps steps (10,000), free running, gradients of mean 0"""
    free_run(lab, lab.long, 0.0)


@case("full", dtypes=WIDE)
def long_drift_one_way(lab: Lab) -> None:
    """--steps steps (10,000), free running, gradients of mean 1"""
    free_run(lab, lab.long, 1.0)
