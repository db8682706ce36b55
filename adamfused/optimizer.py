"""The step: gather, make state, one call. An optimizer itself is a rule's name, its hyper-parameters and the names of
its states (see :mod:`adamfused.adam`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend, memory, reference
from .base import as_number
from .checkpoints import Checkpoints
from .clip import Clipping
from .formats import Random
from .norm import coefficient
from .plan import Plan
from .rules import CARRIED, Now
from .shards import first_flat
from .states import Randomness, States
from .storage import EMA, MASTER, MASTERS, STEP, scale_key


class FusedOptimizer(States, Clipping, Checkpoints):
    """A ``torch.optim.Optimizer`` whose step is one call for all parameters.

    A subclass gives `_plan` and the class attributes of :class:`adamfused.base.BaseOptimizer`, and passes torch's own
    defaults to ``__init__``.
    """

    def memory_summary(self) -> memory.MemorySummary:
        """The bytes that parameters, gradients, states and copies take, and those that a step moves, by kind of tensor.

        Told from the dtypes of the states, or of those that the first step will make. Of sharded parameters it is what
        this rank holds. ``print`` shows a table.

        Example:
            >>> import torch, adamfused
            >>> weight = torch.nn.Parameter(torch.ones(1024, 1024, dtype=torch.bfloat16))
            >>> optimizer = adamfused.AdamW([weight], master_weights="split16", state_dtype="int8")
            >>> print(optimizer.memory_summary())
            Memory of 1,048,576 parameters
            <BLANKLINE>
                           resident              moved
                        B/parameter    MB  B/parameter     MB
            ----------  -----------  ----  -----------  -----
            parameter          2.00  2.10         4.00   4.19
            gradient           2.00  2.10         2.00   2.10
            exp_avg            1.00  1.05         2.00   2.10
            exp_avg_sq         1.00  1.05         2.00   2.10
            master             2.00  2.10         4.00   4.19
            scales             0.06  0.07         0.12   0.13
            total              8.06  8.45        14.12  14.81
        """
        return memory.summary(self)

    # Not under torch.no_grad() as a whole: the kernels do not need it, and an interrupt (Ctrl-C) that arrives while
    # its Python code sets the mode back would leave gradients off for the rest of the process.
    def step(
        self, closure: Callable[[], Any] | None = None, *, grad_norm: Tensor | None = None
    ) -> Any:
        """Moves every parameter that has a gradient.

        Args:
            closure: called first, with gradients enabled, to compute the loss and the gradients.
            grad_norm: the norm to clip by, one number, in place of that of this optimizer's gradients; from
                :func:`adamfused.grad_norm`, for several optimizers that clip by one norm. Needs ``max_grad_norm``.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            RuntimeError: if a parameter, gradient or state cannot be used, naming it and what to do. No parameter
                of any group has then moved.
        """
        if grad_norm is not None and (closure is not None or self.max_grad_norm is None):
            raise ValueError(
                "grad_norm was given to step() "
                + (
                    "with a closure, which makes other gradients; expected one of them"
                    if closure is not None
                    else "of an optimizer that does not clip; expected one that has max_grad_norm"
                )
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() and self._is_traceable():
            self._traced_step(grad_norm)
        else:
            try:
                self._eager_step(self.param_groups, grad_norm)
            except (
                BaseException
            ):  # a GradScaler takes back what it has set only if the step is made
                self.__dict__.pop("grad_scale", None)
                self.__dict__.pop("found_inf", None)
                raise
        return loss

    @torch._disable_dynamo
    def _eager_step(
        self,
        groups: Sequence[dict[str, Any]],
        grad_norm: Tensor | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        """The step of these groups, which may also be parts of this optimizer's own: ``places`` then tells where each
        begins among all parameters."""
        self._check_capture()
        if self._swapped:
            raise RuntimeError(
                f"{type(self).__name__}: step() inside of swap_ema(), which has put averaged weights in the place of "
                "the trained ones; expected evaluation only; step after it"
            )
        choice, native = backend.chosen(self._options.backend)
        factor = self._gradient_factor(groups, native, grad_norm)
        found_inf = self._found_inf(groups)
        if found_inf is True:
            return
        begun = self._begin_averages(groups)
        try:
            self._move(groups, places or self._places(), choice, native, factor, found_inf)
        except BaseException:
            for state in begun:
                state.pop(EMA)
            raise
        if groups is self.param_groups:
            self._averages_begun = True

    def _move(
        self,
        groups: Sequence[dict[str, Any]],
        places: Sequence[int],
        choice: str,
        native: Any,
        factor: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        plans = [self._full_plan(group) for group in groups]
        randoms = [self._randomness(g, place) for g, place in zip(groups, places, strict=True)]
        decays: dict[float, float] = {}  # by step count, where the reference asks

        def init(j: int, i: int) -> None:
            p = groups[j]["params"][i]
            self._check(p, groups[j], plans[j], only_tensors=True)
            self.state[p] = self._new_state(p, groups[j], plans[j])

        def judge(j: int, i: int) -> list[Tensor | None] | None:
            return self._judge(groups[j]["params"][i], groups[j], plans[j], choice)

        if native is not None:
            rows = [self._row(native, *each) for each in zip(groups, plans, randoms, strict=True)]
            left = native.step(self.state, rows, init, judge, factor, found_inf)
        else:
            left = self._ready_for_reference(groups, plans, init, decays)
        if left and not (found_inf is not None and bool(found_inf)):
            self._reference_step(groups, plans, randoms, left, factor, decays)

    @torch.no_grad()
    def _reference_step(
        self,
        groups: Sequence[dict[str, Any]],
        plans: Sequence[Plan],
        randoms: Sequence[Randomness | None],
        places: Sequence[tuple[int, int]],
        factor: Tensor | None,
        decays: dict[float, float],
    ) -> None:
        scale = 1.0 if factor is None else float(factor)
        for j, i in places:
            plan = plans[j]
            parts = self._parts(groups[j]["params"][i], plan)
            after, carried_after = parts.step + 1, None
            t = float(after)
            if parts.carried is not None:
                number = CARRIED[plan.rule](plan.hyper, t, float(parts.carried))
                carried_after = torch.tensor(number, dtype=parts.carried.dtype)
            if t not in decays:
                decays[t] = self._ema_decay_at(t)
            carried = 1.0 if carried_after is None else float(carried_after)
            now = Now(as_number(groups[j]["lr"]), t, scale, decays[t], carried)
            random = None
            if (drawn := randoms[j]) is not None:
                random = Random.at_step(drawn.place_keys[i], t, drawn.firsts[i])
            reference.step(
                plan.rule,
                plan.hyper,
                now,
                parts.param,
                parts.grad,
                parts.states,
                parts.copy,
                master=parts.master,
                scales=parts.scales,
                random=random,
                stochastic=drawn is not None and drawn.stochastic,
            )
            parts.step.copy_(after)
            if parts.carried is not None and carried_after is not None:
                parts.carried.copy_(carried_after)

    def _ready_for_reference(
        self,
        groups: Sequence[dict[str, Any]],
        plans: Sequence[Plan],
        init: Callable[[int, int], None],
        decays: dict[float, float],
    ) -> list[tuple[int, int]]:
        """Makes states and checks everything, as the native step does. Returns the places of what is to move."""
        places = [
            (j, i)
            for j, group in enumerate(groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None
        ]
        before: dict[Tensor, Any] = {}
        try:
            for j, i in places:
                p = groups[j]["params"][i]
                if not self.state.get(p):
                    before[p] = dict.get(self.state, p)
                    init(j, i)
                self._begin_late(p, groups[j], plans[j])
                self._check(p, groups[j], plans[j])
                t = float(self.state[p][STEP] + 1)
                if t not in decays:
                    decays[t] = self._ema_decay_at(t)
        except BaseException:
            for p, entry in before.items():
                self.state.pop(p, None)
                if entry is not None:
                    self.state[p] = entry
            raise
        return places

    def _is_traceable(self) -> bool:
        """Whether torch.compile can trace the step; else it breaks the graph there."""
        return (
            backend.choose(self._options.backend) != "reference"
            and not callable(self._options.ema_decay)
            and not self._options.error_if_nonfinite
            and getattr(self, "found_inf", None) is None
            and not self._swapped
            and (self.max_grad_norm is None or first_flat(p for _, _, p in self._each()) is None)
        )

    @torch.no_grad()
    def _traced_step(self, grad_norm: Tensor | None) -> None:
        gathered: list[Any] = []
        for group in self.param_groups:
            lists: tuple[list[Any], ...] = ([], [], [], [], [], [], [], [], [])
            self._init_group(group, *lists)
            if lists[0]:
                gathered.append((group, self._full_plan(group), *lists))
        factor = None
        max_norm = self._options.max_grad_norm
        if max_norm is not None:
            total = grad_norm
            if total is None and not gathered:
                total = torch.zeros((), dtype=torch.float64)
            if total is None:
                largest = self._options.norm_type == float("inf")
                all_params = [p for _, _, params, *_ in gathered for p in params]
                all_grads = [g for _, _, _, grads, *_ in gathered for g in grads]
                total = torch.ops.adamfused.gradient_norm(all_params, all_grads, largest)
            self._results["grad_norm"] = total.to(self._norm_dtype())
            factor = coefficient(total.double(), max_norm)
        for (
            group,
            plan,
            params,
            grads,
            states,
            counts,
            carried,
            masters,
            scales,
            keys,
            firsts,
        ) in gathered:
            lr = group["lr"]
            on_device = isinstance(lr, Tensor)
            coded = any(scale is not None for scale in scales)
            torch.ops.adamfused.step_(
                params,
                grads,
                states,
                counts,
                [self._copies[p] for p in params] if self._copies else [],
                masters,
                [params[0].new_empty(0) if s is None else s for s in scales] if coded else [],
                carried,
                plan.rule,
                plan.hyper,
                0.0 if on_device else lr,
                lr if on_device else None,
                self._options.ema_decay,
                factor,
                group.get("stochastic_rounding", False),
                keys,
                firsts,
            )

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        counts: list[Tensor],
        carried: list[Tensor],
        masters: list[Tensor],
        scales: list[Tensor | None],
        place_keys: list[int],
        firsts: list[int],
    ) -> None:
        """Fills the lists from a group. torch.compile runs this very method while it traces, by this name."""
        plan = self._full_plan(group)
        j = next(j for j, each in enumerate(self.param_groups) if each is group)
        random = self._randomness(group, self._places()[j])
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            if len(self.state[p]) == 0:
                self.state[p] = self._new_state(p, group, plan)
            self._begin_late(p, group, plan)
            if EMA in plan.keys and EMA not in self.state[p]:
                self.state[p][EMA] = self._new_average(p, self.state[p].get(MASTER))
            state = self.state[p]
            params.append(p)
            grads.append(p.grad)
            states.extend(state[key] for key in plan.keys)
            counts.append(state[STEP])
            if plan.carried is not None:
                carried.append(state[plan.carried])
            if group.get("master_weights"):
                masters.append(state[MASTER])
            scales.extend(state.get(scale_key(key)) for key in plan.keys)
            if random is not None:
                place_keys.append(random.place_keys[i])
                firsts.append(random.firsts[i])

    def _row(
        self, native: Any, group: dict[str, Any], plan: Plan, random: Randomness | None
    ) -> tuple[Any, ...]:
        lr, decay = group["lr"], self._options.ema_decay
        on_device = (
            isinstance(lr, Tensor) and lr.device.type != "cpu" and group.get("capturable", False)
        )
        return (
            backend.rule_number(native, plan.rule),
            plan.hyper,
            0.0 if on_device else as_number(lr),
            lr if on_device else None,
            plan.keys,
            list(group["params"]),
            self._ema_decay_at if callable(decay) else decay,
            [self._copies[p] for p in group["params"]] if self._copies else [],
            (MASTER, MASTERS[kind].itemsize) if (kind := group.get("master_weights")) else None,
            tuple(scale_key(key) for key in plan.keys),
            random,
            plan.carried,
        )

    def _check_capture(self) -> None:
        """As torch's own, which asks every group for ``capturable``: not all of torch's classes have it. A count on the
        host would stand still in the graph."""
        if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
            return
        if not all(group.get("capturable", False) for group in self.param_groups):
            raise RuntimeError(
                f"Attempting CUDA graph capture of step() for an instance of {type(self).__name__} but param_groups' "
                "capturable is False."
            )
        for _, _, p in self._each():
            count = self.state.get(p, {}).get(STEP)
            if p.grad is not None and isinstance(count, Tensor) and count.device != p.device:
                raise RuntimeError(
                    f"{self._place(p)}: state '{STEP}' is on {count.device}; expected the parameter's device "
                    f"{p.device} in a CUDA graph; load the optimizer's own state_dict() before the capture, which "
                    "moves it there"
                )

    @torch.no_grad()
    def _judge(
        self, p: Any, group: dict[str, Any], plan: Plan, choice: str
    ) -> list[Tensor | None] | None:
        """What to do with a parameter that the kernels did not take: an error, other tensors, or the reference."""
        begun = isinstance(p, Tensor) and self._begin_late(p, group, plan)
        self._check(p, group, plan)
        parts = self._parts(p, plan)
        reason = backend.why_not_native(parts.param.device)
        if reason is None and (begun or parts.param is not p):
            return parts.listed()
        if choice == "native":
            raise RuntimeError(
                f"{self._place(p)}: backend 'native' was asked for, but "
                f"{reason or 'its kernels take plain tensors only'}; use backend='auto'"
            )
        backend.warn_once(reason or f"the kernels do not take {self._place(p)}")
        return None
