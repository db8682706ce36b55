"""An AdamW that is right, and the same with one fault of a kind that real optimizers have had.

``AdamW(params)`` is plain torch, written from the papers (Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019,
arXiv:1711.05101; Reddi, Kale & Kumar 2018, arXiv:1904.09237). ``AdamW(params, mutation="lost_tail")`` has the fault of
that name in :data:`MUTATIONS`. What looks for faults must pass the first and find each of the others, also from
another process, by the name ``tests/mutants.py:AdamW[mutation="lost_tail"]``.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]
Pair = tuple[Tensor, Tensor]
Due = tuple[Group, Tensor, Tensor]  # a parameter that is to move: its group, itself, its gradient


class AdamW(Optimizer):
    """AdamW as in ``torch.optim``, with moments of at least float32 and one rounding of the parameter in a step.

    Args:
        params: parameters or groups of them: float32, float64, bfloat16, float16 or complex, of any strides.
        lr: a number, or a tensor with one.
        mutation: a name in :data:`MUTATIONS`, or ``None`` for none.

    Raises:
        ValueError: if an option is out of range, or there is no mutation of that name.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        *,
        mutation: str | None = None,
    ) -> None:
        if mutation is not None:
            if mutation not in _MUTANTS:
                raise ValueError(f"mutation must be a name in MUTATIONS; got {mutation!r}")
            self.__class__ = _MUTANTS[mutation]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr must be one number; got a tensor of shape {tuple(lr.shape)}")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative; got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and below 1; got {betas}")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options | {"amsgrad": amsgrad, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves all parameters that have a gradient, or raises RuntimeError before any has moved."""
        loss = None if closure is None else self.evaluate(closure)
        for group, p, grad in self.due():
            self.move(group, p, grad)
        return loss

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            return closure()

    def due(self) -> Iterable[Due]:
        every = ((group, p) for group in self.param_groups for p in group["params"])
        due = [(group, p, p.grad) for group, p in every if p.grad is not None]
        for _, p, grad in due:
            self.check(p, grad)
        return due

    def check(self, p: Tensor, grad: Tensor) -> None:
        if grad.layout is not torch.strided:
            raise RuntimeError(f"a gradient has layout {grad.layout}; expected a dense one")
        states = (t for key, t in self.state.get(p, {}).items() if key != "step")
        for t in (grad, *states):
            if t.shape != p.shape or t.is_complex() != p.is_complex():
                raise RuntimeError(
                    f"a gradient or state is {tuple(t.shape)} {t.dtype}; "
                    f"expected one like its parameter, {tuple(p.shape)} {p.dtype}"
                )

    def move(self, group: Group, p: Tensor, grad: Tensor) -> None:
        s, state = self.settings(group), self.state[p]
        state.setdefault("step", torch.zeros((), dtype=torch.float32))
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if s["amsgrad"] else 2]:
            if key not in state:
                state[key] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        t, dtype = self.advance(state), self.arithmetic(p)
        s["c1"], s["c2"] = (self.correction(beta, t) for beta in s["betas"])
        x, g, m, v = (self.read(a, dtype) for a in (p, grad, state["exp_avg"], state["exp_avg_sq"]))
        m, v = self.averages(p, m, v, self.gradient(g, x, s), s)
        self.write(state["exp_avg"], m)
        self.write(state["exp_avg_sq"], v)
        if s["amsgrad"]:
            v = self.largest(state["max_exp_avg_sq"], v, s)
        self.put(p, self.moved(x, m, v, s))

    def settings(self, group: Group) -> Group:
        return group | {"lr": float(group["lr"])}

    def advance(self, state: dict[str, Tensor]) -> int:
        return int(state["step"].add_(1))

    def arithmetic(self, p: Tensor) -> torch.dtype:
        return torch.float64 if p.dtype in (torch.float64, torch.complex128) else torch.float32

    def correction(self, beta: float, t: int) -> float:
        return 1 - beta**t

    def gradient(self, g: Tensor, x: Tensor, s: Group) -> Tensor:
        return -g if s["maximize"] else g

    def average(self, old: Tensor, new: Tensor, beta: float) -> Tensor:
        """Told from the nearer end, so that a rounding of the small weight is all that there is."""
        if beta < 0.5:
            return new + beta * (old - new)
        return old + (1 - beta) * (new - old)

    def averages(self, p: Tensor, m: Tensor, v: Tensor, g: Tensor, s: Group) -> Pair:
        (beta1, beta2), square = s["betas"], g * g
        finite = v.isfinite() & square.isfinite()  # infinities stay; their difference would be NaN
        sum_of_parts = beta2 * v + (1 - beta2) * square
        return self.average(m, g, beta1), self.average(v, square, beta2).where(finite, sum_of_parts)

    def largest(self, top: Tensor, v: Tensor, s: Group) -> Tensor:
        v = torch.maximum(self.read(top, v.dtype), v)
        self.write(top, v)
        return v

    def denominator(self, v: Tensor, s: Group) -> Tensor:
        root = v.double().sqrt().to(v.dtype)  # torch's float32 root is not rounded to nearest
        return root * (1 / math.sqrt(s["c2"])) + s["eps"]

    def moved(self, x: Tensor, m: Tensor, v: Tensor, s: Group) -> Tensor:
        change = s["lr"] / s["c1"] * (m / self.denominator(v, s))
        if decay := s["lr"] * s["weight_decay"]:
            change = (decay * x).masked_fill(x.isinf(), 0) + change  # inf - inf would be NaN
        return x - change

    def read(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers of ``t``, a complex one as two in a new last dimension."""
        return (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).to(dtype)

    def write(self, t: Tensor, x: Tensor) -> None:
        (torch.view_as_real(t) if t.is_complex() else t).copy_(x)

    def put(self, p: Tensor, x: Tensor) -> None:
        self.write(p, x)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a copy of the states, in the dtypes that they have; torch casts them to the parameter's."""
        final: dict[str, Any] = {}  # as the hooks of the user leave it
        last = self.register_load_state_dict_pre_hook(lambda _, given: final.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        ids = chain.from_iterable(group["params"] for group in final["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, p in zip(ids, params, strict=True):
            for key, t in final["state"].get(i, {}).items():
                t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float32)
                device = t.device if key == "step" else p.device
                self.state[p][key] = t.detach().to(device, copy=True)


_MUTANTS: dict[str, type[AdamW]] = {}

MUTATIONS: dict[str, str] = {}
"""What each fault is, by name."""


def mutation(method: str, what: str, **others: Any) -> Callable[[Callable[..., Any]], type[AdamW]]:
    """Makes a function an :class:`AdamW` that has it as ``method``, and ``others`` as further methods."""

    def make(function: Callable[..., Any]) -> type[AdamW]:
        name = function.__name__
        methods = {method: function} | others
        names = {"__module__": __name__, "__doc__": what}
        MUTATIONS[name], _MUTANTS[name] = what, type(name, (AdamW,), names | methods)
        return _MUTANTS[name]

    return make


# ---- the rule ------------------------------------------------------------------------------------


@mutation("correction", "the bias correction is that of the step before")
def step_behind(self: AdamW, beta: float, t: int) -> float:
    return AdamW.correction(self, beta, max(t - 1, 1))


@mutation("correction", "the bias correction is that of the next step")
def step_ahead(self: AdamW, beta: float, t: int) -> float:
    return AdamW.correction(self, beta, t + 1)


@mutation("correction", "there is no bias correction")
def no_bias_correction(self: AdamW, beta: float, t: int) -> float:
    return 1.0


@mutation("moved", "the decay comes after the update, and shrinks that too")
def decay_after_update(self: AdamW, x: Tensor, m: Tensor, v: Tensor, s: Group) -> Tensor:
    x = AdamW.moved(self, x, m, v, s | {"weight_decay": 0})
    return x - s["lr"] * s["weight_decay"] * x


@mutation("moved", "the decay is not multiplied by lr")
def decay_without_lr(self: AdamW, x: Tensor, m: Tensor, v: Tensor, s: Group) -> Tensor:
    return AdamW.moved(self, x, m, v, s | {"weight_decay": 0}) - s["weight_decay"] * x


def _without_decay(self: AdamW, group: Group) -> Group:
    return AdamW.settings(self, group) | {"weight_decay": 0, "l2": group["weight_decay"]}


@mutation(
    "gradient", "the decay is coupled (L2): it goes into the moments", settings=_without_decay
)
def l2_decay(self: AdamW, g: Tensor, x: Tensor, s: Group) -> Tensor:
    return AdamW.gradient(self, g, x, s) + s["l2"] * x


@mutation("denominator", "eps is added inside the root")
def eps_in_root(self: AdamW, v: Tensor, s: Group) -> Tensor:
    return (v / s["c2"] + s["eps"]).sqrt()


@mutation("denominator", "eps is added before the bias correction of the root")
def eps_before_correction(self: AdamW, v: Tensor, s: Group) -> Tensor:
    return AdamW.denominator(self, v, s | {"eps": s["eps"] / math.sqrt(s["c2"])})


@mutation("denominator", "the reciprocal root is approximated to 12 bits")
def approximate_root(self: AdamW, v: Tensor, s: Group) -> Tensor:
    digits, exponent = torch.frexp(1 / AdamW.denominator(self, v, s | {"eps": 0}))
    return 1 / torch.ldexp((digits * 2**12).round() / 2**12, exponent) + s["eps"]


@mutation("averages", "beta2 averages both moments")
def beta2_for_both(self: AdamW, p: Tensor, m: Tensor, v: Tensor, g: Tensor, s: Group) -> Pair:
    return AdamW.averages(self, p, m, v, g, s | {"betas": (s["betas"][1],) * 2})


@mutation("averages", "the second moment averages the square of the new first one")
def square_of_average(self: AdamW, p: Tensor, m: Tensor, v: Tensor, g: Tensor, s: Group) -> Pair:
    m, _ = AdamW.averages(self, p, m, v, g, s)
    return m, AdamW.averages(self, p, m, v, m, s)[1]


@mutation("average", "1 - beta is made of a beta that float32 has rounded")
def coefficient_in_float32(self: AdamW, old: Tensor, new: Tensor, beta: float) -> Tensor:
    return AdamW.average(self, old, new, float(torch.tensor(beta, dtype=torch.float32)))


@mutation("average", "with beta = 0 the moment stays as it was")
def beta_zero_kept(self: AdamW, old: Tensor, new: Tensor, beta: float) -> Tensor:
    return AdamW.average(self, old, new, beta) if beta else old


@mutation("settings", "a beta of 0 is taken for one not given")
def beta_zero_default(self: AdamW, group: Group) -> Group:
    beta1, beta2 = group["betas"]
    return AdamW.settings(self, group) | {"betas": (beta1 or 0.9, beta2 or 0.999)}


@mutation("settings", "an eps of 0 is taken for one not given")
def eps_zero_default(self: AdamW, group: Group) -> Group:
    return AdamW.settings(self, group) | {"eps": group["eps"] or 1e-8}


@mutation("moved", "with lr = 0 weights still decay, as with 1e-3")
def lr_zero_decays(self: AdamW, x: Tensor, m: Tensor, v: Tensor, s: Group) -> Tensor:
    moved = AdamW.moved(self, x, m, v, s)
    return moved if s["lr"] else moved - 1e-3 * s["weight_decay"] * x


@mutation("settings", "maximize is ignored")
def maximize_ignored(self: AdamW, group: Group) -> Group:
    return AdamW.settings(self, group) | {"maximize": False}


@mutation("largest", "amsgrad keeps the largest second moment and does not use it")
def amsgrad_unused(self: AdamW, top: Tensor, v: Tensor, s: Group) -> Tensor:
    AdamW.largest(self, top, v, s)
    return v


@mutation("largest", "amsgrad compares second moments after their bias correction")
def amsgrad_of_corrected(self: AdamW, top: Tensor, v: Tensor, s: Group) -> Tensor:
    return AdamW.largest(self, top, v / s["c2"], s) * s["c2"]


# ---- dtypes and special numbers ------------------------------------------------------------------


@mutation("arithmetic", "float64 parameters are computed in float32")
def float64_in_float32(self: AdamW, p: Tensor) -> torch.dtype:
    return torch.float32


@mutation("arithmetic", "bfloat16 parameters are computed in bfloat16")
def bfloat16_in_bfloat16(self: AdamW, p: Tensor) -> torch.dtype:
    return p.dtype if p.dtype == torch.bfloat16 else AdamW.arithmetic(self, p)


@mutation("arithmetic", "float16 parameters are computed in float16")
def float16_in_float16(self: AdamW, p: Tensor) -> torch.dtype:
    return p.dtype if p.dtype == torch.float16 else AdamW.arithmetic(self, p)


@mutation("moved", "the change of every parameter is rounded to float16")
def change_in_float16(self: AdamW, x: Tensor, m: Tensor, v: Tensor, s: Group) -> Tensor:
    return x + (AdamW.moved(self, x, m, v, s) - x).half().to(x.dtype)


@mutation("averages", "moments are rounded to bfloat16 in each step")
def bfloat16_moments(self: AdamW, p: Tensor, m: Tensor, v: Tensor, g: Tensor, s: Group) -> Pair:
    m, v = AdamW.averages(self, p, m, v, g, s)
    return m.bfloat16().to(m.dtype), v.bfloat16().to(v.dtype)


@mutation("averages", "the square of a complex gradient is that of its modulus")
def complex_modulus(self: AdamW, p: Tensor, m: Tensor, v: Tensor, g: Tensor, s: Group) -> Pair:
    size = (g * g).sum(-1, keepdim=True).sqrt().expand_as(g) if p.is_complex() else g
    return self.average(m, g, s["betas"][0]), AdamW.averages(self, p, m, v, size, s)[1]


@mutation("gradient", "a NaN in a gradient counts as 0")
def nan_dropped(self: AdamW, g: Tensor, x: Tensor, s: Group) -> Tensor:
    return AdamW.gradient(self, g, x, s).nan_to_num(0, math.inf, -math.inf)


@mutation("gradient", "an infinity in a gradient counts as the largest number")
def infinity_clamped(self: AdamW, g: Tensor, x: Tensor, s: Group) -> Tensor:
    return AdamW.gradient(self, g, x, s).nan_to_num(math.nan)


@mutation("due", "a step with a NaN or infinity in any gradient is left out")
def skipped_if_not_finite(self: AdamW) -> Iterable[Due]:
    due = list(AdamW.due(self))
    return due if all(bool(grad.isfinite().all()) for *_, grad in due) else []


@mutation("write", "subnormal numbers become 0")
def subnormals_flushed(self: AdamW, t: Tensor, x: Tensor) -> None:
    AdamW.write(self, t, x.masked_fill(x.abs() < torch.finfo(x.dtype).tiny, 0))


# ---- memory --------------------------------------------------------------------------------------


def _places(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), device=x.device).view(x.shape)


def _reach(t: Tensor) -> int:
    """How many elements of memory lie between the first and the last of ``t``, both counted."""
    return 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))


