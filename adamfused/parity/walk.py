"""Steps an optimizer and compares every step, element by element, with the exact one from the same state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import formats
from ..optimizer import FusedOptimizer
from ..spec import Spec, Unsupported, first_line
from ..storage import MASTER, scale_key, weight
from . import arithmetic, exact
from .arithmetic import Array
from .exact import Hyper, Parts

# The least share of 16-bit results that are the nearest to the exact one. The rest, where the float32 in between was
# rounded the other way, must be neighbours. float16 has more digits, so a tie in float32 is less rare.
NEAREST = {torch.bfloat16: 0.999, torch.float16: 0.995}

# Free-running limits of a float32 run of so many steps: root mean square error of the parameter over the way it went,
# and of the second moment, relative. torch.optim stays within them, an accurate form within a tenth.
DRIFT = {100: (2e-5, 40 * 2.0**-24), 10_000: (1e-4, 400 * 2.0**-24)}
FREE = 1e-4  # of a single element after few steps: five times the root mean square
DRIFT_DOUBLE = (1e-12, 1e-10)  # after 100 steps, and later

ULP_EDGES = (0.5, 1, 2, 4, 8, 16, 32, 64)
"""Upper edges of the histogram of the parameters' errors, in units in the last place; one more bin is open."""

# The oracle's own float64 errors are 2^-29 of a float32 bound, times what cancellation makes of them.
SLACK = 1 + 1e-6


class Fail(Exception):
    """What is wrong, in one line."""


def numbers(t: Tensor) -> Array:
    """All real numbers of a tensor in float64, in the order of its indices; a complex element gives two."""
    t = t.detach().resolve_conj()
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.cpu().double().reshape(-1).numpy().copy()


def weight_of(optimizer: Optimizer, p: Tensor) -> tuple[Tensor, float]:
    """The parameter, or the float32 weight that adamfused keeps the rest of beside it; and how much of it was rounded
    away, where the two together have 16 significant bits."""
    master = (optimizer.state.get(p) or {}).get(MASTER)
    if master is None or not isinstance(optimizer, FusedOptimizer):
        return p, 0.0
    return weight(p, master), 2.0**-16 if master.dtype == torch.int8 else 0.0


def bits(t: Tensor) -> bytes:
    """The bytes of all elements, in the order of the indices."""
    t = t.detach().resolve_conj().cpu()
    t = t.view(torch.int16) if t.dtype == torch.bfloat16 else t  # which numpy does not know
    return t.numpy().tobytes()


@dataclass
class State:
    """A state as it was found: its numbers, and whether its rounding can be judged (a quantised one's cannot)."""

    values: Array
    dtype: torch.dtype
    judged: bool


def states_of(optimizer: Optimizer, p: Tensor, family: str, h: Hyper) -> dict[str, State] | None:
    """The states of a parameter by torch's names, or ``None`` if it has states and not all that it uses can be read."""
    entry = optimizer.state.get(p) or {}
    found = {}
    states = exact.FAMILIES[family].states
    for name, others in states.items():
        for alias in (name, *others):
            t = entry.get(alias) if isinstance(entry, Mapping) else None
            if not isinstance(t, Tensor) or t.shape != p.shape:
                continue
            plain = type(t) in (Tensor, torch.nn.Parameter)
            if not plain and hasattr(t, "dequantize"):
                t = t.dequantize()
            elif t.dtype in formats.CODES and scale_key(alias) in entry:
                t, plain = formats.get(t, torch.float32, entry[scale_key(alias)]), False
            if t.is_complex() == p.is_complex() and (t.is_complex() or t.is_floating_point()):
                found[name] = State(numbers(t), t.dtype, plain)
                break
    used = {"max_exp_avg_sq": h.amsgrad, "momentum_buffer": h.momentum, "grad_avg": h.centered}
    needed = [name for name in states if used.get(name, True)]
    return found if not entry or all(name in found for name in needed) else None


@dataclass
class Place:
    """An element, and everything about it."""

    part: str
    tensor: int
    index: int
    step: int
    got: float
    exact: float
    limit: float
    before: dict[str, float]
    after: dict[str, float]
    of: str

    def __str__(self) -> str:
        before, after = (
            ", ".join(f"{name} {value:.9g}" for name, value in values.items())
            for values in (self.before, self.after)
        )
        return (
            f"{self.part} [{self.index}] of tensor {self.tensor} at step {self.step}: got {self.got:.9g}, "
            f"{self.of} {self.exact:.9g}, allowed {self.limit:.3g} off (before: {before}; after: {after})"
        )


