"""What all optimizers here share but the step and checkpoints: parameter groups and options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backend, checks
from .options import DEFAULTS, GROUP_EXTRAS, Options
from .plan import Plan
from .shards import local
from .storage import (
    EMA,
    STEP,
    check_options,
    master_problem,
    rounding_problem,
    seed_of,
    state_dtype_for,
)


def as_number(x: float | Tensor) -> float:
    if type(x) is float:  # mostly: to ask for a Tensor takes longer
        return x
    return float(x.item()) if isinstance(x, Tensor) else float(x)


def numbers(group: Mapping[str, Any], *keys: str) -> list[float]:
    """Entries of a group as a rule's numbers; a switch is 0 or 1."""
    return [as_number(group[key]) for key in keys]


def check_is_ours(what: str, optimizer: Any) -> None:
    if not isinstance(optimizer, BaseOptimizer):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise TypeError(
            f"{what} is of type {kind}; expected an optimizer of adamfused, such as adamfused.AdamW"
        )


def check_lr(lr: float | Tensor) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}")


def check_not_negative(group: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if not 0.0 <= group[key]:
            name = {"eps": "epsilon"}.get(key, key)
            raise ValueError(f"Invalid {name} value: {group[key]}")


def check_betas(betas: Sequence[float | Tensor]) -> None:
    if len(betas) != 2:
        raise ValueError(f"Invalid betas value: {betas}; expected two numbers")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{i}] must be 1-element")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")


def plain_betas(betas: Sequence[float | Tensor]) -> tuple[Any, ...]:
    """Numbers in place of tensors; what is no number stays, for :func:`check_betas`."""
    return tuple(as_number(b) if isinstance(b, Tensor) and b.numel() == 1 else b for b in betas)


def check_group_keys(name: str, group: Mapping[str, Any]) -> None:
    """Raises ValueError for what a group asks for in vain."""
    if group.get("differentiable", False):
        raise ValueError(
            f"adamfused.{name} cannot be differentiated through; expected differentiable=False; use torch.optim.{name} "
            "for that"
        )
    for key, default in DEFAULTS.items():
        if key not in (*GROUP_EXTRAS, "copy_to") and group.get(key, default) != default:
            clip = (
                ": each rank has some of the parameters only; call torch.nn.utils.clip_grad_norm_ before step()"
                if key == "max_grad_norm"
                else ""
            )
            raise ValueError(
                f"{name}: a parameter group has {key}={group[key]!r}, which is an option of the whole optimizer; "
                "expected it as an argument of the constructor alone; ZeroRedundancyOptimizer, which makes its "
                f"arguments keys of groups, cannot have it{clip}"
            )