@mutation("put", "the last numel % 16 elements do not move")
def lost_tail(self: AdamW, p: Tensor, x: Tensor) -> None:
    moves = _places(x) < x.numel() // 16 * 16
    AdamW.put(self, p, x.where(moves, self.read(p, x.dtype)))


@mutation("put", "elements beyond the first 65,536 do not move")
def beyond_65536(self: AdamW, p: Tensor, x: Tensor) -> None:
    AdamW.put(self, p, x.where(_places(x) < 65_536, self.read(p, x.dtype)))


@mutation("put", "a parameter that is not contiguous moves in a copy that is lost")
def lost_copy(self: AdamW, p: Tensor, x: Tensor) -> None:
    AdamW.put(self, p.contiguous(), x)


@mutation("put", "a parameter is written as if it were contiguous")
def strides_ignored(self: AdamW, p: Tensor, x: Tensor) -> None:
    strides = torch.empty(p.shape, device="meta").stride()
    AdamW.put(self, p.as_strided(p.shape, strides, p.storage_offset()), x)


@mutation("put", "the number after the last of a view becomes 0")
def one_past_the_end(self: AdamW, p: Tensor, x: Tensor) -> None:
    AdamW.put(self, p, x)
    after = p.storage_offset() + p.numel()
    if p.is_contiguous() and after * p.element_size() < p.untyped_storage().nbytes():
        p.as_strided((1,), (1,), after).zero_()