@dataclass
class Found:
    """What a walk has found so far."""

    ratio: float = 0.0  # the largest error over its bound
    worst: Place | None = None
    ulps: list[int] = field(default_factory=lambda: [0] * (len(ULP_EDGES) + 1))
    count: int = 0  # results judged, of parameters
    nearest: int = 0  # of them, the correctly rounded ones
    shares: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # of 16-bit parts: (nearest, all)
    free: str = ""  # why steps were not compared from equal state, if they were not


class Walk:
    """An optimizer on its way.

    Args:
        spec: what to test.
        family: its rule, see :data:`adamfused.spec.FAMILIES`.
        groups: (parameters, hyper-parameters) of each group.
        found: where errors are noted.
        twin: another optimizer to compare with instead of float64.
        same_bits: whether the twin's bits must be met.
    """

    def __init__(
        self,
        spec: Spec,
        family: str,
        groups: Sequence[tuple[Sequence[Tensor], Hyper]],
        found: Found,
        twin: Spec | None = None,
        same_bits: bool = False,
    ) -> None:
        self.spec, self.family, self.found, self.same_bits = spec, family, found, same_bits
        self.params = [p for params, _ in groups for p in params]
        self.hypers = [h for params, h in groups for _ in params]
        self.ages = [0] * len(self.params)
        self.exact = [{"param": numbers(p)} for p in self.params]
        self.paths = [np.zeros(len(x["param"])) for x in self.exact]
        self.optimizer = self._make(spec, [list(params) for params, _ in groups], groups)
        self.twins = [_copy(p) for p in self.params]
        self.twin: Optimizer | None = None
        if twin is not None:
            rest = iter(self.twins)
            copies = [[next(rest) for _ in params] for params, _ in groups]
            try:
                self.twin = self._make(twin, copies, groups)
            except Unsupported as refusal:
                raise Unsupported(f"the other, {twin}: {refusal}") from refusal

    def _make(
        self, spec: Spec, params: list[list[Tensor]], groups: Sequence[tuple[Any, Hyper]]
    ) -> Optimizer:
        hypers = [h.arguments(self.family, self.spec) for _, h in groups]
        if len(groups) == 1:
            return spec.make(params[0], **hypers[0])
        entries = [
            {"params": some} | {k: v for k, v in h.items() if k not in spec.options}
            for some, h in zip(params, hypers, strict=True)
        ]
        return spec.make(entries, **hypers[0])

    def add_group(self, p: Tensor) -> None:
        """Adds a group of one parameter, with the first group's hyper-parameters."""
        self.optimizer.add_param_group({"params": [p]})
        self.twins.append(_copy(p))
        if self.twin is not None:
            self.twin.add_param_group({"params": self.twins[-1:]})
        self.params.append(p)
        self.hypers.append(self.hypers[0])
        self.ages.append(0)
        self.exact.append({"param": numbers(p)})
        self.paths.append(np.zeros(len(numbers(p))))

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of all groups."""
        self.hypers = [replace(h, lr=lr) for h in self.hypers]
        for optimizer in (self.optimizer, self.twin):
            for group in optimizer.param_groups if optimizer is not None else ():
                group["lr"] = lr

    def step(
        self,
        grads: Sequence[Tensor | None],
        how: Callable[[Optimizer], object] | None = None,
        given: Sequence[Tensor | None] | None = None,
        refusable: bool = False,
    ) -> None:
        """Gives every parameter its gradient, steps, and compares.

        Args:
            grads: one per parameter, as the rule is to see it; ``None`` for a parameter that is to stay.
            how: what makes the step, if not ``optimizer.step()``.
            given: what the gradients are set to, if not ``grads``.
            refusable: whether it may refuse though it made steps before.

        Raises:
            Unsupported: if the optimizer refused, and no parameter had moved.
            Fail: if it raised after one had moved, or moved one that has no gradient.
        """
        pairs = zip(self.params, self.hypers, strict=True)
        known = [states_of(self.optimizer, p, self.family, h) for p, h in pairs]
        before = [numbers(weight_of(self.optimizer, p)[0]) for p in self.params]
        kept = [bits(p) for p in self.params]
        old = self._kept_states()
        seen = [None if g is None else numbers(g) for g in grads]
        for p, g in zip(self.params, given or grads, strict=True):
            give_gradient(p, g)
        try:
            how(self.optimizer) if how else self.optimizer.step()
        except Fail:
            raise
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {first_line(error)}"
            if sum(self.ages) and not refusable:
                raise Fail(f"it raised after {max(self.ages)} steps: {said}") from error
            if [bits(p) for p in self.params] != kept or self._kept_states(old) != old:
                raise Fail(f"it raised when something had already moved: {said}") from error
            raise Unsupported(said) from error
        others = [numbers(q) for q in self.twins]
        if self.twin is not None:
            for q, g in zip(self.twins, grads, strict=True):
                give_gradient(q, None if g is None else g.clone())
            try:
                self.twin.step()
            except (Exception, SystemExit) as error:
                raise Unsupported(
                    f"the other raised {type(error).__name__}: {first_line(error)}"
                ) from error
        for i, g64 in enumerate(seen):
            if g64 is None:
                if bits(self.params[i]) != kept[i]:
                    raise Fail(f"tensor {i} has no gradient and moved")
                continue
            self.ages[i] += 1
            if self.twin is not None:
                self._compare_with_twin(i, g64, others[i])
            else:
                self._compare_with_exact(i, g64, before[i], known[i])

    def _kept_states(
        self, like: Collection[tuple[int, str]] | None = None
    ) -> dict[tuple[int, str], bytes]:
        """The bits of every plain state, by parameter and name; ``like``: only of those there."""
        return {
            (i, str(name)): bits(value)
            for i, p in enumerate(self.params)
            for name, value in (self.optimizer.state.get(p) or {}).items()
            if type(value) is Tensor and (like is None or (i, str(name)) in like)
        }

    def _compare_with_exact(
        self, i: int, g: Array, p: Array, known: dict[str, State] | None
    ) -> None:
        h, t, to = self.hypers[i], self.ages[i], arithmetic.precision(self.params[i].dtype)
        after = states_of(self.optimizer, self.params[i], self.family, h)
        if t > 1 and (known is None or after is None):
            self.found.free = "its states cannot be read"
        if t > 1 and self.found.free:
            return self._compare_with_path(i, g, h)
        parts = exact.start(self.family, h, p)
        parts |= {name: state.values for name, state in (known or {}).items()}
        with np.errstate(all="ignore"):
            wanted = exact.step(self.family, h, t, g, parts)
            limits = exact.bounds(self.family, h, t, g, parts, to)
            self.paths[i] += np.abs(wanted["param"] - p)
        self.exact[i] = wanted
        moved, lost = weight_of(self.optimizer, self.params[i])
        if lost:
            limits["param"] = limits["param"] + lost * np.abs(wanted["param"])
        self._judge(i, "param", moved.dtype, numbers(moved), wanted, limits, parts, g)
        if t == 1 and self.found.ratio <= 1 and _other_meaning(after or {}, wanted, limits):
            self.found.free = "its states are not the rule's running averages"
        for name, state in (after or {}).items():
            if state.judged and not self.found.free:
                self._judge(i, name, state.dtype, state.values, wanted, limits, parts, g)

    def _judge(
        self,
        i: int,
        part: str,
        dtype: torch.dtype,
        got: Array,
        all_wanted: Parts,
        all_limits: Parts,
        parts: Parts,
        g: Array,
    ) -> None:
        slack = 2 if arithmetic.precision(dtype) is arithmetic.DOUBLE else SLACK
        wanted, limit = all_wanted[part], all_limits[part] * slack
        is_half = dtype in NEAREST
        with np.errstate(all="ignore"):
            largest = float(torch.finfo(dtype).max)
            wanted = np.where(np.abs(wanted) > largest, np.copysign(np.inf, wanted), wanted)
            nearest = arithmetic.nearest16(wanted, dtype) if is_half else _rounded(wanted, dtype)
            error = np.abs(got - wanted)
            same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
            good = same | (got == nearest)
            if is_half:
                spacing = arithmetic.spacing16(wanted, dtype)
                good |= error <= 0.5 * spacing + limit  # a tie that float32 told the other way
                limit = limit + spacing
            ratio = np.where(same, 0.0, error / limit)
            # NaN where a number is due, or a number where NaN is due; a limit that is infinite allows all.
            ratio = np.where(np.isnan(ratio), np.where(np.isinf(limit), 0.0, np.inf), ratio)
            # A state that has been infinite stays so, or becomes NaN, as the average is written.
            for values in (*parts.values(), g):
                if not np.isfinite(values).all():
                    lost = ~np.isfinite(values)
                    ratio = np.where(lost & ~np.isfinite(got), 0.0, ratio)
            ratio = np.where(np.isnan(wanted) & np.isfinite(got), np.inf, ratio)
        if part == "param":
            self._count_ulps(error, wanted, dtype)
            self.found.count += len(got)
            self.found.nearest += int(np.sum((got == nearest) | same))
        if is_half:
            count, total = self.found.shares.get(str(dtype), (0, 0))
            self.found.shares[str(dtype)] = count + int(good.sum()), total + len(got)
        self._note(i, part, ratio, got, wanted, limit, parts, g)

    def _count_ulps(self, error: Array, wanted: Array, dtype: torch.dtype) -> None:
        finite = np.isfinite(wanted) & np.isfinite(error)
        ulps = error[finite] / arithmetic.spacing(wanted[finite], dtype)
        places = np.searchsorted(ULP_EDGES, ulps / SLACK)
        for place, count in zip(*np.unique(places, return_counts=True), strict=True):
            self.found.ulps[int(place)] += int(count)

    def _note(
        self,
        i: int,
        part: str,
        ratio: Array,
        got: Array,
        wanted: Array,
        limit: Array,
        parts: Parts,
        g: Array,
    ) -> None:
        """Keeps the worst element of the first step that is wrong: what comes after follows from it."""
        worst = self.found.worst
        if not len(ratio) or ratio.max() <= self.found.ratio:
            return
        if worst is not None and self.found.ratio > 1 and self.ages[i] > worst.step:
            return
        at = int(ratio.argmax())
        before = {name: x[at] for name, x in parts.items() if name == "param" or x.any()}
        before = {name: float(x) for name, x in (before | {"grad": g[at]}).items()}
        values = float(got[at]), float(wanted[at]), float(limit[at])
        self.found.ratio = float(ratio[at])
        of = "exact" if self.twin is None else "the other's"
        states = states_of(self.optimizer, self.params[i], self.family, self.hypers[i]) or {}
        after = {"param": float(numbers(self.params[i])[at])}
        after |= {name: float(state.values[at]) for name, state in states.items()}
        self.found.worst = Place(part, i, at, self.ages[i], *values, before, after, of)

    def _compare_with_path(self, i: int, g: Array, h: Hyper) -> None:
        """Where the states cannot be read: the free-running limit after few steps, of the whole tensor."""
        before = self.exact[i]
        with np.errstate(all="ignore"):
            self.exact[i] = wanted = exact.step(self.family, h, self.ages[i], g, before)
            self.paths[i] += np.abs(wanted["param"] - before["param"])
            got, way = numbers(self.params[i]), self.paths[i]
            ulp = arithmetic.spacing(wanted["param"], self.params[i].dtype)
            limit = 1.5 * self.ages[i] * ulp + FREE * way
            ratio = np.abs(got - wanted["param"]) / limit
            missing = np.isnan(wanted["param"]) != np.isnan(got)
            ratio = np.where(missing, np.inf, np.where(np.isnan(ratio), 0.0, ratio))
        self._note(i, "param", ratio, got, wanted["param"], limit, before, g)

    def _compare_with_twin(self, i: int, g: Array, p: Array) -> None:
        """With another optimizer, both running free: either may round what :func:`exact.bounds` allows, every step."""
        mine, other = numbers(self.params[i]), numbers(self.twins[i])
        dtype = self.params[i].dtype
        with np.errstate(all="ignore"):
            self.paths[i] += np.abs(other - p)
            ulp = arithmetic.spacing(other, dtype)
            limit = 3 * self.ages[i] * ulp + FREE * self.paths[i]
            error = np.abs(mine - other)
            same = (mine == other) & (np.signbit(mine) == np.signbit(other))
            same |= np.isnan(mine) & np.isnan(other)
            ratio = np.where(same, 0.0, np.where(np.isnan(error), np.inf, error / limit))
            if self.same_bits:
                ratio = np.where(same, 0.0, np.inf)
        self._count_ulps(np.where(same, 0.0, error), other, dtype)
        self.found.count += len(mine)
        self.found.nearest += int(same.sum())
        self._note(i, "param", ratio, mine, other, limit, {"param": p}, g)


def _other_meaning(states: Mapping[str, State], wanted: Parts, limits: Parts) -> bool:
    """Whether most elements of a state are more than a tenth off: it is something else, bias-corrected say."""
    for name, state in states.items():
        known = np.isfinite(wanted[name]) & (wanted[name] != 0)
        with np.errstate(invalid="ignore"):
            error = np.abs(state.values - wanted[name])
        # Where squares underflow, a state of 0 is right.
        off = (error > 0.1 * np.abs(wanted[name])) & (error > limits[name])
        if state.judged and known.any() and np.median(off[known]) > 0.5:
            return True
    return False


def plain_step(optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """A step that is not compared. Raises Unsupported if the optimizer refuses."""
    for p, g in zip(params, grads, strict=True):
        give_gradient(p, g)
    try:
        optimizer.step()
    except (Exception, SystemExit) as error:
        raise Unsupported(f"{type(error).__name__}: {first_line(error)}") from error


def _copy(p: Tensor) -> Tensor:
    return p.detach().clone().requires_grad_()


def give_gradient(p: Tensor, grad: Tensor | None) -> None:
    """Sets ``p.grad``, of whatever dtype."""
    p.grad = None
    if grad is not None and grad.dtype != p.dtype:
        p.grad_dtype = grad.dtype
    p.grad = grad


def _rounded(x: Array, dtype: torch.dtype) -> Array:
    return x if dtype.to_real() == torch.float64 else x.astype(np.float32).astype(np.float64)
