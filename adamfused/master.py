"""The float32 weights of a model that trains with ``master_weights``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import formats
from .base import check_is_ours
from .optimizer import FusedOptimizer
from .shards import local
from .storage import EMA, MASTER, new_master, weight


def fp32_weights(model: torch.nn.Module, optimizer: FusedOptimizer) -> dict[str, Any]:
    """``model.state_dict()`` with the float32 weights in the place of the parameters that have ``master_weights``.

    Those weights are new tensors, sharded as the parameters are; everything else is as ``state_dict()`` gives it.

    Args:
        model: what the optimizer trains.
        optimizer: what keeps the masters.

    Raises:
        RuntimeError: inside of ``swap_ema()``.
        TypeError: if the optimizer is not of adamfused.
        ValueError: if none of the model's parameters is the optimizer's.

    Example:
        >>> import torch, adamfused
        >>> model = torch.nn.Linear(2, 1).bfloat16()
        >>> optimizer = adamfused.AdamW(model.parameters(), lr=1e-4, master_weights="split16")
        >>> model(torch.ones(1, 2).bfloat16()).sum().backward()
        >>> optimizer.step()
        >>> weights = adamfused.fp32_weights(model, optimizer)
        >>> weights["weight"].dtype, weights["weight"].equal(model.weight.float())
        (torch.float32, False)
    """
    result: dict[str, Any] = model.state_dict()
    for name, (p, _) in _with_master(model, optimizer, "fp32_weights").items():
        if name in result:
            result[name] = weight(p, optimizer.state.get(p, {}).get(MASTER)).float()
    return result


@torch.no_grad()
def load_fp32_weights(
    model: torch.nn.Module, optimizer: FusedOptimizer, weights: Mapping[str, Any]
) -> None:
    """Puts back what :func:`fp32_weights` gave, or any state dict of such a model, in any dtype.

    Parameters with ``master_weights`` get the rounded weight and their masters the rest; everything else is loaded as
    ``model.load_state_dict`` does. Other states stay as they are.

    Args:
        model: what the optimizer trains.
        optimizer: what keeps the masters; makes the states of parameters that have none yet.
        weights: a value for each name in ``model.state_dict()``, of the same shape.

    Raises:
        RuntimeError: inside of ``swap_ema()``.
        TypeError: if the optimizer is not of adamfused.
        ValueError: if none of the model's parameters is the optimizer's, or if a name is missing or unknown or has
            another shape; nothing is written then.

    Example:
        >>> import torch, adamfused
        >>> model = torch.nn.Linear(2, 1).bfloat16()
        >>> optimizer = adamfused.AdamW(model.parameters(), master_weights="split16")
        >>> weights = {"weight": torch.tensor([[0.1, 0.2]]), "bias": torch.zeros(1)}
        >>> adamfused.load_fp32_weights(model, optimizer, weights)
        >>> model.weight.dtype, adamfused.fp32_weights(model, optimizer)["weight"]
        (torch.bfloat16, tensor([[0.1000, 0.2000]]))
    """
    masters = _with_master(model, optimizer, "load_fp32_weights")
    _check_weights(model.state_dict(), weights, masters)
    model.load_state_dict(weights)
    for name, (p, group) in masters.items():
        if name not in weights:
            continue
        is_new = not optimizer.state.get(p)
        if is_new:
            optimizer.state[p] = optimizer._new_state(p, group, optimizer._full_plan(group))
        state = optimizer.state[p]
        if MASTER not in state:
            state[MASTER] = new_master(p, group["master_weights"])
        value = local(weights[name]).to(device=p.device, dtype=torch.float32)
        formats.put(value, local(p), local(state[MASTER]))
        if is_new and EMA in state:
            state[EMA] = optimizer._new_average(p, state[MASTER])


def _with_master(
    model: torch.nn.Module, optimizer: FusedOptimizer, caller: str
) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """The parameters of the model that have a master, and their groups."""
    check_is_ours(f"{caller}: optimizer", optimizer)
    if optimizer._swapped:
        raise RuntimeError(
            f"{caller}() inside of swap_ema(), where averaged weights are in the place of the trained ones; expected "
            "the trained ones; call it outside"
        )
    groups = {p: optimizer.param_groups[j] for j, _, p in optimizer._each()}
    named = list(model.named_parameters(remove_duplicate=False))
    if named and not any(p in groups for _, p in named):
        raise ValueError(
            f"none of the {len(named)} parameters of the model is one of this optimizer; expected the model that it "
            "trains"
        )
    return {
        name: (p, groups[p])
        for name, p in named
        if p in groups and groups[p].get("master_weights") is not None
    }


def _check_weights(
    expected: Mapping[str, Any], weights: Mapping[str, Any], masters: Mapping[str, Any]
) -> None:
    for what, names in (
        ("lack", [name for name in expected if name not in weights]),
        ("have unknown", [name for name in weights if name not in expected]),
    ):
        if names:
            listed = ", ".join(map(repr, names[:3]))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"weights {what} {listed}{more}; expected the names of model.state_dict(); they are of another model"
            )
    for name, value in weights.items():
        wanted = expected[name]
        if not isinstance(wanted, Tensor):
            continue
        if not isinstance(value, Tensor) or (name in masters and not value.is_floating_point()):
            got = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"weights[{name!r}]: got {got}; expected a tensor of floating dtype")
        for is_there, shape in (
            (value.shape, wanted.shape),
            (local(value).shape, local(wanted).shape),
        ):
            if is_there != shape:
                raise ValueError(
                    f"weights[{name!r}] has shape {tuple(is_there)}; expected {tuple(shape)}, sharded as in the "
                    "model; they are of another model"
                )