@mutation("put", "a parameter gets new memory, and what shares the old one stays behind")
def parameter_replaced(self: AdamW, p: Tensor, x: Tensor) -> None:
    p.data = p.data.clone()
    AdamW.put(self, p, x)


@mutation("put", "the version counter, by which autograd notices changes, stands still")
def version_kept(self: AdamW, p: Tensor, x: Tensor) -> None:
    AdamW.put(self, p.data, x)


@mutation("move", "a gradient is read with the parameter's strides")
def memory_order(self: AdamW, group: Group, p: Tensor, grad: Tensor) -> None:
    if _reach(p) <= _reach(grad):
        grad = grad.as_strided(p.shape, p.stride())
    AdamW.move(self, group, p, grad)


@mutation("move", "an expanded gradient is read as if each of its elements had memory of its own")
def expanded_misread(self: AdamW, group: Group, p: Tensor, grad: Tensor) -> None:
    if grad.numel() > _reach(grad):
        memory = grad.as_strided((_reach(grad),), (1,))
        rest = memory.new_zeros(grad.numel() - _reach(grad))
        grad = torch.cat([memory, rest]).view(grad.shape)
    AdamW.move(self, group, p, grad)


@mutation("move", "the gradient is zero after the step")
def gradient_zeroed(self: AdamW, group: Group, p: Tensor, grad: Tensor) -> None:
    AdamW.move(self, group, p, grad)
    p.grad = torch.zeros_like(grad)


