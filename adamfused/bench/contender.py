"""One optimizer made ready to be timed: its training step, and the bytes that it moves and keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._pytree import tree_leaves

from adamfused.bench.case import Case
from adamfused.spec import Spec, Unsupported, first_line

LR = 1e-6  # so small that thousands of steps leave the parameters what they were
WARM_UP = 3  # steps; the first makes the states, and torch.compile may want the others


@dataclass(frozen=True)
class Feature:
    """What a training loop does around the step, unless the optimizer does it in its step.

    Args:
        help: what it is.
        argument: of constructors that have it; "" if it is nothing that a constructor is told.
        value: for that argument. A limit of gradients that is not reached: scaling by 1 takes as long.
    """

    help: str
    argument: str
    value: float


FEATURES = {
    "clip": Feature("clip_grad_norm_(foreach=True)", "max_grad_norm", 1e9),
    "ema": Feature("an exponential average of the parameters", "ema_decay", 0.999),
    "scaler": Feature("torch.amp.GradScaler", "", 1.0),
}


BLOCKS = tuple(2**k for k in range(5, 13))  # how many elements share a scale


@dataclass(frozen=True)
class Contender:
    """An optimizer that has made its first steps.

    Args:
        step: all that is timed: the optimizer's step and the features around it.
        step_bytes: what a step has to move: parameters and states read and written, gradients read; once more where it
            clips by their norm.
        state_bytes: what the optimizer keeps, without the parameters and gradients.
    """

    step: Callable[[], object]
    step_bytes: int
    state_bytes: int


def parameters(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Parameters of a case, normally distributed, with fixed gradients a thousand times smaller.

    Raises:
        Unsupported: if there is no memory for them.
    """
    # Linux hands out memory that it does not have, and ends who then writes to it: so this is asked before.
    need, free = 2 * case.numel * dtype.itemsize, free_bytes(device)
    if need > free:
        raise Unsupported(
            f"parameters and gradients take {1e-9 * need:,.1f} GB, and {1e-9 * free:,.1f} GB are free"
        )
    generator = torch.Generator(device).manual_seed(0)
    params: list[Tensor] = []
    for shape in case.shapes:
        values, gradient = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        p = torch.nn.Parameter(values.normal_(generator=generator))
        p.grad = gradient.normal_(std=1e-3, generator=generator)
        params.append(p)
    return params


def free_bytes(device: torch.device) -> float:
    """The memory that is left on a device; infinite where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")),
        math.inf,
    )


def prepare(spec: Spec, params: Sequence[Tensor], features: Collection[str]) -> Contender:
    """Makes an optimizer of ``params`` and steps it a few times.

    Raises:
        Unsupported: if it cannot be made or its step raises or exits, and why.
    """
    inside = {FEATURES[f].argument: FEATURES[f].value for f in features if _within(spec, f)}
    try:
        optimizer = spec.make(params, lr=LR, **inside)
        step = _training_step(optimizer, params, [f for f in features if not _within(spec, f)])
        for _ in range(WARM_UP):
            step()
        states = list(_states(optimizer))
    except Unsupported:
        raise
    except (Exception, SystemExit) as error:
        raise Unsupported(f"{type(error).__name__}: {first_line(error)}") from error
    if not all(p.isfinite().all() for p in params):
        for p in params:  # the others step them too
            p.detach().normal_()
        raise Unsupported(f"parameters are not finite after {WARM_UP} steps with gradients of 1e-3")
    passes = 4 if FEATURES["clip"].argument in inside else 3
    moved = sum(passes * _bytes(p) for p in params) + sum(
        2 * _bytes(state) for p, state in states if p is not None and _grows_with(p, state)
    )
    kept = {id(state): _bytes(state) for _, state in states}  # some are shared by all parameters
    return Contender(step, moved, sum(kept.values()))


def launches(step: Callable[[], object]) -> int:
    """The kernels, copies and fills that one step starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        step()  # the profiler may miss the first kernels that it is to see
        torch.cuda.synchronize()
    return (launched(profiled.key_averages()) + 1) // 2


def launched(events: Iterable[Any]) -> int:
    """How many of what the profiler saw ran on the GPU."""
    gpu = torch.autograd.DeviceType.CUDA
    return sum(event.count for event in events if event.device_type == gpu)


def _within(spec: Spec, feature: str) -> bool:
    return FEATURES[feature].argument in spec.arguments


def _training_step(
    optimizer: Optimizer, params: Sequence[Tensor], features: Collection[str]
) -> Callable[[], object]:
    """The step with these features around it, as training loops have them."""
    if not features:
        return optimizer.step
    clip, ema = "clip" in features, "ema" in features
    device = params[0].device
    scaler = torch.amp.GradScaler(
        device.type, init_scale=1.0, growth_interval=2**31 - 1, enabled="scaler" in features
    )
    scaler.scale(torch.ones((), device=device))  # as scaling a loss does: now it has its scale
    currents = [p.detach() for p in params]
    averages = [p.clone() for p in currents] if ema else []
    average = get_ema_multi_avg_fn(FEATURES["ema"].value)

    def step() -> None:
        if clip:
            scaler.unscale_(optimizer)  # else the scaler's step does it
            torch.nn.utils.clip_grad_norm_(params, FEATURES["clip"].value, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        if ema:
            average(averages, currents, 1)

    return step


def _states(optimizer: Optimizer) -> Iterator[tuple[Tensor | None, Tensor]]:
    """The tensors of the state, each with the parameter that it belongs to."""
    state: dict[Any, Any] = optimizer.state
    for p, entry in state.items():
        for leaf in tree_leaves(entry):
            if isinstance(leaf, Tensor):
                yield p if isinstance(p, Tensor) else None, leaf


def _grows_with(p: Tensor, state: Tensor) -> bool:
    """Whether a state has a number for each element or for each block; a count and a table have not."""
    blocks = {-(-p.numel() // size) for size in BLOCKS}
    return state.numel() >= p.numel() or (state.numel() > 1 and state.numel() in blocks)


def _bytes(tensor: Tensor) -> int:
    """Those that it really holds: a quantised one is a wrapper around smaller ones."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
