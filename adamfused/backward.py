"""The step inside the backward pass: each parameter moves as its gradient arrives, and the gradient is freed."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .base import check_is_ours
from .optimizer import FusedOptimizer

NamedParameters = list[tuple[str, torch.nn.Parameter]]


def step_in_backward(
    model: torch.nn.Module,
    make_optimizer: Callable[[NamedParameters], FusedOptimizer],
    *,
    accumulate: int = 1,
) -> StepInBackward:
    """Moves each parameter of a model as soon as ``backward()`` has its gradient, and frees the gradient at once.

    Training then needs memory for one gradient at a time instead of for all, and ends with the same bits. The loop
    keeps its form: ``optimizer.step()`` ends an iteration. It moves what still has a gradient, as a rule nothing, so
    schedulers, checkpoints and closures work as before, and so do hooks of ``step()``, called once a ``step()``.

    What changes the update must come before ``backward()``:

    * Options such as the learning rate; one replaced between ``backward()`` and ``step()`` is an error.
    * Clipping: ``max_grad_norm`` needs all gradients at once and is refused. ``torch.nn.utils.clip_grad_norm_`` after
      ``backward()`` finds no gradients, and nothing can notice that. Clip each gradient by ``Tensor.register_hook``.
    * Unscaling: an enabled ``GradScaler`` is an error in its first ``step()``, when the parameters have moved once by
      scaled gradients. Train in bfloat16, which needs no scaler.

    An error in ``backward()`` leaves parameters that have moved and others that have not, none in part;
    ``optimizer.step()`` then ends the iteration as it is.

    Args:
        model: its parameters that require gradients now are moved; others are skipped. It may not contain or be in a
            ``DistributedDataParallel`` or ``FullyShardedDataParallel``; ``fully_shard`` works.
        make_optimizer: gets the ``(name, parameter)`` pairs of these parameters, and returns one optimizer of adamfused
            that has them all, in any groups.
        accumulate: of how many backward passes an iteration consists. Gradients add up until the last of them, where
            parameters move and gradients are freed; a ``step()`` that comes earlier moves the parameters.

    Returns:
        A handle with the optimizer, at work until its ``remove()``. Keep it or its optimizer.

    Raises:
        TypeError: if ``model`` is no module, or if ``make_optimizer`` cannot be called or returns anything but an
            optimizer of adamfused.
        ValueError: if the model, the optimizer or ``accumulate`` cannot work this way; the message says why.

    Example:
        >>> import torch, adamfused
        >>> model = torch.nn.Linear(10, 1)
        >>> handle = adamfused.step_in_backward(model, lambda named: adamfused.AdamW(named, lr=1e-3))
        >>> optimizer = handle.optimizer
        >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        >>> for _ in range(3):
        ...     model(torch.ones(4, 10)).mean().backward()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> model.weight.grad, optimizer.state[model.weight]["step"]
        (None, tensor(3.))
        >>> handle.remove()

        Weight decay for matrices only:

        >>> def make_optimizer(named):
        ...     matrices = [(name, p) for name, p in named if p.ndim >= 2]
        ...     others = [(name, p) for name, p in named if p.ndim < 2]
        ...     groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        ...     return adamfused.AdamW(groups, lr=1e-3, weight_decay=0.1)
        >>> with adamfused.step_in_backward(model, make_optimizer) as handle:
        ...     [group["param_names"] for group in handle.optimizer.param_groups]
        [['weight'], ['bias']]
    """
    if type(accumulate) is not int or accumulate < 1:
        raise ValueError(
            f"accumulate is {accumulate!r}; expected the number of backward passes of an iteration, 1 or more"
        )
    if not callable(make_optimizer):
        raise TypeError(
            f"make_optimizer is of type {type(make_optimizer).__name__}; expected a function of the (name, parameter) "
            "pairs, such as lambda named: adamfused.AdamW(named, lr=1e-3)"
        )
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"step_in_backward: model is of type {type(model).__name__}; expected a torch.nn.Module"
        )
    _check_modules(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    _check_parameters(named)
    optimizer = make_optimizer(list(named))
    _check_optimizer(optimizer, named)
    return StepInBackward(optimizer, named, accumulate)


class StepInBackward:
    """What :func:`adamfused.step_in_backward` returns. As a context manager, it is removed at the end.

    Attributes:
        optimizer: for ``step()``, schedulers, checkpoints and edits of ``param_groups``. ``copy.deepcopy`` of it gives
            a plain optimizer of plain parameters.
    """

    optimizer: FusedOptimizer

    def __init__(self, optimizer: FusedOptimizer, named: NamedParameters, accumulate: int) -> None:
        self.optimizer = optimizer
        self._accumulate = accumulate
        self._arrivals = WeakTensorKeyDictionary()  # by gradient: zero_grad() begins anew
        self._used: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._lock = threading.Lock()  # autograd has a thread for each device
        places = _places(optimizer)
        self._hooks = [(p, _Hook(self, name, places[p])) for name, p in named]
        self._registered = [
            *(p.register_post_accumulate_grad_hook(hook) for p, hook in self._hooks),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Goes back to the plain loop: gradients are kept from now on, and ``optimizer.step()`` moves all."""
        for registered in self._registered:
            registered.remove()

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # ---- the backward pass -------------------------------------------------------------------------------------

    def _arrived(self, p: Tensor, hook: _Hook) -> None:
        """Moves a parameter if its gradient is complete."""
        with self._lock:
            if p.grad is None:  # a hook of the user's has dropped it
                return
            if self._accumulate > 1 and not hook.moved:
                count = self._arrivals[p.grad] = self._arrivals.get(p.grad, 0) + 1
                if count < self._accumulate:
                    return
            try:
                self._move(p, hook)
            finally:  # also if refused or interrupted: nothing may move by this gradient once more
                p.grad = None

    def _move(self, p: Tensor, hook: _Hook) -> None:
        if hook.moved:
            raise RuntimeError(
                f"step_in_backward: the gradient of '{hook.name}' came again after the parameter had moved "
                f"(accumulate={self._accumulate}); expected optimizer.step() in between. Call it at the end of each "
                "iteration, of one that failed too; to add up the gradients of N backward passes, pass accumulate=N; "
                "where checkpointed segments share a parameter, checkpoint them with use_reentrant=False"
            )
        _check_no_clipping(self.optimizer)
        j = self._group_of(p, hook)
        group = self.optimizer.param_groups[j]
        alone = {**group, "params": [p]}
        self._used[j] = group, alone
        place = self.optimizer._places()[j] + hook.place[1]
        self.optimizer._eager_step([alone], None, [place])
        hook.moved = True

    def _group_of(self, p: Tensor, hook: _Hook) -> int:
        """The number of its group. Groups may be edited at any time, and load_state_dict() makes new ones."""
        groups = self.optimizer.param_groups
        j, i = hook.place
        if j >= len(groups) or i >= len(groups[j]["params"]) or groups[j]["params"][i] is not p:
            places = _places(self.optimizer)
            for q, its in self._hooks:
                its.place = places.get(q, its.place)
            if p not in places:
                raise RuntimeError(
                    f"step_in_backward: '{hook.name}' is no longer in any group of the optimizer; expected it in one; "
                    "call requires_grad_(False) on a parameter that is not to move"
                )
        return hook.place[0]

    # ---- the end of the iteration ------------------------------------------------------------------------------

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if "grad_scale" in vars(optimizer):  # torch.amp.GradScaler sets it for the call of step()
            del optimizer.grad_scale, optimizer.found_inf
            raise RuntimeError(
                "step_in_backward: a GradScaler is to unscale the gradients now, but the parameters have moved in "
                "backward(), by scaled gradients; expected gradients without a scale; begin again from the last "
                "checkpoint, in bfloat16 or with GradScaler(enabled=False)"
            )
        for j, (group, used) in self._used.items():
            for key, old in used.items():
                new = group.get(key)
                if key not in ("params", "param_names") and old is not new and old != new:
                    raise RuntimeError(
                        f"step_in_backward: '{key}' of group {j} went from {old} to {new} after backward(), where the "
                        "parameters moved with the old value; expected no change between backward() and step(); set it "
                        "before the one or after the other"
                    )

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        again = [hook.name for p, hook in self._hooks if hook.moved and p.grad is not None]
        for _, hook in self._hooks:
            hook.moved = False
        self._used.clear()
        optimizer.zero_grad()
        if again:
            raise RuntimeError(
                f"step_in_backward: '{again[0]}' had a gradient again after it had moved, and moved twice; expected "
                "nothing else to set gradients, as DistributedDataParallel around the model does; use "
                "torch.distributed.fsdp.fully_shard, or optimizer.step() without step_in_backward"
            )