@mutation("move", "the gradient is multiplied in place by 1 - beta1")
def gradient_scaled(self: AdamW, group: Group, p: Tensor, grad: Tensor) -> None:
    AdamW.move(self, group, p, grad)
    grad.mul_(1 - group["betas"][0])


@mutation("move", "maximize turns the gradient round in place")
def gradient_negated(self: AdamW, group: Group, p: Tensor, grad: Tensor) -> None:
    if group["maximize"]:
        grad.neg_()
    AdamW.move(self, group | {"maximize": False}, p, grad)


# ---- groups, ages, checkpoints -------------------------------------------------------------------


@mutation("due", "only the first parameter of a group moves")
def first_parameter_only(self: AdamW) -> Iterable[Due]:
    return [row for row in AdamW.due(self) if row[1] is row[0]["params"][0]]


@mutation("due", "only the first group moves")
def first_group_only(self: AdamW) -> Iterable[Due]:
    return [row for row in AdamW.due(self) if row[0] is self.param_groups[0]]


@mutation("settings", "all groups have the lr of the first")
def first_group_lr(self: AdamW, group: Group) -> Group:
    return AdamW.settings(self, group) | {"lr": float(self.param_groups[0]["lr"])}


@mutation("settings", "the weight decay of a group is ignored for that of the constructor")
def group_decay_ignored(self: AdamW, group: Group) -> Group:
    return AdamW.settings(self, group) | {"weight_decay": self.defaults["weight_decay"]}


