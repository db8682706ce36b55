"""What is refused, and the words for it: the messages of every path, in one place.

Each names the parameter, what it got, what was expected and what to do. They are raised before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .formats import CODES, FORMATS, are_scales, scales_shape
from .plan import Plan
from .shards import local
from .storage import EMA, MASTER, MASTERS, STEP, code_dtype, master_problem, scale_key

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


def _memory_problem(t: Tensor, what: str, dtype: torch.dtype | None = None) -> str | None:
    """Why no kernel can read ``t``, if so; ``dtype`` is the one that it must have, if there is only one."""
    if stands_for_another(t):
        if type(t) in (Tensor, torch.nn.Parameter):
            return f"{what} is a wrapper made by torch.func; expected a plain tensor or a DTensor; step outside of it"
        kind = type(t).__name__
        return f"{what} is a {kind}, a tensor with operations of its own; expected a plain tensor or a DTensor"
    if t.device.type == "meta":
        return f"{what} is on the meta device, which has no memory; materialise it first, as with Module.to_empty()"
    if t.layout is not torch.strided:
        return f"{what} has layout {t.layout}; expected a dense tensor; convert it with to_dense()"
    if not (is_supported(t.dtype) if dtype is None else t.dtype == dtype):
        return f"{what} has dtype {t.dtype}; expected {dtype or _DTYPES}"
    if not _has_memory(t):
        return (
            f"{what} has lost its memory: its storage has {t.untyped_storage().nbytes()} bytes, and "
            f"{t.numel()} elements of {t.element_size()} bytes lie in it; step while it is allocated"
        )
    return None


def _part_problem(
    param: Tensor, t: Tensor, what: str, remedy: str, shape: tuple[int, ...] | None = None
) -> str | None:
    """Why ``t``, a gradient or a state, does not go with ``param``, if so; ``shape`` if it is not the parameter's."""
    if t.device != param.device:
        return f"{what} is on {t.device}; expected the parameter's device {param.device}; {remedy}"
    expected = tuple(param.shape if shape is None else shape)
    if t.shape != expected:
        whose = "the parameter's shape " if shape is None else ""
        return f"{what} has shape {tuple(t.shape)}; expected {whose}{expected}; {remedy}"
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
            f"its gradient is sparse (layout {grad.layout}); expected a dense one; use sparse=False in the embedding "
            "that makes it, or torch.optim's SGD, Adagrad or SparseAdam, which take sparse ones"
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


class _Part(NamedTuple):
    """A tensor of a parameter's state.

    Args:
        shape: if it is not the parameter's.
        dtype: the one that it must have; None for any that a number may have.
    """

    key: str
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


def _parts(
    param: Tensor, state: Mapping[str, Any], keys: Iterable[str], master: torch.dtype | None
) -> list[_Part]:
    """What a parameter's state has to consist of, given which of the states ``keys`` are codes of 8 bits."""
    coded = [key for key in keys if key != EMA and getattr(state.get(key), "dtype", None) in CODES]
    parts = [_Part(key, dtype=code_dtype(key) if key in coded else None) for key in keys]
    if master is not None:
        parts.append(_Part(MASTER, dtype=master))
    shape = scales_shape(param.shape)
    return parts + [_Part(scale_key(key), shape, torch.float32) for key in coded]


_ANEW = "load a checkpoint that fits, or drop this parameter's state to begin anew"