class _Hook:
    """What a parameter calls, and what is known of it. It must own neither the parameter nor the handle: Python's
    garbage collector does not see what hooks own, and would never free them."""

    __slots__ = ("_handle", "moved", "name", "place")

    def __init__(self, handle: StepInBackward, name: str, place: tuple[int, int]) -> None:
        self._handle = weakref.ref(handle)
        self.name = name
        self.place = place  # number of its group, index in it
        self.moved = False  # in this iteration

    @property
    def works(self) -> bool:
        return self._handle() is not None

    def __call__(self, p: Tensor) -> None:
        handle = self._handle()
        if handle is not None:
            handle._arrived(p, self)
        else:
            warnings.warn(
                "step_in_backward: the handle and its optimizer are gone, so nothing moves and gradients are kept; "
                "keep one of them, or call remove() on the handle",
                stacklevel=2,
            )


def _places(optimizer: FusedOptimizer) -> dict[Tensor, tuple[int, int]]:
    return {p: (j, i) for j, i, p in optimizer._each()}


# ---- what cannot work ----------------------------------------------------------------------------------------------


def _check_modules(model: torch.nn.Module) -> None:
    reducers: list[type] = [torch.nn.parallel.DistributedDataParallel]
    if fsdp := sys.modules.get("torch.distributed.fsdp"):
        reducers.append(fsdp.FullyShardedDataParallel)
    for name, module in model.named_modules():
        if isinstance(module, tuple(reducers)):
            raise ValueError(
                f"step_in_backward: {f'module {name!r}' if name else 'the model'} is a {type(module).__name__}, which "
                "reduces gradients over the ranks after the parameters would have moved; expected a plain model or one "
                "of torch.distributed.fsdp.fully_shard; use that, or optimizer.step() without step_in_backward"
            )


