"""How many bytes an optimizer and its parameters take, and how many a step moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .formats import CODES, scales_shape
from .shards import local
from .states import States
from .storage import EMA, MASTER, MASTERS, state_dtype_for

_PASSES = {"gradient": 1, "copy": 1}  # the others are read and written


@dataclass(frozen=True)
class MemorySummary:
    """Bytes by kind of tensor: "parameter", "gradient", "copy", each state by its name, "ema", "master" and "scales".

    Args:
        parameters: how many numbers the parameters have; of sharded ones, on this rank.
        resident: the bytes that are kept. The step counts, four bytes a tensor, are not in it.
        moved: the bytes that a step reads and writes. Gradients are read twice where they are clipped.
    """

    parameters: int
    resident: dict[str, int]
    moved: dict[str, int]

    @property
    def resident_bytes(self) -> int:
        return sum(self.resident.values())

    @property
    def moved_bytes(self) -> int:
        return sum(self.moved.values())

    def __str__(self) -> str:
        from .report import Column, Table

        columns = [
            Column("", left=True),
            Column("resident", "B/parameter"),
            Column("", "MB"),
            Column("moved", "B/parameter"),
            Column("", "MB"),
        ]
        kinds = [(kind, self.resident[kind], self.moved[kind]) for kind in self.resident]
        rows = [
            [kind, *(f"{x:.2f}" for b in both for x in (b / max(self.parameters, 1), b / 1e6))]
            for kind, *both in [*kinds, ("total", self.resident_bytes, self.moved_bytes)]
        ]
        return Table(f"Memory of {self.parameters:,} parameters", columns, rows).text()


def summary(optimizer: States) -> MemorySummary:
    """What ``optimizer.memory_summary()`` says."""
    passes = _PASSES | ({"gradient": 2} if optimizer._options.max_grad_norm is not None else {})
    resident: dict[str, int] = {}
    moved: dict[str, int] = {}
    parameters = 0
    for j, _, p in optimizer._each():
        here = local(p)
        parameters += here.numel()
        moves = p.requires_grad or p.grad is not None or bool(optimizer.state.get(p))
        sizes = {"parameter": _bytes(here)}
        if moves:
            sizes["gradient"] = _bytes(here if p.grad is None else local(p.grad))
            sizes |= {"copy": _bytes(local(optimizer._copies[p]))} if optimizer._copies else {}
            sizes |= _of_state(optimizer, p, optimizer.param_groups[j])
        for kind, size in sizes.items():
            resident[kind] = resident.get(kind, 0) + size
            moved[kind] = moved.get(kind, 0) + (passes.get(kind, 2) * size if moves else 0)
    return MemorySummary(parameters, resident, moved)


def _of_state(optimizer: States, p: Tensor, group: dict[str, Any]) -> dict[str, int]:
    """The bytes of a parameter's state, also of one that is still to be made."""
    state, here = optimizer.state.get(p, {}), local(p)
    wish, kind = group.get("state_dtype"), group.get("master_weights")
    sizes: dict[str, int] = {}
    scales = 0
    for key in optimizer._full_plan(group).keys:
        if key in state:
            dtype = state[key].dtype
        else:
            dtype = state_dtype_for(p, optimizer._options.ema_dtype if key == EMA else wish, key)
        sizes[key] = here.numel() * dtype.itemsize
        scales += 4 * math.prod(scales_shape(here.shape)) if dtype in CODES else 0
    if kind is not None:
        sizes[MASTER] = here.numel() * MASTERS[kind].itemsize
    return sizes | ({"scales": scales} if scales else {})


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()
