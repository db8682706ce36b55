"""What is refused, and the words for it: the messages of every path, in one place.

Each names the parameter, what it got, what was expected and what to do. They are raised before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .formats import FORMATS

_DTYPES = "float32, float64, bfloat16 or float16, or a complex dtype made of one of these"


_COUNTS = (
    torch.float32,
    torch.float64,
    torch.int64,
)  # what a step count may be; bfloat16 would stand still at 256


def is_supported(dtype: torch.dtype) -> bool:
    return (dtype.to_real() if dtype.is_complex else dtype) in FORMATS


def may_overlap(t: Tensor) -> bool:
    """Whether two elements may share memory, told from the strides: each must step over all that smaller ones reach."""
    reach = 0
    for stride, size in sorted(
        (st, si) for st, si in zip(t.stride(), t.shape, strict=True) if si != 1
    ):
        if t.numel() > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _has_memory(t: Tensor) -> bool:
    if t.numel() == 0:
        return True
    last = t.storage_offset() + sum(
        st * (si - 1) for st, si in zip(t.stride(), t.shape, strict=True)
    )
    return (last + 1) * t.element_size() <= t.untyped_storage().nbytes()


_STANDS_FOR_ANOTHER = (
    "Python",
    "ZeroTensor",
    "Functionalize",
    "FuncTorchBatched",
    "FuncTorchGradWrapper",
)


def stands_for_another(t: Tensor) -> bool:
    """Whether ``t`` is a subclass with operations of its own, or a wrapper that torch.func makes."""
    keys = torch._C._dispatch_keys(t)
    return any(keys.has(getattr(torch._C.DispatchKey, name)) for name in _STANDS_FOR_ANOTHER)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in the same memory, in part or whole; of two with holes, which may lie in each other's,
    only whether they begin at the same place."""
    if a.numel() == 0 or b.numel() == 0:
        return False

    def last(t: Tensor) -> int:
        return sum(st * (si - 1) for st, si in zip(t.stride(), t.shape, strict=True))

    if last(a) + 1 != a.numel() and last(b) + 1 != b.numel():
        return a.data_ptr() == b.data_ptr()
    a_end, b_end = (t.data_ptr() + (last(t) + 1) * t.element_size() for t in (a, b))
    return a.data_ptr() < b_end and b.data_ptr() < a_end


def _memory_problem(t: Tensor, what: str) -> str | None:
    """Why no kernel can read ``t``, if so."""
    if stands_for_another(t):
        if type(t) in (Tensor, torch.nn.Parameter):
            return f"{what} is a wrapper made by torch.func; expected a plain tensor or a DTensor; step outside of it"
        kind = type(t).__name__
        return f"{what} is a {kind}, a tensor with operations of its own; expected a plain tensor or a DTensor"
    if t.device.type == "meta":
        return f"{what} is on the meta device, which has no memory; materialise it first, as with Module.to_empty()"
    if t.layout is not torch.strided:
        return f"{what} has layout {t.layout}; expected a dense tensor; convert it with to_dense()"
    if not is_supported(t.dtype):
        return f"{what} has dtype {t.dtype}; expected {_DTYPES}"
    if not _has_memory(t):
        return (
            f"{what} has lost its memory: its storage has {t.untyped_storage().nbytes()} bytes, and "
            f"{t.numel()} elements of {t.element_size()} bytes lie in it; step while it is allocated"
        )
    return None


def _part_problem(param: Tensor, t: Tensor, what: str, remedy: str) -> str | None:
    """Why ``t``, a gradient or a state, does not go with ``param``, if so."""
    if t.device != param.device:
        return f"{what} is on {t.device}; expected the parameter's device {param.device}; {remedy}"
    if t.shape != param.shape:
        return f"{what} has shape {tuple(t.shape)}; expected the parameter's shape {tuple(param.shape)}; {remedy}"
    if t.is_complex() != param.is_complex():
        kind = "complex" if param.is_complex() else "real"
        return f"{what} has dtype {t.dtype}; expected a {kind} one, as the parameter's {param.dtype}; {remedy}"
    return None


def tensors_problem(param: Tensor, grad: Tensor) -> str | None:
    """Why this parameter cannot be stepped, whatever its state, or ``None``."""
    if problem := _memory_problem(param, "it"):
        return problem
    if may_overlap(param):
        return (
            f"some of its elements may share memory (shape {tuple(param.shape)}, strides {param.stride()}), so an "
            "update in place has no meaning; expected each element in its own place; make the parameter from a clone()"
        )
    if param.is_inference() and not torch.is_inference_mode_enabled():
        return "it was made in inference mode and cannot be written outside of it; make the parameter from a clone()"
    if grad.layout is not torch.strided and not stands_for_another(grad):
        return (
            f"its gradient is sparse (layout {grad.layout}); expected a dense one; use torch.optim.SparseAdam, or "
            "sparse=False in the embedding that makes it"
        )
    if stands_for_another(grad):
        return _memory_problem(grad, "its gradient")
    return _part_problem(
        param, grad, "its gradient", "set the gradient by backward(), or to one like the parameter"
    ) or _memory_problem(grad, "its gradient")


def copy_problem(param: Tensor, copy: Any) -> str | None:
    """Why ``copy`` cannot receive the new weights of ``param``, or ``None``."""
    if not isinstance(copy, Tensor):
        return f"it is a {type(copy).__name__}; expected a tensor of shape {tuple(param.shape)}"
    problem = _part_problem(param, copy, "it", "make it with torch.empty_like(param, dtype=...)")
    if problem := problem or _memory_problem(copy, "it"):
        return problem
    if may_overlap(copy):
        return f"elements may share memory (strides {copy.stride()}); expected its own; clone() it"
    if _same_memory(param, copy):
        return "it lies in the same memory as the parameter; expected its own; clone() it"
    if copy.is_inference() and not torch.is_inference_mode_enabled():
        return "it was made in inference mode and cannot be written outside of it; clone() it"
    return None


