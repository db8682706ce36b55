"""Cases of what breaks optimizers: layouts, missing and special gradients, options, checkpoints, threads."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..spec import Unsupported
from .exact import FAMILIES
from .lab import Lab, case, need
from .walk import bits, plain_step

WITH_EPS = tuple(name for name, family in FAMILIES.items() if "eps" in family.fields)
WITH_RATES = tuple(name for name, family in FAMILIES.items() if family.rates)
SEAMS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1023, 1024, 1025, 4095, 4097)


# ---- sizes and layouts ---------------------------------------------------------------------------


@case("hostile", "full", "quick")
def sizes(lab: Lab) -> None:
    """Many tensors whose sizes lie around every vector and tile; the last elements count"""
    lab.run([lab.weights(n) for n in SEAMS], 3)


@case("hostile", "full")
def large_tensor(lab: Lab) -> None:
    """One tensor of 300,007 elements: every element is moved, on however many threads"""
    lab.run([lab.weights(300_007)], 2)


@case("hostile", "full")
def zero_dim(lab: Lab) -> None:
    """0-dimensional parameters"""
    lab.run([lab.weights(), lab.weights(3), lab.weights()], 3)


@case("hostile", "full")
def empty(lab: Lab) -> None:
    """Empty tensors first, last and between others"""
    lab.run(
        [lab.weights(0), lab.weights(5), lab.weights(3, 0, 2), lab.weights(70), lab.weights(0)], 3
    )


@case("hostile", "full")
def only_empty(lab: Lab) -> None:
    """Nothing but empty tensors"""
    lab.run([lab.weights(0), lab.weights(2, 0)], 2)


@case("hostile", "full")
def channels_last(lab: Lab) -> None:
    """channels_last parameters with contiguous gradients, and the other way round"""
    a, b = lab.normal((8, 5, 6, 7), lab.dtype), lab.weights(4, 3, 5, 5)
    a = lab.leaf(a.contiguous(memory_format=torch.channels_last))
    walk = lab.walk(([a, b], lab.hyper()))
    for _ in range(3):
        g = lab.gradient(b).contiguous(memory_format=torch.channels_last)
        walk.step([lab.gradient(a), g])


@case("hostile", "full")
def transposed(lab: Lab) -> None:
    """Transposed parameters with contiguous gradients, and the other way round"""
    a, b = lab.leaf(lab.normal((17, 33), lab.dtype).t()), lab.weights(33, 17)
    walk = lab.walk(([a, b], lab.hyper()))
    for _ in range(3):
        walk.step([lab.gradient(a), lab.gradient(b.t()).t()])


@case("hostile", "full")
def strided(lab: Lab) -> None:
    """Every second element of a buffer is a parameter; the elements between stay as they are"""
    buffer = lab.normal((2000,), lab.dtype)
    p, between = lab.leaf(buffer[::2]), buffer[1::2].clone()
    lab.run([p], 3)
    need(
        bits(buffer[1::2]) == bits(between),
        "memory between a strided parameter's elements was written",
    )


@case("hostile", "full")
def neighbours(lab: Lab) -> None:
    """A parameter in the middle of a buffer, misaligned: what lies before and behind stays as it is"""
    buffer = lab.normal((1001 + 16,), lab.dtype)
    before, behind = buffer[:7].clone(), buffer[-9:].clone()
    p = lab.leaf(buffer[7:-9])
    lab.run([p], 3)
    need(bits(buffer[7:-9]) == bits(p), "the parameter no longer lies where it lay")
    same = bits(buffer[:7]) == bits(before) and bits(buffer[-9:]) == bits(behind)
    need(same, "memory beside a parameter that is a view was written")


@case("hostile", "full")
def expanded_gradient(lab: Lab) -> None:
    """Gradients that autograd expanded from one number or one row (stride 0)"""
    a, b = lab.weights(9, 65), lab.weights(130)
    walk = lab.walk(([a, b], lab.hyper()))
    for _ in range(3):
        walk.step([lab.gradient(a[0]).expand(9, 65), lab.gradient(b[0]).expand(130)])


@case("hostile", "full", dtypes=(torch.bfloat16, torch.float16))
def wider_gradient(lab: Lab) -> None:
    """float32 gradients of 16-bit parameters"""
    p = lab.weights(2049)
    lab.run([p], 3, gradient=lambda p: lab.gradient(p, dtype=torch.float32))


# ---- which parameters move -----------------------------------------------------------------------


@case("hostile", "full", "quick")
def missing_gradients(lab: Lab) -> None:
    """Parameters without a gradient in some steps stay, and keep a step count of their own"""
    params = [lab.weights(n) for n in (33, 64, 7)]
    walk = lab.walk((params, lab.hyper()))
    for t in range(6):
        walk.step([None if (t + i) % 3 == 0 else lab.gradient(p) for i, p in enumerate(params)])


@case("hostile", "full")
def no_gradients(lab: Lab) -> None:
    """No parameter has a gradient: nothing happens"""
    walk = lab.walk(([lab.weights(5)], lab.hyper()))
    walk.step([None])


@case("hostile", "full", "quick")
def groups(lab: Lab) -> None:
    """Two groups with different learning rates and decay"""
    a, b = lab.weights(65), lab.weights(3, 11)
    first = lab.hyper()
    decay = 0.01 if lab.spec.takes("weight_decay") else 0.0
    second = replace(first, lr=first.lr / 10, weight_decay=decay)
    walk = lab.walk(([a], first), ([b], second))
    for _ in range(4):
        walk.step([lab.gradient(a), lab.gradient(b)])


@case("hostile", "full")
def added_group(lab: Lab) -> None:
    """A group added after some steps starts from step 1"""
    a, b = lab.weights(65), lab.weights(30)
    walk = lab.walk(([a], lab.hyper()))
    walk.step([lab.gradient(a)])
    walk.add_group(b)
    for _ in range(3):
        walk.step([lab.gradient(a), lab.gradient(b)])


# ---- special numbers -----------------------------------------------------------------------------


def special(lab: Lab, values: Sequence[float], steps: int = 3, **wanted: Any) -> None:
    params = [lab.weights(257)]

    def gradient(p: Tensor) -> Tensor:
        g = lab.gradient(p, -3, 0)
        g[:: 2 * len(values)] = 0
        for k, value in enumerate(values):
            g[2 * k + 1 :: 2 * len(values)] = value
        return g

    lab.run(params, steps, lab.hyper(**wanted), gradient)


@case("hostile", "full", "quick")
def nan(lab: Lab) -> None:
    """NaN in a gradient reaches its element of the parameter, and no other"""
    special(lab, (float("nan"),))


@case("hostile", "full")
def infinity(lab: Lab) -> None:
    """Infinity in a gradient reaches its element of the parameter as NaN or infinity, and no other"""
    special(lab, (float("inf"), float("-inf")))


@case("hostile", "full", dtypes=(torch.float32, torch.float64, torch.bfloat16))
def subnormal(lab: Lab) -> None:
    """Subnormal gradients and parameters are not taken for zero"""
    p = lab.leaf((lab.normal((257,), torch.float64) * 1e-39).to(lab.dtype))
    small = torch.finfo(lab.dtype).smallest_normal
    hyper = lab.hyper(lr=1e-40 if lab.dtype != torch.float64 else 1e-310)
    walk = lab.walk(([p], hyper))
    for _ in range(3):
        walk.step([(lab.gradient(p, -3, 0).double() * small).to(lab.dtype)])


@case("hostile", "full", dtypes=(torch.float32, torch.float64, torch.bfloat16))
def tiny_gradients(lab: Lab) -> None:
    """Gradients of 1e-30 to 1e-15, whose squares are subnormal or zero in float32"""
    lab.run([lab.weights(513)], 6, gradient=lambda p: lab.gradient(p, -30, -15))


@case("hostile", "full", dtypes=(torch.float32, torch.float64, torch.bfloat16))
def huge_gradients(lab: Lab) -> None:
    """Gradients of 1e10 to 1e18, whose squares are near the largest float32"""
    lab.run([lab.weights(513)], 6, gradient=lambda p: lab.gradient(p, 10, 18))


@case("hostile", "full")
def zero_gradients(lab: Lab) -> None:
    """Gradients of zero, of either sign"""
    lab.run([lab.weights(65)], 3, gradient=lambda p: lab.gradient(p) * 0)


@case("hostile", "full", families=WITH_RATES)
def beta_zero(lab: Lab) -> None:
    """Decay rates of 0: no memory"""
    rates = FAMILIES[lab.family].every_rate(0.0)
    lab.run([lab.weights(513)], 4, lab.hyper(**rates))


@case("hostile", "full", families=WITH_RATES)
def beta_near_one(lab: Lab) -> None:
    """Decay rates of 0.9999"""
    rates = FAMILIES[lab.family].every_rate(0.9999)
    lab.run([lab.weights(513)], 20, lab.hyper(**rates))


@case("hostile", "full", families=WITH_EPS)
def eps_zero(lab: Lab) -> None:
    """eps 0"""
    lab.run([lab.weights(513)], 4, lab.hyper(eps=0.0))


@case("hostile", "full")
def lr_zero(lab: Lab) -> None:
    """lr 0: the states move, the parameters do not"""
    lab.run([lab.weights(513)], 4, lab.hyper(lr=0.0))


# ---- how it is called ----------------------------------------------------------------------------


def changing_lr(lab: Lab, **wanted: Any) -> None:
    p = lab.weights(129)
    walk = lab.walk(([p], lab.hyper(**wanted)))
    for t in range(4):
        walk.set_lr(0.01 / (t + 1))
        walk.step([lab.gradient(p)])


@case("hostile", "full")
def lr_schedule(lab: Lab) -> None:
    """The group's lr changes between steps, as schedulers change it"""
    changing_lr(lab)