class BaseOptimizer(Optimizer):
    """Groups and options."""

    _group_defaults: ClassVar[dict[str, Any]] = {}
    """For group keys that older checkpoints lack: the value that they stood for."""
    _known_states: ClassVar[tuple[str, ...]] = ()
    """Every state name that the optimizer may have, in any setting."""
    _late_states: ClassVar[tuple[str, ...]] = ()
    """Those of them that a parameter which has made steps may still lack: they begin when they are needed."""
    _carried: ClassVar[str | None] = None
    """The name of the number that its rule carries from step to step, if it does."""
    _torch_lacks: ClassVar[tuple[str, ...]] = ()
    """The states that torch's namesake does not keep."""
    _own_options: ClassVar[tuple[str, ...]] = ()
    """Group keys that torch's namesake does not have, besides those of every optimizer here."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        extras: Mapping[str, Any],
        **own: tuple[Any, Any],
    ) -> None:
        """``defaults`` are torch's, ``own`` more group keys by name: (value, its default). Of these and of ``extras``,
        one that has its default stays out of the groups, so that checkpoints are those of torch."""
        for name in extras:
            if name not in DEFAULTS:
                raise TypeError(
                    f"{type(self).__name__}.__init__() got an unexpected keyword argument '{name}'"
                )
        self._check_group(defaults)
        given = DEFAULTS | dict(extras)
        self._options = Options.of(given)
        own |= {name: (given[name], DEFAULTS[name]) for name in GROUP_EXTRAS}
        check_group_keys(type(self).__name__, defaults)
        check_options({key: value for key, (value, _) in own.items()})
        backend.choose(given["backend"])
        backend.native()
        self._copies: dict[Any, Tensor] = {}
        self._results: dict[
            str, Any
        ] = {}  # of the last step; torch.compile keeps what is set in a dict
        super().__init__(
            params, defaults | {k: v for k, (v, default) in own.items() if v != default}
        )
        if given["copy_to"] is not None:
            self._take_copies([p for _, _, p in self._each()], given["copy_to"])

    def _check_average(self, group: Mapping[str, Any]) -> None:
        if callable(self._options.ema_decay) and group.get("capturable", False):
            raise ValueError(
                "ema_decay is a function, and capturable=True keeps the step count, which it is called with, on the "
                "device; expected a number; use capturable=False for a function"
            )

    def _take_copies(self, params: Sequence[Any], copy_to: Any) -> None:
        if not isinstance(copy_to, Iterable):
            raise ValueError(
                f"copy_to is a {type(copy_to).__name__}; expected a tensor for each parameter"
            )
        copies = list(copy_to)
        if len(copies) != len(params):
            raise ValueError(
                f"copy_to has {len(copies)} tensors; expected as many as parameters, {len(params)}, in their order"
            )
        for i, (p, copy) in enumerate(zip(params, copies, strict=True)):
            if problem := checks.copy_problem(local(p), local(copy)):
                raise ValueError(f"copy_to[{i}]: {problem}")
        places = {f"copy_to[{i}]": local(copy) for i, copy in enumerate(copies)}
        others: dict[str, Tensor] = {}
        for j, i, p in self._each():
            others[f"parameter {i} of group {j}"] = local(p)
            if p in self._copies:
                others[f"the copy of parameter {i} of group {j}"] = local(self._copies[p])
        if problem := checks.shared_memory(places, others):
            raise ValueError(problem)
        self._copies.update(zip(params, copies, strict=True))

    def _format_problem(
        self, p: Any, group: Mapping[str, Any], states: Sequence[torch.dtype] | None = None
    ) -> str | None:
        """Why a parameter cannot be kept in the formats of its group, or ``None``; ``states`` are the dtypes of those
        that it has."""
        if not isinstance(p, Tensor):
            return None  # of these speaks torch
        if problem := master_problem(p.dtype, group.get("master_weights")):
            return problem
        if states is None:
            states = [state_dtype_for(p, group.get("state_dtype"), "")]
            if self._options.ema_decay is not None:
                states.append(state_dtype_for(p, self._options.ema_dtype, EMA))
        return rounding_problem(p, group, states)

    @staticmethod
    def _check_group(group: Mapping[str, Any]) -> None:
        """Raises ValueError, in torch.optim's words, if a number in a group is out of range."""
        raise NotImplementedError

    def _plan(self, group: dict[str, Any]) -> Plan:
        raise NotImplementedError

    def _begins_with(self, group: Mapping[str, Any], key: str) -> float:
        """What all numbers of a state are before the first step."""
        return 0.0

    def _completed(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A parameter's entry in a checkpoint, with what torch's namesake leaves out."""
        return entry

    # ---- groups -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as in ``torch.optim``: the dict itself, in which options may be changed later.
        With ``copy_to``, the group has an entry of that name, which is taken out.

        Raises:
            ValueError: also if a parameter stands twice in the group: it would be moved twice at once. The dict is then
                as it was.
        """
        if not isinstance(param_group, dict):
            return super().add_param_group(param_group)  # torch's own message
        params = param_group.get("params")
        if not isinstance(params, (set, type(None))):  # of these speaks torch
            if isinstance(params, Tensor):
                params = [params]
            else:
                params = param_group["params"] = list(params)  # which may have been an iterator
            tensors = [p[1] if isinstance(p, tuple) else p for p in params]
            first: dict[int, int] = {}
            for i, t in enumerate(tensors):
                if first.setdefault(id(t), i) != i:
                    raise ValueError(
                        f"{type(self).__name__}: parameter {i} of group {len(self.param_groups)} is parameter "
                        f"{first[id(t)]} once more; expected each parameter once; remove one of them"
                    )
            group = self.defaults | param_group
            check_group_keys(type(self).__name__, param_group)
            check_options(group)
            self._check_group(group)
            self._check_average(group)
            for i, p in enumerate(params):
                name, p = (f" ('{p[0]}')", p[1]) if isinstance(p, tuple) else ("", p)
                if problem := self._format_problem(p, group):
                    place = f"parameter {i} of group {len(self.param_groups)}{name}"
                    raise ValueError(f"{type(self).__name__}: {place}: {problem}")
        has_some = next(self._each(), None) is not None
        copy_to = param_group.get("copy_to")
        if has_some and bool(self._copies) != (copy_to is not None):
            raise ValueError(
                f"a group is added {'without' if copy_to is None else 'with'} copy_to, to an optimizer that has "
                f"{'copies' if self._copies else 'no copies'} of its other parameters; expected a copy of each "
                "parameter or of none"
            )
        before, others = dict(param_group), len(self.param_groups)
        param_group.pop("copy_to", None)
        try:
            super().add_param_group(param_group)
            if "seed" in param_group:
                param_group["seed"] = seed_of(param_group)  # as a checkpoint can have it
            if copy_to is not None:
                self._take_copies(param_group["params"], copy_to)
        except BaseException:
            del self.param_groups[others:]
            param_group.clear()
            param_group.update(before)
            raise

    def _each(self) -> Any:
        for j, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                yield j, i, p

    def _place(self, param: Any) -> str:
        for j, i, p in self._each():
            if p is param:
                names = self.param_groups[j].get("param_names")
                name = f" ('{names[i]}')" if names and i < len(names) else ""
                return f"{type(self).__name__}: parameter {i} of group {j}{name}"
        raise AssertionError("no parameter of this optimizer")

    def _counts(self) -> tuple[str, ...]:
        """The names of the numbers of a parameter's state: tensors of one element."""
        return (STEP,) if self._carried is None else (STEP, self._carried)

    def _known_keys(self) -> tuple[str, ...]:
        return (*self._known_states, *([EMA] if self._options.ema_decay is not None else []))
