"""What all optimizers here share: gather, make state, one call, checkpoints. An optimizer itself is a rule's name,
its hyper-parameters and the names of its states (see :mod:`adamfused.adam`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backend, checks, reference
from .formats import FORMATS


class Plan(NamedTuple):
    """How a parameter group moves: the rule's name, the names of its states in the rule's order, and the rule's
    numbers in the order of its ``Hyper`` struct."""

    rule: str
    keys: tuple[str, ...]
    hyper: list[float]


StateDtype = torch.dtype | str | None


def check_state_dtype(value: StateDtype) -> None:
    if not (value is None or value == "param" or value in FORMATS):
        raise ValueError(
            f"Invalid state_dtype value: {value!r}; expected None (at least float32), 'param' or one of "
            + ", ".join(map(str, FORMATS))
        )


def state_dtype_for(param: Tensor, wish: StateDtype) -> torch.dtype:
    """The dtype of a parameter's states."""
    if wish is None:
        return torch.promote_types(param.dtype, torch.float32)
    if wish == "param":
        return param.dtype
    assert isinstance(wish, torch.dtype)
    return wish.to_complex() if param.is_complex() else wish


def as_number(x: float | Tensor) -> float:
    return float(x.item()) if isinstance(x, Tensor) else float(x)


def check_lr(lr: float | Tensor) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}")