@case("hostile", "full", families=("SGD", "RMSprop"))
def momentum_schedule(lab: Lab) -> None:
    """The same with momentum 0.9: the buffer holds no learning rate"""
    changing_lr(lab, momentum=0.9)


@case("hostile", "full")
def tensor_lr(lab: Lab) -> None:
    """lr is a tensor that changes in place"""
    p, hyper = lab.weights(129), lab.hyper(lr=0.01)
    lr: Any = torch.tensor(0.01, dtype=torch.float64)
    walk = lab.walk(([p], replace(hyper, lr=lr)))
    for t in range(3):
        lr.fill_(0.01 / (t + 1))
        walk.hypers = [replace(hyper, lr=float(lr))]
        walk.step([lab.gradient(p)])


@case("hostile", "full")
def closure(lab: Lab) -> None:
    """step(closure) calls it with gradients enabled and returns what it returned"""
    p = lab.weights(17)
    walk, g = lab.walk(([p], lab.hyper())), lab.gradient(p)
    said: list[Any] = []

    def how(optimizer: Optimizer) -> None:
        def loss() -> float:
            optimizer.zero_grad()
            need(torch.is_grad_enabled(), "the closure was called with gradients off")
            (p * g).sum().backward()
            return 0.25

        said.append(optimizer.step(loss))

    walk.step([g], how)
    need(said == [0.25], f"step(closure) returned {said[0]}, not what the closure returned")