def step_problem(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Any],
    plan: Plan,
    group: Mapping[str, Any],
) -> str | None:
    """Why this parameter cannot be stepped, or ``None``."""
    keys = plan.keys
    if problem := tensors_problem(param, grad):
        return problem
    kind = group.get("master_weights")
    if (MASTER in state) != (kind is not None):
        return (
            f"state 'master' is {'missing' if kind else 'there'}, and its group has master_weights={kind!r}; expected "
            "it only where that is set; to change it, load the optimizer's own state_dict() after it"
        )
    seen = {"the parameter": param}
    for part in _parts(param, state, keys, kind and MASTERS[kind]):
        t, what = state.get(part.key), f"state '{part.key}'"
        if not isinstance(t, Tensor):
            got = "is missing" if part.key not in state else f"is a {type(t).__name__}"
            shape = tuple(part.shape or param.shape)
            return f"{what} {got}; expected a tensor of shape {shape}; {_ANEW}"
        if problem := _part_problem(param, t, what, _ANEW, part.shape) or _memory_problem(
            t, what, part.dtype
        ):
            return problem
        if t.is_inference() and not torch.is_inference_mode_enabled():
            return (
                f"{what} was made in inference mode and cannot be written outside of it; clone() it"
            )
        for name, other in seen.items():
            if _same_memory(t, other):
                return f"{what} lies in the same memory as {name}; expected its own; clone() it"
        if may_overlap(t):
            return f"elements of {what} may share memory (strides {t.stride()}); expected its own; {_ANEW}"
        if part.key in keys and t.dtype in CODES and group.get("state_dtype") != "int8":
            return (
                f"{what} has codes of 8 bits, and its group has state_dtype={group.get('state_dtype')!r}; expected "
                "'int8'; to change it, load the optimizer's own state_dict() after it"
            )
        if part.dtype is not None and part.key != MASTER and not t.is_contiguous():
            return f"{what} has strides {t.stride()}; expected a contiguous tensor; {_ANEW}"
        seen[what] = t
    for key in (STEP, plan.carried):
        if key is None:
            continue
        count = state.get(key)
        if not isinstance(count, Tensor) or count.numel() != 1:
            got = f"a {type(count).__name__}"
            if isinstance(count, Tensor):
                got = f"of shape {tuple(count.shape)}"
            elif key not in state:
                got = "missing"
            return f"state '{key}' is {got}; expected a tensor with one number; load a checkpoint that fits"
        if count.dtype not in _count_dtypes(key):
            return (
                f"state '{key}' has dtype {count.dtype}; expected {_any_of(_count_dtypes(key))}; "
                "load a checkpoint that fits"
            )
        if count.device.type != "cpu" and count.device != param.device:
            return f"state '{key}' is on {count.device}; expected cpu or the parameter's {param.device}; move it there"
        if count.device != (beside := state[STEP].device):
            return f"state '{key}' is on {count.device}; expected the device of 'step', {beside}; move it there"
        if count.device.type == "cpu" and not count_is_valid(count, key):
            return (
                f"state '{key}' is {count.item()}; expected a number from 0 to {_most(key)}; "
                "load a checkpoint that fits"
            )
    return None


def _most(key: str) -> str:
    return "2^53" if key == STEP else "1"


def _count_dtypes(key: str) -> tuple[torch.dtype, ...]:
    return _COUNTS if key == STEP else _COUNTS[:2]


def _any_of(dtypes: Sequence[torch.dtype]) -> str:
    *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(most)} or {last}"


def count_is_valid(count: Tensor | float, key: str = STEP) -> bool:
    """A count is one of the whole numbers that a double holds, and what is carried beside it at most 1."""
    most = 2**53 - 1 if key == STEP else 1
    return 0 <= float(count) <= most  # not so for NaN