@mutation("settings", "the lr is read once, in the first step")
def lr_frozen(self: AdamW, group: Group) -> Group:
    s = AdamW.settings(self, group)
    return s | {"lr": group.setdefault("first_lr", s["lr"])}


@mutation("settings", "a tensor lr is read once, in the first step")
def tensor_lr_frozen(self: AdamW, group: Group) -> Group:
    s = AdamW.settings(self, group)
    kept = isinstance(group["lr"], Tensor)
    return s | {"lr": group.setdefault("first_lr", s["lr"])} if kept else s


@mutation("due", "a parameter without a gradient decays and ages, as with a gradient of 0")
def missing_as_zero(self: AdamW) -> Iterable[Due]:
    AdamW.due(self)
    every = [(group, p) for group in self.param_groups for p in group["params"]]
    return [(g, p, torch.zeros_like(p) if p.grad is None else p.grad) for g, p in every]


def _count(self: AdamW) -> Iterable[Due]:
    first = self.param_groups[0]
    first["step"] = first.get("step", 0) + 1
    return AdamW.due(self)


@mutation(
    "advance", "all parameters have one step count, also those that missed a step", due=_count
)
def shared_step(self: AdamW, state: dict[str, Tensor]) -> int:
    return int(state["step"].fill_(self.param_groups[0]["step"]))