@case("hostile", "full")
def gradients_untouched(lab: Lab) -> None:
    """A step does not write gradients"""
    params = [lab.weights(n) for n in (65, 8)]
    walk = lab.walk((params, lab.hyper(maximize=lab.spec.takes("maximize"))))
    for _ in range(2):
        grads = [lab.gradient(p) for p in params]
        before = [bits(g) for g in grads]
        walk.step(list(grads))
        need([bits(g) for g in grads] == before, "the step wrote the gradients")
        need(
            all(p.grad is g for p, g in zip(params, grads, strict=True)),
            "the step replaced the gradients",
        )


@case("hostile", "full")
def version_counter(lab: Lab) -> None:
    """A step moves the parameters' version counters, by which autograd notices that what it saved has changed"""
    p = lab.weights(65)
    before = p._version
    lab.run([p], 1)
    need(
        p._version > before,
        "the version counter stands still: autograd would use changed values unnoticed",
    )


@case("hostile", "full")
def grad_scaler(lab: Lab) -> None:
    """torch.amp.GradScaler: unscaled exactly; after an infinite gradient nothing has moved, no step count either"""
    p = lab.weights(129, dtype=torch.float32)
    walk = lab.walk(([p], lab.hyper()))
    scaler = torch.amp.GradScaler(lab.device, init_scale=1024.0, growth_interval=1000)
    scaler.scale(torch.ones((), device=lab.device))  # makes its tensors

    def how(optimizer: Optimizer) -> None:
        scaler.step(optimizer)
        scaler.update(1024.0)

    g = lab.gradient(p, -6, 2)
    walk.step([g], how, [g * 1024])
    kept = bits(p), _states(walk.optimizer, p)
    bad = lab.gradient(p, -6, 2) * 1024
    bad[77] = float("inf")
    p.grad = bad
    how(walk.optimizer)
    need(
        (bits(p), _states(walk.optimizer, p)) == kept,
        "after an infinite gradient something has moved",
    )
    g = lab.gradient(p, -6, 2)
    walk.step([g], how, [g * 1024])


def _states(optimizer: Optimizer, p: Tensor) -> list[bytes]:
    entry = optimizer.state.get(p) or {}
    return [bits(t) for _, t in sorted(entry.items()) if type(t) is Tensor]


# ---- checkpoints, copies, threads ----------------------------------------------------------------


def plain_steps(
    optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]
) -> None:
    """Steps without comparing. Raises Unsupported if the optimizer refuses."""
    for some in grads:
        plain_step(optimizer, params, [g.clone() for g in some])