def load_problem(
    param: Tensor,
    state: Mapping[str, Any],
    plan: Plan,
    known: Sequence[str],
    master: str | None = None,
) -> str | None:
    """Why this entry of a state dict does not fit the parameter, which has these ``master_weights``, or ``None``."""
    counts = (STEP,) if plan.carried is None else (STEP, plan.carried)
    missing = [key for key in (*counts, *plan.keys) if key not in state]
    if missing:
        return (
            f"the checkpoint lacks {_names(missing)}; it has {_names(state)}; it was saved by another optimizer, or "
            "with other options"
        )
    beside = state.get(MASTER)
    parts = _parts(
        param,
        state,
        [key for key in known if key in state],
        getattr(beside, "dtype", torch.float32) if MASTER in state else None,
    )
    unknown = [key for key in state if key not in counts and all(key != part.key for part in parts)]
    if unknown == ["ema"]:
        return (
            "the checkpoint has 'ema', an average of the weights, and this optimizer keeps none; make it with "
            "ema_decay to go on with it, or drop 'ema' from the states"
        )
    if unknown:
        return f"the checkpoint has {_names(unknown)}, which this optimizer does not know; expected {_names(known)}"
    for part in parts:
        if part.key not in state:
            return f"the checkpoint lacks '{part.key}', without which codes of 8 bits mean nothing; it is not whole"
        if problem := _saved_problem(param, state[part.key], part):
            return problem
    if beside is not None and beside.dtype not in MASTERS.values():
        return (
            f"'master' in the checkpoint has dtype {beside.dtype}; expected one of "
            f"{', '.join(map(str, MASTERS.values()))}"
        )
    if master is not None and beside is not None:
        kind = next(kind for kind, dtype in MASTERS.items() if dtype == beside.dtype)
        if master_problem(param.dtype, kind):
            return (
                f"'master' in the checkpoint has dtype {beside.dtype}, which does not go with the parameter's "
                f"{param.dtype}; it was saved for another model"
            )
    for key in counts:
        count = state[key]
        if isinstance(count, Tensor):
            # torch's load_state_dict casts all but the step to the parameter's dtype, and that is then saved.
            fits = count.dtype in _count_dtypes(key) or (key != STEP and count.is_floating_point())
            if count.numel() != 1 or not fits or count.device.type == "meta":
                return (
                    f"'{key}' in the checkpoint has shape {tuple(count.shape)} and dtype {count.dtype} on "
                    f"{count.device}; expected one number, {_any_of(_count_dtypes(key))}"
                )
        elif not isinstance(count, (int, float)) or isinstance(count, bool):
            return f"'{key}' in the checkpoint is a {type(count).__name__}; expected one number"
        if not count_is_valid(count, key):
            return f"'{key}' in the checkpoint is {float(count)}; expected a number from 0 to {_most(key)}"
    return None


def _saved_problem(param: Tensor, t: Any, part: _Part) -> str | None:
    """Why a tensor of a checkpoint does not go with the parameter, if so."""
    what = f"'{part.key}' in the checkpoint"
    if not isinstance(t, Tensor):
        return f"{what} is a {type(t).__name__}; expected a tensor"
    expected = tuple(part.shape or param.shape)
    if t.shape != expected:
        whose = "" if part.shape else "the parameter's "
        return (
            f"{what} has shape {tuple(t.shape)}; expected {whose}{expected}; "
            "it was saved for another model or another order of parameters"
        )
    fits = is_supported(t.dtype) if part.dtype is None else t.dtype == part.dtype
    if not fits or t.is_complex() != param.is_complex():
        return (
            f"{what} has dtype {t.dtype}, which does not go with the parameter's {param.dtype}; "
            "it was saved for another model"
        )
    here = local(t)
    shape = local(param).shape
    if here.shape != (scales_shape(shape) if part.shape else shape):
        return (
            f"{what} has shape {tuple(here.shape)} on this rank, where the parameter has {tuple(shape)}; expected it "
            "sharded as the parameter; load it by torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    if stands_for_another(here):
        return None
    if problem := _memory_problem(here, what, part.dtype):
        return problem
    if part.dtype is not None and part.key != MASTER and not here.is_contiguous():
        return f"{what} has strides {here.stride()}; expected a contiguous tensor"
    if part.shape and not are_scales(here):
        return (
            f"{what} has numbers that are no scales; expected powers of two from 2^-90 to 2^127, 1.5 times one, "
            "or 0; the checkpoint is damaged"
        )
    return None


def _names(keys: Any) -> str:
    return ", ".join(f"'{key}'" for key in keys) or "nothing"
