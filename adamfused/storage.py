"""What is kept of a parameter, and in which formats: its states, its master weight, and from a checkpoint.

The state of a parameter has "step", a number that the rule carries, if it does, the rule's states, maybe "ema", maybe
"master" and maybe a "KEY_scale" for each state that is kept in 8 bits, in this order. How the numbers lie in these
tensors is told by `adamfused.formats`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import formats
from .formats import CODES, FORMATS, Random
from .shards import first_number, in_shards_of, local

StateDtype = torch.dtype | str | None

STEP = "step"
"""The key of a state: the count of the steps that the parameter has made."""
EMA = "ema"
"""The key of a state: the average of the weights."""
MASTER = "master"
"""The key of a state: what lies beside the parameter."""
MASTERS = {"split16": torch.int16, "split8": torch.int8, "fp32": torch.float32}
"""What ``master_weights`` may be, and the dtype of what then lies beside the parameter."""
SMALLEST = 4096
"""Parameters with fewer elements keep their states in float32 where others have codes of 8 bits."""
_NEVER_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta")


def scale_key(key: str) -> str:
    """The key of a state's scales."""
    return f"{key}_scale"


def code_dtype(key: str) -> torch.dtype:
    """The dtype of a state's codes."""
    return torch.uint8 if key in _NEVER_NEGATIVE else torch.int8


# ---- options -------------------------------------------------------------------------------------------------------


def check_state_dtype(value: StateDtype, name: str = "state_dtype") -> None:
    words = (None, "param", "int8") if name == "state_dtype" else (None, "param")
    if not (value in words or value in FORMATS):
        raise ValueError(
            f"Invalid {name} value: {value!r}; expected None (at least float32), "
            + ", ".join(map(repr, words[1:]))
            + " or one of "
            + ", ".join(map(str, FORMATS))
        )


def check_options(group: Mapping[str, Any]) -> None:
    """Raises ValueError if an option of formats has a value that does not exist."""
    check_state_dtype(group.get("state_dtype"))
    kind = group.get("master_weights")
    if kind not in (None, *MASTERS):
        raise ValueError(
            f"Invalid master_weights value: {kind!r}; expected None or one of {', '.join(map(repr, MASTERS))}"
        )
    at_random = group.get("stochastic_rounding", False)
    if not isinstance(at_random, bool):
        raise ValueError(
            f"Invalid stochastic_rounding value: {at_random!r}; expected True or False"
        )
    seed_of(group)


def seed_of(group: Mapping[str, Any]) -> int:
    """The seed of a group as a plain number. Raises ValueError if it is none."""
    seed = group.get("seed", 0)
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if isinstance(seed, bool) or not 0 <= number < 2**64:
        raise ValueError(f"Invalid seed value: {seed!r}; expected an integer from 0 to 2^64 - 1")
    return number


def master_problem(dtype: torch.dtype, kind: str | None) -> str | None:
    """Why a parameter of this dtype cannot have such a master weight, or ``None``."""
    expected = (torch.bfloat16, torch.float16) if kind == "fp32" else (torch.bfloat16,)
    if kind is None or dtype in expected:
        return None
    has_all = "float32 weights need no master; " if dtype == torch.float32 else ""
    return (
        f"its group has master_weights={kind!r} and it has dtype {dtype}; expected "
        f"{' or '.join(map(str, expected))}; {has_all}put it in a group with master_weights=None"
    )


def rounding_problem(
    param: Tensor, group: Mapping[str, Any], states: Sequence[torch.dtype]
) -> str | None:
    """Why a parameter with states of these dtypes cannot be rounded at random, or ``None``."""
    if not group.get("stochastic_rounding") or first_number(param) is not None:
        return None
    halves = (torch.bfloat16, torch.float16, torch.complex32)
    parts = states if group.get("master_weights") else (param.dtype, *states)
    if not any(dtype in halves for dtype in parts):
        return None
    placements: Any = param.placements  # type: ignore[attr-defined]
    return (
        f"stochastic_rounding=True for numbers of 16 bits, and its placements are {tuple(placements)}; expected "
        "Shard(0) or Replicate(), where each number has the random bits that it has in the whole parameter; put it in "
        "a group with stochastic_rounding=False"
    )


# ---- what is kept --------------------------------------------------------------------------------------------------


def state_dtype_for(param: Tensor, wish: StateDtype, key: str) -> torch.dtype:
    """The dtype of a parameter's state."""
    if wish is None:
        return torch.promote_types(param.dtype, torch.float32)
    if wish == "param":
        return param.dtype
    if wish == "int8":
        if _may_have_codes(param):
            return code_dtype(key)
        wish = torch.float32
    assert isinstance(wish, torch.dtype)
    return wish.to_complex() if param.is_complex() else wish


def _may_have_codes(param: Tensor) -> bool:
    """Sharded ones only if every shard has whole blocks, the same as in the whole parameter."""
    if param.is_complex() or param.numel() < SMALLEST:
        return False
    by_rows = first_number(param) is not None and param.shape[1:].numel() % formats.BLOCK == 0
    return by_rows or local(param) is param


