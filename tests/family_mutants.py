"""SGD, Adagrad, Adadelta, RMSprop, NAdam, RAdam and Lion in plain torch, from the papers, right or with one fault.

``Lion(params)`` is right; ``Lion(params, mutation="one_beta")`` has the fault of that name in :data:`MUTATIONS`. What
looks for faults must pass the first and find each of the others. What goes wrong with layouts and
dtypes, ``mutants.py`` has.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MUTATIONS = {
    "SGD": (
        "first_gradient_dampened", "nesterov_by_old_buffer", "decoupled_decay", "maximized_decay",
        "buffer_of_undecayed_gradient", "lr_in_buffer",
    ),
    "Adagrad": ("eps_in_root", "lr_decay_from_0", "forgets", "starts_from_0", "lr_decays_twice"),
    "Adadelta": ("by_new_average", "eps_outside_roots", "lr_in_average", "average_of_gradients"),
    "RMSprop": ("eps_in_root", "uncentered", "lr_in_buffer", "mean_of_magnitudes"),
    "NAdam": ("product_late", "constant_momentum", "gradient_left_out", "coupled_decay", "eps_in_root"),
    "RAdam": ("never_rectified", "from_another_step", "eps_corrected", "uncorrected_mean"),
    "Lion": ("average_first", "one_beta", "coupled_decay", "zero_is_positive"),
}  # fmt: skip


class _Plain(Optimizer):
    """The loop; a rule is ``_move(group, t, p, g, state)``, which gives the new parameter."""

    def __init__(self, params: Any, mutation: str | None = None, **options: Any) -> None:
        if mutation is not None and mutation not in MUTATIONS[type(self).__name__]:
            raise ValueError(f"no mutation is called {mutation!r}")
        self.mutation = mutation
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = t = state.get("step", 0) + 1
                x, g = (_numbers(y) for y in (p, p.grad))
                moved = self._move(group, t, x, -g if group["maximize"] else g, state)
                p.copy_(torch.view_as_complex(moved) if p.is_complex() else moved)
        return loss

    def _has(self, *mutations: str) -> bool:
        return self.mutation in mutations

    def _move(self, o: dict[str, Any], t: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
        raise NotImplementedError


def _numbers(x: Tensor) -> Tensor:
    """A copy in at least float32, of pairs of real numbers where it is complex."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _zeros(state: Any, p: Tensor, *names: str) -> list[Tensor]:
    for name in names:
        state.setdefault(name, torch.zeros_like(p))
    return [state[name] for name in names]


