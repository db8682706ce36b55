"""The tensors of a parameter: how its state is made, gathered and checked, and its random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .average import Averaging
from .formats import CODES, place_key
from .plan import Plan
from .shards import first_number, local, local_gradient
from .storage import (
    EMA,
    MASTER,
    STEP,
    check_options,
    fill,
    new_master,
    new_scale,
    new_state,
    scale_key,
    seed_of,
    state_dtype_for,
)

_place_key = lru_cache(1 << 16)(place_key)


class Randomness(NamedTuple):
    """What the random numbers of a group's parameters depend on besides the step count.

    Args:
        stochastic: round numbers of 16 bits at random; else random numbers are for codes of 8 bits alone.
        place_keys: of each parameter.
        firsts: the place of each parameter's first element in the whole parameter, if this is a shard of it.
    """

    stochastic: bool
    place_keys: list[int]
    firsts: list[int]


class Parts(NamedTuple):
    """All tensors of a parameter, plain ones: of DTensors, what this rank holds."""

    param: Tensor
    grad: Tensor
    states: list[Tensor]
    copy: Tensor | None
    master: Tensor | None
    scales: list[Tensor | None]
    carried: Tensor | None
    step: Tensor

    def listed(self) -> list[Tensor | None]:
        return [
            *(self.param, self.grad, *self.states),
            *(self.copy, self.master, *self.scales, self.carried, self.step),
        ]


class States(Averaging):
    """Makes, gathers and checks."""

    @torch.no_grad()
    def _new_state(self, p: Tensor, group: dict[str, Any], plan: Plan) -> dict[str, Tensor]:
        device = p.device if group.get("capturable", False) else torch.device("cpu")
        state = {STEP: torch.zeros((), dtype=torch.float32, device=device)}
        if plan.carried is not None:
            state[plan.carried] = torch.ones_like(state[STEP])
        states, scales = self._new_states(p, group, plan.keys)
        state |= states
        if kind := group.get("master_weights"):
            state[MASTER] = new_master(p, kind)
        return state | scales

    def _new_states(
        self, p: Tensor, group: dict[str, Any], keys: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Those of these names, and their scales by key."""
        state = {}
        for key in keys:
            if key == EMA:
                state[key] = self._new_average(p)
            else:
                state[key] = new_state(p, state_dtype_for(p, group.get("state_dtype"), key))
        scales = {scale_key(key): new_scale(p) for key in keys if state[key].dtype in CODES}
        for key in keys:
            if key != EMA and (number := self._begins_with(group, key)) != 0:
                fill(p, state[key], scales.get(scale_key(key)), number, seed_of(group))
        return state, scales

    @torch.no_grad()
    def _begin_late(self, p: Tensor, group: dict[str, Any], plan: Plan) -> bool:
        """Makes what the parameter has not needed until now. Whether there was any: no number has then changed."""
        state = self.state[p]
        late = [key for key in self._late_states if key in plan.keys and state.get(key) is None]
        if late:
            for made in self._new_states(p, group, late):
                state |= made
        return bool(late)

    def _full_plan(self, group: dict[str, Any]) -> Plan:
        plan = self._plan(group)
        if self._options.ema_decay is None:
            return plan
        self._check_average(group)
        return plan._replace(keys=(*plan.keys, EMA))

    def _parts(self, p: Any, plan: Plan) -> Parts:
        state = {key: local(value) for key, value in self.state[p].items()}
        return Parts(
            local(p),
            local_gradient(p),
            [state[key] for key in plan.keys],
            local(self._copies[p]) if self._copies else None,
            state.get(MASTER),
            [state.get(scale_key(key)) for key in plan.keys],
            None if plan.carried is None else state[plan.carried],
            state[STEP],
        )

    def _check(self, p: Any, group: dict[str, Any], plan: Plan, only_tensors: bool = False) -> None:
        """Raises if a parameter cannot be stepped; with ``only_tensors``, looks at no state yet."""
        if not isinstance(p, Tensor):
            raise RuntimeError(f"{self._place(p)}: expected a tensor; got {type(p).__name__}")
        if only_tensors:
            check_options(group)  # it may have been written to since the constructor looked
            problem = checks.tensors_problem(local(p), local_gradient(p))
            problem = problem or self._format_problem(p, group)
        else:
            state = {key: local(value) for key, value in self.state[p].items()}
            problem = checks.step_problem(local(p), local_gradient(p), state, plan, group)
            problem = problem or self._format_problem(
                p, group, [state[key].dtype for key in plan.keys]
            )
        if problem is None and self._copies:
            problem = checks.copy_problem(local(p), local(self._copies[p]))
            problem = problem and f"its copy_to: {problem}"
        if problem:
            raise RuntimeError(f"{self._place(p)}: {problem}")

    def _places(self) -> list[int]:
        """Where each group begins among all parameters."""
        return list(accumulate((len(g["params"]) for g in self.param_groups), initial=0))[:-1]

    @staticmethod
    def _randomness(group: dict[str, Any], place: int) -> Randomness | None:
        """None if nothing of the group is random."""
        stochastic = group.get("stochastic_rounding", False)
        if not stochastic and group.get("state_dtype") != "int8":
            return None
        seed, params = seed_of(group), group["params"]
        keys = [_place_key(seed, place + i) for i in range(len(params))]
        # Where the place of a shard has no meaning, nothing is random.
        return Randomness(stochastic, keys, [first_number(p) or 0 for p in params])