def new_state(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros: codes of 8 bits in row-major order, else as the parameter lies in memory."""
    order = torch.contiguous_format if dtype in CODES else torch.preserve_format
    return torch.zeros_like(param, dtype=dtype, memory_format=order, requires_grad=False)


def fill(param: Tensor, state: Tensor, scale: Tensor | None, number: float, seed: int) -> None:
    """Sets all numbers of a new state: of complex ones, both parts."""
    if scale is None:
        state.fill_(complex(number, number) if state.is_complex() else number)
        return
    here = local(state)
    numbers = torch.full(here.shape, number, dtype=torch.float32, device=here.device)
    random = Random.at_step(formats.place_key(seed, 0), 0.0, first_number(param) or 0)
    formats.put(numbers, here, local(scale), random)


def new_scale(param: Tensor) -> Tensor:
    """The scales of zeros, one a block."""
    here = local(param)
    scale = torch.zeros(formats.scales_shape(here.shape), dtype=torch.float32, device=here.device)
    return in_shards_of(param, scale, formats.scales_shape(param.shape))


def new_master(param: Tensor, kind: str) -> Tensor:
    """That of a weight which is the parameter as it is."""
    if kind == "fp32":
        return param.detach().to(torch.float32, memory_format=torch.preserve_format)
    return torch.zeros_like(param, dtype=MASTERS[kind], requires_grad=False)


def weight(param: Tensor, master: Tensor | None) -> Tensor:
    """The parameter, or the float32 weight of which it is the visible part."""
    if master is None:
        return param.detach()
    joined = formats.get(local(param.detach()), torch.float32, local(master))
    return in_shards_of(param, joined, param.shape)


# ---- from another format -------------------------------------------------------------------------------------------


def converted(
    param: Tensor,
    saved: Mapping[str, Any],
    group: Mapping[str, Any],
    counts: Sequence[str],
    known: Sequence[str],
    random: Random,
) -> dict[str, Any]:
    """The entry of a checkpoint in the formats of this parameter's group. What has its format keeps its bits.

    Args:
        counts: the names of its numbers.
        known: every name of a state that the rule may have, in its order.
        random: that of the checkpoint's step, for codes.
    """
    entry = {
        key: value.to(device=param.device)
        if isinstance(value, Tensor) and key not in counts
        else value
        for key, value in saved.items()
    }
    result = {key: entry[key] for key in counts}
    scales: dict[str, Tensor] = {}
    wish = group.get("state_dtype")
    for slot, key in enumerate(known, start=2):
        if key not in entry:
            continue
        value, scale = entry[key], entry.get(scale_key(key))
        kept = wish is None and scale is None
        dtype = value.dtype if kept else state_dtype_for(param, wish, key)
        value, scale = _in_dtype(param, value, scale, dtype, random.of(slot))
        result[key] = value
        if scale is not None:
            scales[scale_key(key)] = scale
    if EMA in entry:
        result[EMA] = entry[EMA]
    if kind := group.get("master_weights"):
        result[MASTER] = _master_in(param, entry.get(MASTER), kind)
    return result | scales


def in_float32(
    param: Tensor, entry: Mapping[str, Any], counts: Sequence[str], known: Sequence[str]
) -> dict[str, Any]:
    """The entry of a checkpoint with these numbers and states only, codes of 8 bits as float32."""
    result = {key: entry[key] for key in counts if key in entry}
    for key in known:
        if key in entry:
            value, scale = entry[key], entry.get(scale_key(key))
            dtype = value.dtype if scale is None else torch.float32
            result[key], _ = _in_dtype(param, value, scale, dtype)
    return result


def _in_dtype(
    param: Tensor,
    value: Tensor,
    scale: Tensor | None,
    dtype: torch.dtype,
    random: Random | None = None,
) -> tuple[Tensor, Tensor | None]:
    if value.dtype == dtype or (scale is None and dtype not in CODES):
        return value.to(dtype), scale
    numbers = formats.get(local(value), torch.float32, local(scale))
    result = new_state(param, dtype)
    new = new_scale(param) if dtype in CODES else None
    formats.put(numbers, local(result), local(new), None if new is None else random)
    return result, new


def _master_in(param: Tensor, saved: Tensor | None, kind: str) -> Tensor:
    if saved is None:
        return new_master(param, kind)
    if saved.dtype == MASTERS[kind]:
        return saved
    master = torch.empty_like(param, dtype=MASTERS[kind], requires_grad=False)
    here, beside = local(param.detach()), local(master)
    visible = torch.empty_like(here)
    formats.put(formats.get(here, torch.float32, local(saved)), visible, beside)
    if kind == "split8":
        # 24 bits may round up to the next visible weight, and loading leaves parameters alone.
        beside.copy_(torch.where(visible == here, beside, 127))
    return master