def _local(t: Any) -> Any:
    """What a DTensor holds on this rank; anything else as it is."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return t._local_tensor if tensors is not None and isinstance(t, tensors.DTensor) else t


class FusedOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` whose step is one call for all parameters.

    A subclass gives `_plan` and the class attributes below, and passes torch's own defaults to ``__init__``.
    """

    _group_defaults: ClassVar[dict[str, Any]] = {}
    """For group keys that older checkpoints lack: the value that they stood for."""
    _known_states: ClassVar[tuple[str, ...]] = ()
    """Every state name that the optimizer may have, in any setting."""

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, backend_choice: str | None, **extras: Any
    ) -> None:
        """``extras`` are group keys that torch's optimizer does not have, by name: (value, its default). One that
        has its default stays out of the groups, so that checkpoints are those of torch."""
        self._check_group(defaults)
        if defaults["differentiable"]:
            raise ValueError(
                f"adamfused.{type(self).__name__} cannot be differentiated through; expected differentiable=False; "
                f"use torch.optim.{type(self).__name__} for that"
            )
        check_state_dtype(extras["state_dtype"][0])
        backend.choose(backend_choice)
        backend.native()
        super().__init__(
            params, defaults | {k: v for k, (v, default) in extras.items() if v != default}
        )
        # After super().__init__, which copies all of self.defaults into the groups: a checkpoint must not carry the
        # backend, but a pickled or deep-copied optimizer keeps `defaults` and nothing else.
        self.defaults["backend"] = backend_choice

    @staticmethod
    def _check_group(group: Mapping[str, Any]) -> None:
        """Raises ValueError, in torch.optim's words, if a number in a group is out of range."""
        raise NotImplementedError

    def _plan(self, group: dict[str, Any]) -> Plan:
        raise NotImplementedError

    # ---- groups and checkpoints --------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as in ``torch.optim``.

        Raises:
            ValueError: also if a parameter stands twice in the group: it would be moved twice at once.
        """
        if isinstance(param_group, dict) and not isinstance(
            param_group.get("params"), (Tensor, set, type(None))
        ):
            param_group["params"] = params = list(param_group["params"])
            tensors = [p[1] if isinstance(p, tuple) else p for p in params]
            first: dict[int, int] = {}
            for i, t in enumerate(tensors):
                if first.setdefault(id(t), i) != i:
                    raise ValueError(
                        f"{type(self).__name__}: parameter {i} of group {len(self.param_groups)} is parameter "
                        f"{first[id(t)]} once more; expected each parameter once; remove one of them"
                    )
            check_state_dtype(param_group.get("state_dtype"))
            self._check_group(self.defaults | param_group)
        super().add_param_group(param_group)
        self.param_groups[-1].pop("backend", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        extras = {k: v for k, v in self.defaults.items() if k in ("state_dtype", "bias_correction")}
        for group in self.param_groups:
            for key, value in (self._group_defaults | extras).items():
                group.setdefault(key, value)
            for p in group["params"]:
                entry = self.state.get(p)
                if not entry:
                    continue
                saved = getattr(self, "_loading", {}).get(p, {})
                for key, value in saved.items():  # torch has cast these to the parameter's dtype
                    if isinstance(value, Tensor) and key != "step":
                        entry[key] = value.to(device=p.device)
                count = saved.get("step", entry["step"])
                if not isinstance(count, Tensor):
                    count = torch.tensor(float(count), dtype=torch.float32, device="cpu")
                if "_loading" in self.__dict__:
                    device = p.device if group["capturable"] else torch.device("cpu")
                    dtype = torch.float32 if group["capturable"] else count.dtype
                    count = count.to(device=device, dtype=dtype, copy=True)  # may be shared by all
                entry["step"] = count

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of its ``torch.optim`` namesake. The states keep their dtypes.

        Raises:
            ValueError: if a state does not fit its parameter; the optimizer is then as it was.
        """
        # The last hook: those of the user have run.
        handle = self.register_load_state_dict_pre_hook(lambda _, saved: self._check_loaded(saved))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self.__dict__.pop("_loading", None)

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        """Refuses what does not fit, and keeps the entries as they came for `__setstate__`."""
        saved_groups = state_dict["param_groups"]
        lengths = [len(g["params"]) for g in saved_groups]
        if lengths != [len(g["params"]) for g in self.param_groups]:
            return  # torch's own message follows
        self._loading: dict[Tensor, dict[str, Any]] = {}
        saved_ids = chain.from_iterable(g["params"] for g in saved_groups)
        optional = {"backend", "bias_correction", "state_dtype", *self._group_defaults}
        for j, saved in enumerate(saved_groups):
            lacking = [key for key in self.defaults if key not in saved and key not in optional]
            if lacking:
                raise ValueError(
                    f"{type(self).__name__}: group {j} of the checkpoint lacks {', '.join(map(repr, lacking))}; "
                    "expected all options of this optimizer; it was saved by another one, or is not whole"
                )
        groups = [self._group_defaults | self.defaults | dict(group) for group in saved_groups]
        for group in groups:
            self._check_group(group)
            check_state_dtype(group.get("state_dtype"))
        plans = [self._plan(group) for group in groups]
        for (j, i, p), saved_id in zip(self._each(), saved_ids, strict=True):
            entry = state_dict["state"].get(saved_id)
            if entry:
                if problem := checks.load_problem(p, entry, plans[j].keys, self._known_states):
                    raise ValueError(f"{self._place(j, i)}: {problem}")
                self._loading[p] = dict(entry)

    def _each(self) -> Any:
        for j, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                yield j, i, p

    def _place(self, j: int, i: int) -> str:
        names = self.param_groups[j].get("param_names")
        name = f" ('{names[i]}')" if names and i < len(names) else ""
        return f"{type(self).__name__}: parameter {i} of group {j}{name}"

    # ---- the step ----------------------------------------------------------------------------------------------

    # Not under torch.no_grad() as a whole: the kernels do not need it, and an interrupt (Ctrl-C) that arrives while
    # its Python code sets the mode back would leave gradients off for the rest of the process.
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves every parameter that has a gradient.

        Args:
            closure: called first, with gradients enabled, to compute the loss and the gradients.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            RuntimeError: if a parameter, gradient or state cannot be used, naming it and what to do. No parameter
                of any group has then moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if (
            torch.compiler.is_compiling()
            and backend.choose(self.defaults["backend"]) != "reference"
        ):
            self._traced_step()
        else:
            self._eager_step()
        return loss

    @torch._disable_dynamo
    def _eager_step(self) -> None:
        self._check_capture()
        choice = backend.choose(self.defaults["backend"])
        native = backend.native() if choice != "reference" else None
        plans = [self._plan(group) for group in self.param_groups]

        def init(j: int, i: int) -> None:
            p = self.param_groups[j]["params"][i]
            self._check(j, i, plans[j].keys, only_tensors=True)
            self.state[p] = self._new_state(p, self.param_groups[j], plans[j].keys)

        def judge(j: int, i: int) -> list[Tensor] | None:
            return self._judge(j, i, plans[j].keys, choice)

        if native is not None:
            groups = zip(self.param_groups, plans, strict=True)
            rows = [self._row(native, group, plan) for group, plan in groups]
            left = native.step(self.state, rows, init, judge)
        else:
            left = self._ready_for_reference(plans, init)
        if left:
            self._reference_step(plans, left)

    @torch.no_grad()
    def _reference_step(self, plans: Sequence[Plan], places: Sequence[tuple[int, int]]) -> None:
        for j, i in places:
            p, g, *states, count = self._tensors(j, i, plans[j].keys)
            lr = as_number(self.param_groups[j]["lr"])
            reference.step(plans[j].rule, plans[j].hyper, lr, p, g, states, count)

    def _ready_for_reference(
        self, plans: Sequence[Plan], init: Callable[[int, int], None]
    ) -> list[tuple[int, int]]:
        """Makes states and checks everything, as the native step does. Returns the places of what is to move."""
        places = [(j, i) for j, i, p in self._each() if p.grad is not None]
        before: dict[Tensor, Any] = {}
        try:
            for j, i in places:
                p = self.param_groups[j]["params"][i]
                if not self.state.get(p):
                    before[p] = dict.get(self.state, p)
                    init(j, i)
                self._check(j, i, plans[j].keys)
        except BaseException:
            for p, entry in before.items():
                self.state.pop(p, None)
                if entry is not None:
                    self.state[p] = entry
            raise
        return places

    @torch.no_grad()
    def _traced_step(self) -> None:
        for group in self.param_groups:
            plan = self._plan(group)
            params: list[Tensor] = []
            grads: list[Tensor] = []
            states: list[Tensor] = []
            counts: list[Tensor] = []
            self._init_group(group, params, grads, states, counts)
            if not params:
                continue
            lr = group["lr"]
            if isinstance(lr, Tensor):
                torch.ops.adamfused.step_(
                    params, grads, states, counts, plan.rule, plan.hyper, 0.0, lr
                )
            else:
                torch.ops.adamfused.step_(params, grads, states, counts, plan.rule, plan.hyper, lr)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        counts: list[Tensor],
    ) -> None:
        """Fills the lists from a group. torch.compile runs this very method while it traces, by this name."""
        plan = self._plan(group)
        for p in group["params"]:
            if p.grad is None:
                continue
            if len(self.state[p]) == 0:
                self.state[p] = self._new_state(p, group, plan.keys)
            params.append(p)
            grads.append(p.grad)
            states.extend(self.state[p][key] for key in plan.keys)
            counts.append(self.state[p]["step"])

    @torch.no_grad()
    def _new_state(
        self, p: Tensor, group: dict[str, Any], keys: Sequence[str]
    ) -> dict[str, Tensor]:
        dtype = state_dtype_for(p, group.get("state_dtype"))
        device = p.device if group["capturable"] else torch.device("cpu")
        state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
        for key in keys:
            state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        return state

    @staticmethod
    def _row(native: Any, group: dict[str, Any], plan: Plan) -> tuple[Any, ...]:
        lr = group["lr"]
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu" and group["capturable"]
        return (
            backend.rule_number(native, plan.rule),
            plan.hyper,
            0.0 if on_device else as_number(lr),
            lr if on_device else None,
            plan.keys,
            list(group["params"]),
        )

    def _check_capture(self) -> None:
        check = getattr(self, "_accelerator_graph_capture_health_check", None)
        if check is None:  # torch before 2.10
            check = self._cuda_graph_capture_health_check
        check()

    def _tensors(self, j: int, i: int, keys: Sequence[str]) -> list[Tensor]:
        """(parameter, gradient, \\*states, step) as plain tensors: of DTensors, what this rank holds."""
        p = self.param_groups[j]["params"][i]
        state, grad = self.state[p], p.grad
        if _local(p) is not p and _local(grad) is not grad and grad.placements != p.placements:
            grad = grad.redistribute(placements=p.placements)
        return [_local(t) for t in (p, grad, *(state[key] for key in keys), state["step"])]

    def _check(self, j: int, i: int, keys: Sequence[str], only_tensors: bool = False) -> None:
        """Raises if a parameter cannot be stepped; with ``only_tensors``, looks at no state yet."""
        p = self.param_groups[j]["params"][i]
        if not isinstance(p, Tensor):
            raise RuntimeError(f"{self._place(j, i)}: expected a tensor; got {type(p).__name__}")
        state = {} if only_tensors else self.state[p]
        state = {key: _local(value) for key, value in state.items()}
        if only_tensors:
            problem = checks.tensors_problem(_local(p), _local(p.grad))
        else:
            problem = checks.step_problem(_local(p), _local(p.grad), state, keys)
        if problem:
            raise RuntimeError(f"{self._place(j, i)}: {problem}")

    @torch.no_grad()
    def _judge(self, j: int, i: int, keys: Sequence[str], choice: str) -> list[Tensor] | None:
        """What to do with a parameter that the kernels did not take: an error, other tensors, or the reference."""
        self._check(j, i, keys)
        p = self.param_groups[j]["params"][i]
        tensors = self._tensors(j, i, keys)
        reason = backend.why_not_native(tensors[0].device)
        if reason is None and tensors[0] is not p:
            return tensors
        if choice == "native":
            raise RuntimeError(
                f"{self._place(j, i)}: backend 'native' was asked for, but "
                f"{reason or 'its kernels take plain tensors only'}; use backend='auto'"
            )
        backend.warn_once(reason or f"the kernels do not take {self._place(j, i)}")
        return None