def _check_parameters(named: NamedParameters) -> None:
    for name, p in named:
        hooks = getattr(p, "_post_accumulate_grad_hooks", None) or {}
        if any(isinstance(hook, _Hook) and hook.works for hook in hooks.values()):
            raise ValueError(
                f"step_in_backward: '{name}' moves in backward already; expected one step_in_backward for a parameter; "
                "call remove() on the first handle"
            )


def _check_optimizer(optimizer: Any, named: NamedParameters) -> None:
    check_is_ours("step_in_backward: what make_optimizer returned", optimizer)
    _check_no_clipping(optimizer)
    kind = type(optimizer).__name__
    if not optimizer._step_supports_amp_scaling:
        raise ValueError(
            f"step_in_backward: {kind} has fused_unscale=False, for a GradScaler that unscales after backward(), "
            "when the parameters have moved; expected the default, and no GradScaler"
        )
    names = {p: name for name, p in named}
    theirs = _places(optimizer)
    if lacking := [f"'{name}'" for p, name in names.items() if p not in theirs]:
        raise ValueError(
            f"step_in_backward: {kind} lacks {_listed(lacking)} of the model; expected every parameter that requires a "
            "gradient; add it to a group, or call requires_grad_(False) on it"
        )
    strangers = [optimizer._place(p) for p in theirs if p.requires_grad and p not in names]
    if strangers:
        raise ValueError(
            f"step_in_backward: {_listed(strangers)} is not the model's; expected its parameters only; make the "
            "optimizer of the pairs that make_optimizer gets"
        )


def _check_no_clipping(optimizer: FusedOptimizer) -> None:
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            f"step_in_backward: {type(optimizer).__name__} has max_grad_norm={optimizer.max_grad_norm}, but the first "
            "parameter moves before the norm of all gradients is known; expected None; clip each gradient by "
            "Tensor.register_hook"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