class SGD(_Plain):
    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
        weight_decay: float = 0.0, nesterov: bool = False, maximize: bool = False,
        mutation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            params, mutation, lr=lr, momentum=momentum, dampening=dampening,
            weight_decay=weight_decay, nesterov=nesterov, maximize=maximize,
        )  # fmt: skip

    def _move(self, o: dict[str, Any], t: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
        lr, mu, wd, plain = o["lr"], o["momentum"], o["weight_decay"], g
        if self._has("decoupled_decay"):
            p = p - lr * wd * p
        elif self._has("maximized_decay") and o["maximize"]:
            g = g - wd * p
        else:
            g = g + wd * p
        if mu == 0:
            return p - lr * g
        into = plain if self._has("buffer_of_undecayed_gradient") else g
        into = lr * into if self._has("lr_in_buffer") else into
        (old,) = _zeros(state, p, "momentum_buffer")
        first = t == 1 and not self._has("first_gradient_dampened")
        new = into.clone() if first else mu * old + (1 - o["dampening"]) * into
        state["momentum_buffer"] = new
        ahead = old if self._has("nesterov_by_old_buffer") else new
        move = g + mu * ahead if o["nesterov"] else new
        return p - (move if self._has("lr_in_buffer") else lr * move)


class Adagrad(_Plain):
    def __init__(
        self, params: Any, lr: float = 1e-2, lr_decay: float = 0.0, weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0, eps: float = 1e-10, maximize: bool = False,
        mutation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            params, mutation, lr=lr, lr_decay=lr_decay, weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value, eps=eps, maximize=maximize,
        )  # fmt: skip

    def _move(self, o: dict[str, Any], t: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
        g = g + o["weight_decay"] * p
        begin = 0.0 if self._has("starts_from_0") else o["initial_accumulator_value"]
        old = state.get("sum", torch.full_like(p, begin))
        state["sum"] = total = (0.999 * old if self._has("forgets") else old) + g * g
        lr = o["lr"] / (1 + (t if self._has("lr_decay_from_0") else t - 1) * o["lr_decay"])
        lr = lr / (1 + (t - 1) * o["lr_decay"]) if self._has("lr_decays_twice") else lr
        if self._has("eps_in_root"):
            return p - lr * (g / (total + o["eps"]).sqrt())
        return p - lr * (g / (total.sqrt() + o["eps"]))


class Adadelta(_Plain):
    def __init__(
        self, params: Any, lr: float = 1.0, rho: float = 0.9, eps: float = 1e-6,
        weight_decay: float = 0.0, maximize: bool = False, mutation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            params, mutation, lr=lr, rho=rho, eps=eps, weight_decay=weight_decay, maximize=maximize
        )

    def _move(self, o: dict[str, Any], t: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
        rho, eps = o["rho"], o["eps"]
        g = g + o["weight_decay"] * p
        v, u = _zeros(state, p, "square_avg", "acc_delta")
        state["square_avg"] = v = rho * v + (1 - rho) * g * g
        if self._has("eps_outside_roots"):
            delta = (u.sqrt() + eps) / (v.sqrt() + eps) * g
        else:
            delta = (u + eps).sqrt() / (v + eps).sqrt() * g
        put = g if self._has("average_of_gradients") else delta
        put = o["lr"] * put if self._has("lr_in_average") else put
        state["acc_delta"] = u = rho * u + (1 - rho) * put * put
        if self._has("by_new_average"):
            delta = (u + eps).sqrt() / (v + eps).sqrt() * g
        return p - o["lr"] * delta


class RMSprop(_Plain):
    def __init__(
        self, params: Any, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8,
        weight_decay: float = 0.0, momentum: float = 0.0, centered: bool = False,
        maximize: bool = False, mutation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            params, mutation, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay,
            momentum=momentum, centered=centered, maximize=maximize,
        )  # fmt: skip

    def _move(self, o: dict[str, Any], t: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
        lr, alpha, eps = o["lr"], o["alpha"], o["eps"]
        g = g + o["weight_decay"] * p
        v, buf, mean = _zeros(state, p, "square_avg", "momentum_buffer", "grad_avg")
        state["square_avg"] = v = alpha * v + (1 - alpha) * g * g
        if o["centered"] and not self._has("uncentered"):
            put = g.abs() if self._has("mean_of_magnitudes") else g
            state["grad_avg"] = mean = mean + (1 - alpha) * (put - mean)
            v = (v - mean * mean).clamp_min(0)
        move = g / ((v + eps).sqrt() if self._has("eps_in_root") else v.sqrt() + eps)
        move = lr * move if self._has("lr_in_buffer") else move
        if o["momentum"]:
            state["momentum_buffer"] = move = o["momentum"] * buf + move
        return p - (move if self._has("lr_in_buffer") else lr * move)


class _Moments(_Plain):
    def __init__(
        self, params: Any, lr: float = 2e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.0, decoupled_weight_decay: bool = False,
        maximize: bool = False, mutation: str | None = None, **more: float,
    ) -> None:  # fmt: skip
        super().__init__(
            params, mutation, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay, maximize=maximize, **more,
        )  # fmt: skip

    def _moments(self, o: dict[str, Any], p: Tensor, g: Tensor, state: Any) -> tuple[Tensor, ...]:
        (beta1, beta2), wd = o["betas"], o["weight_decay"]
        if o["decoupled_weight_decay"] and not self._has("coupled_decay"):
            p = p - o["lr"] * wd * p
        else:
            g = g + wd * p
        m, v = _zeros(state, p, "exp_avg", "exp_avg_sq")
        state["exp_avg"] = m = m + (1 - beta1) * (g - m)
        state["exp_avg_sq"] = v = beta2 * v + (1 - beta2) * g * g
        return p, g, m, v


class NAdam(_Moments):
    def __init__(self, params: Any, momentum_decay: float = 4e-3, **options: Any) -> None:
        super().__init__(params, momentum_decay=momentum_decay, **options)

    def _move(self, o: dict[str, Any], t: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
        p, g, m, v = self._moments(o, p, g, state)
        (beta1, beta2), lr, eps = o["betas"], o["lr"], o["eps"]

        def mu(i: int) -> float:
            constant = self._has("constant_momentum")
            return beta1 if constant else beta1 * (1 - 0.5 * 0.96 ** (i * o["momentum_decay"]))

        product = math.prod(mu(i) for i in range(1, t + (not self._has("product_late"))))
        v_hat = v / (1 - beta2**t)
        root = (v_hat + eps).sqrt() if self._has("eps_in_root") else v_hat.sqrt() + eps
        if not self._has("gradient_left_out"):
            p = p - lr * (1 - mu(t)) / (1 - product + (product == 1)) * (g / root)
        return p - lr * mu(t + 1) / (1 - product * mu(t + 1)) * (m / root)


class RAdam(_Moments):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)

    def _move(self, o: dict[str, Any], t: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
        p, g, m, v = self._moments(o, p, g, state)
        (beta1, beta2), lr, eps = o["betas"], o["lr"], o["eps"]
        size = lr if self._has("uncorrected_mean") else lr / (1 - beta1**t)
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        if length <= (6 if self._has("from_another_step") else 5) or self._has("never_rectified"):
            return p - size * m
        r = math.sqrt(
            (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        )
        c = math.sqrt(1 - beta2**t)
        if self._has("eps_corrected"):
            return p - size * r * (m / (v.sqrt() / c + eps))
        return p - size * r * c * (m / (v.sqrt() + eps))


class Lion(_Plain):
    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0, maximize: bool = False, mutation: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            params, mutation, lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize
        )

    def _move(self, o: dict[str, Any], t: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
        (beta1, beta2), lr, wd = o["betas"], o["lr"], o["weight_decay"]
        (m,) = _zeros(state, p, "exp_avg")
        if self._has("coupled_decay"):
            g = g + wd * p
        new = m + (1 - (beta1 if self._has("one_beta") else beta2)) * (g - m)
        c = new if self._has("average_first") else m + (1 - beta1) * (g - m)
        sign = torch.where(c >= 0, 1.0, -1.0) if self._has("zero_is_positive") else c.sign()
        sign = torch.where(c.isnan(), c, sign)
        state["exp_avg"] = new
        return (p if self._has("coupled_decay") else p - lr * wd * p) - lr * sign