def both_ways(lab: Lab, params: list[Tensor], other: Callable[..., Any]) -> None:
    """Goes on from a copy that ``other(optimizer, params)`` gives: it must go where the original goes, bit for bit."""
    grads = [[lab.gradient(p, -3, 1) for p in params] for _ in range(6)]
    optimizer = lab.spec.make(params, **lab.hyper().arguments(lab.family, lab.spec))
    plain_steps(optimizer, params, grads[:3])
    copies, copied = other(optimizer, params)
    plain_steps(optimizer, params, grads[3:])
    plain_steps(copied, copies, grads[3:])
    for p, q in zip(params, copies, strict=True):
        same = bits(p) == bits(q) and _states(optimizer, p) == _states(copied, q)
        need(same, "the copy goes another way than the original")


def saved_and_loaded(lab: Lab, optimizer: Optimizer, params: list[Tensor]) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [p.detach().clone().requires_grad_() for p in params]
    fresh = lab.spec.make(copies, **lab.hyper().arguments(lab.family, lab.spec))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return copies, fresh


@case("hostile", "full", "quick")
def save_and_load(lab: Lab) -> None:
    """state_dict, torch.save, torch.load, load_state_dict into a new optimizer: it continues bit for bit"""
    both_ways(lab, [lab.weights(65), lab.weights(4, 9)], partial(saved_and_loaded, lab))


@case("hostile", "full", dtypes=(torch.float32,))
def save_and_load_bfloat16(lab: Lab) -> None:
    """The same with bfloat16 parameters: the states keep their dtypes"""
    params = [lab.weights(65, dtype=torch.bfloat16)]
    both_ways(lab, params, partial(saved_and_loaded, lab))


@case("hostile", "full")
def deep_copy(lab: Lab) -> None:
    """copy.deepcopy of parameters and optimizer together continues bit for bit"""

    def copied(optimizer: Optimizer, params: list[Tensor]) -> Any:
        memo: dict[int, Any] = {}
        for p in params:
            p.grad = None
        return copy.deepcopy(params, memo), copy.deepcopy(optimizer, memo)

    both_ways(lab, [lab.weights(65), lab.weights(4, 9)], copied)


def final_bits(lab: Lab, threads: int) -> list[bytes]:
    """The bits after some steps from a fixed start, with so many threads."""
    lab.reseed()
    params = [lab.weights(n) for n in (100_003, 17, 1024)]
    grads = [[lab.gradient(p) for p in params] for _ in range(3)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        optimizer = lab.spec.make(params, **lab.hyper().arguments(lab.family, lab.spec))
        plain_steps(optimizer, params, grads)
    finally:
        torch.set_num_threads(before)
    return [bits(p) for p in params]


@case("hostile", "full")
def threads(lab: Lab) -> None:
    """The same bits on 1, 2 and 3 threads"""
    one = final_bits(lab, 1)
    for n in (2, 3):
        need(final_bits(lab, n) == one, f"other bits on {n} threads than on 1")


@case("hostile", "full")
def repeatable(lab: Lab) -> None:
    """The same bits again from the same start"""
    n = torch.get_num_threads()
    need(final_bits(lab, n) == final_bits(lab, n), "two runs from the same start differ")


@case("hostile", "full")
def sparse_gradient(lab: Lab) -> None:
    """A sparse gradient is refused before anything moves, or moves the parameter as its dense form does"""
    params = [lab.weights(5), lab.weights(40, 3)]
    walk = lab.run(params, 1)
    grads = [lab.gradient(p) for p in params]
    grads[1][2:] = 0
    walk.step(grads, given=[grads[0], grads[1].to_sparse(1)], refusable=True)


@case("hostile", "full")
def wrong_shape(lab: Lab) -> None:
    """A parameter whose data was replaced by another shape after a step is refused before anything moves"""
    params = [lab.weights(33), lab.weights(64)]
    optimizer = lab.spec.make(params, **lab.hyper().arguments(lab.family, lab.spec))
    plain_steps(optimizer, params, [[lab.gradient(p) for p in params]])
    p = params[1]
    p.grad = None
    p.data = torch.ones(32, dtype=p.dtype, device=p.device)
    kept = [bits(p) for p in params]
    try:
        plain_steps(optimizer, params, [[lab.gradient(p) for p in params]])
    except Unsupported as refusal:
        same = kept == [bits(p) for p in params]
        need(same, f"it raised when something had already moved: {refusal}")
        return
    entry = optimizer.state.get(p) or {}
    states = [s for s in entry.values() if isinstance(s, Tensor) and s.dim()]
    need(all(s.shape == p.shape for s in states), "it moved a parameter by states of another shape")