def shared_memory(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str | None:
    """Which of ``some`` tensors lies in the memory of another one, of these or of ``others``, if any does."""

    def end(t: Tensor) -> int:
        last = sum(st * (si - 1) for st, si in zip(t.stride(), t.shape, strict=True))
        return t.data_ptr() + (last + 1) * t.element_size()

    named = [(name, t) for name, t in {**others, **some}.items() if t.numel() > 0]
    named.sort(key=lambda item: item[1].data_ptr())
    for i, (name, t) in enumerate(named):
        for other, u in named[i + 1 :]:
            if u.data_ptr() >= end(t):
                break
            if t.device == u.device and (name in some or other in some) and _same_memory(t, u):
                first, second = (other, name) if other in some else (name, other)
                return (
                    f"{first}: it lies in the same memory as {second}; expected its own; clone() it"
                )
    return None


def step_problem(
    param: Tensor, grad: Tensor, state: Mapping[str, Any], keys: Sequence[str]
) -> str | None:
    """Why this parameter cannot be stepped, or ``None``."""
    if problem := tensors_problem(param, grad):
        return problem
    for key in keys:
        t = state.get(key)
        remedy = "load a checkpoint that fits, or drop this parameter's state to begin anew"
        if not isinstance(t, Tensor):
            got = "is missing" if key not in state else f"is a {type(t).__name__}"
            return f"state '{key}' {got}; expected a tensor of shape {tuple(param.shape)}; {remedy}"
        if problem := _part_problem(param, t, f"state '{key}'", remedy) or _memory_problem(
            t, f"state '{key}'"
        ):
            return problem
        if t.is_inference() and not torch.is_inference_mode_enabled():
            return f"state '{key}' was made in inference mode and cannot be written outside of it; clone() it"
        for other in ("it", *keys[: keys.index(key)]):
            if _same_memory(t, param if other == "it" else state[other]):
                name = "the parameter" if other == "it" else f"state '{other}'"
                return (
                    f"state '{key}' lies in the same memory as {name}; expected its own; clone() it"
                )
        if may_overlap(t):
            return f"elements of state '{key}' may share memory (strides {t.stride()}); expected its own; {remedy}"
    count = state.get("step")
    if not isinstance(count, Tensor) or count.numel() != 1:
        got = f"a {type(count).__name__}"
        if isinstance(count, Tensor):
            got = f"of shape {tuple(count.shape)}"
        elif "step" not in state:
            got = "missing"
        return (
            f"state 'step' is {got}; expected a tensor with one number; load a checkpoint that fits"
        )
    if count.dtype not in _COUNTS:
        return f"state 'step' has dtype {count.dtype}; expected float32, float64 or int64; load a checkpoint that fits"
    if count.device.type != "cpu" and count.device != param.device:
        return f"state 'step' is on {count.device}; expected cpu or the parameter's {param.device}; move it there"
    if count.device.type == "cpu" and not count_is_valid(count):
        return f"state 'step' is {count.item()}; expected a number from 0 to 2^53; load a checkpoint that fits"
    return None


def count_is_valid(count: Tensor | float) -> bool:
    return 0 <= float(count) < 2**53  # the whole numbers that a double holds; false for NaN, too


def load_problem(
    param: Tensor, state: Mapping[str, Any], required: Sequence[str], known: Sequence[str]
) -> str | None:
    """Why this entry of a state dict does not fit the parameter, or ``None``."""
    missing = [key for key in ("step", *required) if key not in state]
    if missing:
        return (
            f"the checkpoint lacks {_names(missing)}; it has {_names(state)}; it was saved by another optimizer, or "
            "with other options"
        )
    unknown = [key for key in state if key not in known and key != "step"]
    if unknown == ["ema"]:
        return (
            "the checkpoint has 'ema', an average of the weights, and this optimizer keeps none; make it with "
            "ema_decay to go on with it, or drop 'ema' from the states"
        )
    if unknown:
        return f"the checkpoint has {_names(unknown)}, which this optimizer does not know; expected {_names(known)}"
    for key in known:
        if key not in state:
            continue
        t = state[key]
        if not isinstance(t, Tensor):
            return f"'{key}' in the checkpoint is a {type(t).__name__}; expected a tensor"
        if t.shape != param.shape:
            return (
                f"'{key}' in the checkpoint has shape {tuple(t.shape)}; expected the parameter's {tuple(param.shape)}; "
                "it was saved for another model or another order of parameters"
            )
        if not is_supported(t.dtype) or t.is_complex() != param.is_complex():
            return (
                f"'{key}' in the checkpoint has dtype {t.dtype}, which does not go with the parameter's {param.dtype}; "
                "it was saved for another model"
            )
        if not stands_for_another(t) and (
            problem := _memory_problem(t, f"'{key}' in the checkpoint")
        ):
            return problem
    count = state["step"]
    if isinstance(count, Tensor):
        if count.numel() != 1 or count.dtype not in _COUNTS or count.device.type == "meta":
            return (
                f"'step' in the checkpoint has shape {tuple(count.shape)} and dtype {count.dtype} on {count.device}; "
                "expected one number, float32, float64 or int64"
            )
    elif not isinstance(count, (int, float)) or isinstance(count, bool):
        return f"'step' in the checkpoint is a {type(count).__name__}; expected one number"
    if not count_is_valid(count):
        return f"'step' in the checkpoint is {float(count)}; expected a number from 0 to 2^53"
    return None


def _names(keys: Any) -> str:
    return ", ".join(f"'{key}'" for key in keys) or "nothing"
