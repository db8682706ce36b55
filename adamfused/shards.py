"""Of a sharded tensor (DTensor), what this rank holds of it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def local(t: Any) -> Any:
    """What a DTensor holds on this rank; anything else as it is."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return t._local_tensor if tensors is not None and isinstance(t, tensors.DTensor) else t


def first_flat(params: Iterable[Any]) -> Any:
    """The first that FullyShardedDataParallel has flattened, whose parts on other ranks nothing tells of; or None."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return next((p for p in params if hasattr(p, "_fsdp_flattened")), None)


def local_gradient(p: Tensor) -> Tensor:
    """A parameter's gradient as this rank holds it, where it has one: sharded as the parameter is."""
    grad: Any = p.grad
    if local(p) is not p and local(grad) is not grad and grad.placements != p.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    result: Tensor = local(grad)
    return result


def first_number(t: Any) -> int | None:
    """The place of the first number that this rank holds in the whole tensor, row by row, a complex one being two; None
    if what it holds are not whole rows."""
    if local(t) is t:
        return 0
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not all(place == Shard(0) or place.is_replicate() for place in t.placements):
        return None
    _, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    first = int(offset[0]) * t.shape[1:].numel() if offset else 0
    return 2 * first if t.is_complex() else first


def in_shards_of(t: Any, part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What is sharded as ``t`` is and has this ``part`` on this rank and ``shape`` as a whole, contiguous; for a ``t``
    that is no DTensor, ``part`` itself."""
    if local(t) is t:
        return part
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(part, t.device_mesh, t.placements, shape=size, stride=stride)