@mutation("advance", "the step count is a bfloat16, which stands still at 256")
def step_in_bfloat16(self: AdamW, state: dict[str, Tensor]) -> int:
    state["step"] = state["step"].bfloat16()
    return AdamW.advance(self, state)


@mutation("load_state_dict", "a loaded optimizer begins again at step 1")
def step_lost_on_load(self: AdamW, state_dict: dict[str, Any]) -> None:
    AdamW.load_state_dict(self, state_dict)
    for state in self.state.values():
        state["step"].zero_()


@mutation("load_state_dict", "a loaded optimizer has options and no states")
def states_lost_on_load(self: AdamW, state_dict: dict[str, Any]) -> None:
    AdamW.load_state_dict(self, state_dict)
    self.state.clear()


@mutation("load_state_dict", "loaded moments are cast to the dtype of the parameter")
def moments_cast_on_load(self: AdamW, state_dict: dict[str, Any]) -> None:
    Optimizer.load_state_dict(self, state_dict)


# ---- behaviour -----------------------------------------------------------------------------------


@mutation("evaluate", "the loss of the closure is not returned")
def loss_lost(self: AdamW, closure: Callable[[], Any]) -> None:
    AdamW.evaluate(self, closure)


@mutation("evaluate", "the closure runs without gradients")
def closure_without_grad(self: AdamW, closure: Callable[[], Any]) -> Any:
    return closure()


@mutation("due", "a gradient is refused after the parameters before it have moved")
def refused_too_late(self: AdamW) -> Iterator[Due]:
    for group in self.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                self.check(p, p.grad)
                yield group, p, p.grad


@mutation("move", "an empty parameter ends the process")
def crash_on_empty(self: AdamW, group: Group, p: Tensor, grad: Tensor) -> None:
    if p.numel() == 0:
        os.abort()
    AdamW.move(self, group, p, grad)


@mutation("move", "a parameter without dimensions takes ten minutes")
def hang_on_scalar(self: AdamW, group: Group, p: Tensor, grad: Tensor) -> None:
    if p.dim() == 0:
        time.sleep(600)
    AdamW.move(self, group, p, grad)


@mutation("put", "the first element of each thread's share but the first is one ulp too large")
def noise_of_threads(self: AdamW, p: Tensor, x: Tensor) -> None:
    place, share = _places(x), -(-x.numel() // torch.get_num_threads()) or 1
    exact = (place % share != 0) | (place == 0)
    AdamW.put(self, p, x.where(exact, x.nextafter(torch.full_like(x, math.inf))))


@mutation("put", "one element in a hundred, at random, is one ulp too large")
def noise_at_random(self: AdamW, p: Tensor, x: Tensor) -> None:
    source = torch.Generator()
    source.seed()
    exact = torch.rand(x.shape, generator=source) > 0.01
    AdamW.put(self, p, x.where(exact, x.nextafter(torch.full_like(x, math.inf))))
