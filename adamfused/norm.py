"""The norm of the gradients, and what clipping by it multiplies them by.

The sum over all numbers is taken in an order that depends on nothing but the tensors, so that it has the same bits for
any number of threads, any instruction set and on a GPU. The twin of ``csrc/sum.h``: the numbers of a tensor, as the
parameter lies in memory, come in chunks of 4,096; in a chunk 32 sums run side by side and are joined by halves; the
sums of the chunks are a list that is summed in the same way, until one is left. All in float64, where the square of a
float32 is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import checks
from .rules import larger, root
from .shards import first_flat, local, local_gradient

CHUNK, LANES = 4096, 32
NORM_TYPES = (2.0, float("inf"))


def check_norm(max_grad_norm: Any, norm_type: float) -> float | None:
    """``max_grad_norm`` as a plain number."""
    try:
        valid = max_grad_norm is None or bool(max_grad_norm > 0)
    except (TypeError, ValueError, RuntimeError):  # also of more than one number
        valid = False
    if not valid:
        raise ValueError(
            f"Invalid max_grad_norm value: {max_grad_norm!r}; expected None (no clipping) or a number above 0"
        )
    if norm_type not in NORM_TYPES:
        raise ValueError(
            f"Invalid norm_type value: {norm_type}; expected 2.0 or float('inf'); for other norms call "
            "torch.nn.utils.clip_grad_norm_ before step()"
        )
    return None if max_grad_norm is None else float(max_grad_norm)


def coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What :func:`torch.nn.utils.clip_grad_norm_` multiplies gradients by; a NaN stays. float64."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


# ---- the oracle --------------------------------------------------------------------------------------------


def _in_order(p: Tensor, g: Tensor) -> Tensor:
    """A gradient's numbers in float64, in the order in which the parameter lies in memory; by its indices where that
    has holes. Complex ones as pairs."""
    dense = sum(st * (si - 1) for st, si in zip(p.stride(), p.shape, strict=True)) + 1 == p.numel()
    strides = p.stride() if dense else torch.empty(p.shape, device="meta").stride()
    flat = torch.empty_strided(p.shape, strides, dtype=g.dtype, device=g.device).copy_(g)
    flat = flat.as_strided((p.numel(),), (1,))
    return (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).double()


def _sums_of_chunks(x: Tensor, of: Callable[[Tensor], Tensor], largest: bool) -> Tensor:
    chunks = -(-x.numel() // CHUNK)
    height = CHUNK // LANES if chunks > 1 else -(-x.numel() // LANES)
    rows = torch.nn.functional.pad(x, (0, chunks * height * LANES - x.numel()))
    rows = rows.view(chunks, height, LANES)

    def join(a: Tensor, b: Tensor) -> Tensor:
        return larger(a, b) if largest else a + b

    lanes = torch.zeros(chunks, LANES, dtype=torch.float64, device=x.device)
    for r in range(rows.shape[1]):
        lanes = join(lanes, of(rows[:, r]))
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = join(lanes[:, :half], lanes[:, half:])
    return lanes[:, 0]


def _square(x: Tensor) -> Tensor:
    return x * x


def reference_sum(params: Sequence[Tensor], grads: Sequence[Tensor], largest: bool) -> Tensor:
    """The sum of the squares of all numbers of gradients of one device, or the largest magnitude: float64, 0-dim."""
    first = torch.abs if largest else _square
    sums = torch.cat(
        [
            _sums_of_chunks(_in_order(p, g), first, largest)
            for p, g in zip(params, grads, strict=True)
        ]
    )
    while sums.numel() > 1:
        sums = _sums_of_chunks(sums, torch.clone, largest)
    return sums[0] if sums.numel() else torch.zeros((), dtype=torch.float64, device=sums.device)


# ---- the norm over devices and ranks ---------------------------------------------------------------------------


def _shards(p: Any) -> tuple[Any, tuple[int, ...]] | None:
    """The mesh that a DTensor is sharded over, and the dimensions of the mesh; None if this rank holds all of it."""
    if local(p) is p:
        return None
    dims = tuple(i for i, place in enumerate(p.placements) if not place.is_replicate())
    return (p.device_mesh, dims) if dims else None


def _sums(
    params: Sequence[Tensor], grads: Sequence[Tensor], largest: bool, native: ModuleType | None
) -> list[Tensor]:
    """One sum for each device, and one more for what only the reference can read there."""
    sums: list[Tensor] = []
    left = range(len(params))
    if native is not None:
        sums, left = native.gradient_sums(list(params), list(grads), largest)
    by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for i in left:
        ps, gs = by_device.setdefault(params[i].device, ([], []))
        ps.append(params[i])
        gs.append(grads[i])
    return sums + [reference_sum(ps, gs, largest) for ps, gs in by_device.values()]


def _joined(parts: Sequence[Tensor], largest: bool) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        part = part.to(total.device)
        total = larger(total, part) if largest else total + part
    return total


def _root_of(sums: Sequence[Tensor], largest: bool) -> Tensor:
    if not sums:
        return torch.zeros((), dtype=torch.float64)
    total = _joined(sums, largest)
    return total if largest else root(total)


@torch.no_grad()
def total_norm(
    params: Sequence[Any],
    norm_type: float,
    native: ModuleType | None,
    place: Callable[[Any], str],
) -> Tensor:
    """The norm of the gradients of all parameters that have one: float64, 0-dim, on the first one's device.

    Of sharded ones (DTensor) it is that of the whole gradients: every rank calls this, and there is one all-reduce for
    each dimension of a mesh that parameters are sharded over.

    Raises:
        RuntimeError: if a gradient cannot be read, with ``place`` of its parameter.
    """
    if (flat := first_flat(params)) is not None:
        raise RuntimeError(
            f"{place(flat)}: FullyShardedDataParallel has flattened it, so a rank knows the norm of its own part of "
            "the gradients only; expected a whole parameter or a DTensor; call clip_grad_norm_() of the "
            "FullyShardedDataParallel before step() and leave max_grad_norm out, or use "
            "torch.distributed.fsdp.fully_shard"
        )
    largest = norm_type == float("inf")
    if native is not None:
        sums, left = native.gradient_sums(params, None, largest)
        if not left:
            return _root_of(sums, largest)
    of_shards: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for p in params:
        if not isinstance(p, Tensor) or p.grad is None:
            continue  # what is no tensor is refused by the step
        here, grad = local(p), local_gradient(p)
        problem = checks.tensors_problem(here, grad)
        if problem is None and largest and grad.is_complex():
            problem = f"its gradient is {grad.dtype}; expected a real one for norm_type=inf; use norm_type=2.0"
        if problem:
            raise RuntimeError(f"{place(p)}: {problem}")
        ps, gs = of_shards.setdefault(_shards(p), ([], []))
        ps.append(here)
        gs.append(grad)
    sums = []
    for shards, (ps, gs) in of_shards.items():
        parts = _sums(ps, gs, largest, native)
        if shards is not None:
            parts = [_joined(parts, largest)]
            mesh, dims = shards
            reduce = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
            for dim in dims:
                torch.distributed.all_reduce(parts[0], reduce, mesh.get_group(dim))
        sums += parts
    return _root_of(sums, largest)
