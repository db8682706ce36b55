"""What is refused, in which words, and that nothing has happened by then.

Every row of the tables provokes one refusal. The message is compared word for word; after it, every
bit, every key and every object is as it was before, also of the parameters and groups that come
first; and once the cause is mended, the step goes as if nothing had been.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_result
from torch import Tensor
from torch.optim import Optimizer

import adamfused
from adamfused import Adam, AdamW, RMSprop, backend

NAN = float("nan")
Undo = Callable[[], Any]


@pytest.fixture(
    params=[
        pytest.param("native", marks=pytest.mark.native),
        pytest.param("reference", marks=pytest.mark.reference),
    ]
)
def path(request) -> str:
    if request.param == "native" and backend.native() is None:
        pytest.skip("the extension is not loaded")
    return request.param


# ---- all there is to know of an optimizer --------------------------------------------------------


def facts(x: Any) -> Any:
    """``x`` as plain comparable data; a tensor by its identity, form, version and the bytes of its storage."""
    if isinstance(x, Tensor) and x.layout is not torch.strided:
        return id(x), str(x.layout), facts(x.coalesce().values())
    if isinstance(x, Tensor):
        form = (id(x), x.dtype, x.shape, x.stride(), x.storage_offset(), x.device, x._version)
        if x.device.type == "meta":
            return form
        return *form, torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy().tobytes()
    if isinstance(x, dict):
        return [(id(k) if isinstance(k, Tensor) else k, facts(v)) for k, v in x.items()]
    if isinstance(x, (list, tuple)):
        return [type(x), *map(facts, x)]
    return repr(x)


def everything(optimizer: Optimizer) -> Any:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return facts([optimizer.param_groups, optimizer.state, [p.grad for p in params], optimizer.defaults])


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameter(seed: int, *shape: int) -> torch.nn.Parameter:
    p = torch.nn.Parameter(numbers(seed, *shape))
    p.grad = numbers(seed + 100, *shape)
    return p


def build(make: type[Optimizer] = AdamW, steps: int = 2, **options: Any) -> Optimizer:
    """Two groups; the tables spoil parameter 1 of group 1, which has shape (2, 3)."""
    optimizer = make(
        [
            {"params": [parameter(0, 4), parameter(1, 2, 2)]},
            {"params": [parameter(2, 5), parameter(3, 2, 3), parameter(4, 1)], "lr": 0.01},
        ],
        **options,
    )
    for _ in range(steps):
        optimizer.step()
    return optimizer


def the_one(optimizer: Optimizer) -> Any:
    return optimizer.param_groups[1]["params"][1]


# ---- at the step ---------------------------------------------------------------------------------

PLACE = "AdamW: parameter 1 of group 1: "
DTYPES = "float32, float64, bfloat16 or float16, or a complex dtype made of one of these"
ANEW = "load a checkpoint that fits, or drop this parameter's state to begin anew"


def gradient(change: Callable[[Tensor], Tensor]) -> Callable[[Optimizer], Undo]:
    def provoke(optimizer: Optimizer) -> Undo:
        p = the_one(optimizer)
        good = p.grad
        p.grad, p.grad_dtype = None, None
        p.grad = change(good)
        return lambda: setattr(p, "grad", good)

    return provoke


def data(change: Callable[[Tensor], Tensor]) -> Callable[[Optimizer], Undo]:
    def provoke(optimizer: Optimizer) -> Undo:
        p = the_one(optimizer)
        good = p.data
        p.data = change(good)
        return lambda: setattr(p, "data", good)

    return provoke


def state(key: str, change: Callable[[Tensor], Any]) -> Callable[[Optimizer], Undo]:
    def provoke(optimizer: Optimizer) -> Undo:
        entry = optimizer.state[the_one(optimizer)]
        good = dict(entry)
        entry[key] = change(entry[key])
        if entry[key] is None:
            del entry[key]
        return lambda: (entry.clear(), entry.update(good))

    return provoke


def count(value: Any) -> Callable[[Optimizer], Undo]:
    return state("step", lambda _: value)


def freed(get: Callable[[Optimizer], Tensor]) -> Callable[[Optimizer], Undo]:
    def provoke(optimizer: Optimizer) -> Undo:
        t = get(optimizer)
        good, storage = t.detach().clone(), t.untyped_storage()
        storage.resize_(0)
        return lambda: (storage.resize_(24), t.detach().copy_(good))

    return provoke


def moment(optimizer: Optimizer) -> Tensor:
    return optimizer.state[the_one(optimizer)]["exp_avg"]


def hyper(key: str, value: Any) -> Callable[[Optimizer], Undo]:
    def provoke(optimizer: Optimizer) -> Undo:
        group = optimizer.param_groups[1]
        good = group[key]
        group[key] = value
        return lambda: group.__setitem__(key, good)

    return provoke


FREED = "has been freed: its storage has 0 bytes, and 6 elements of 4 bytes lie in it; step while it is allocated"
META = "is on the meta device, which has no memory; materialise it first, as with Module.to_empty()"
Row = tuple[Callable[[Optimizer], Undo], str]

TENSORS: dict[str, Row] = {
    "sparse gradient": (
        gradient(Tensor.to_sparse),
        "its gradient is sparse (layout torch.sparse_coo); expected a dense one; use torch.optim.SparseAdam, or "
        "sparse=False in the embedding that makes it",
    ),
    "integer gradient": (
        gradient(lambda g: g.int()),
        f"its gradient has dtype torch.int32; expected {DTYPES}",
    ),
    "float8 gradient": (
        gradient(lambda g: g.to(torch.float8_e4m3fn)),
        f"its gradient has dtype torch.float8_e4m3fn; expected {DTYPES}",
    ),
    "complex gradient": (
        gradient(lambda g: g.cfloat()),
        "its gradient has dtype torch.complex64; expected a real one, as the parameter's torch.float32; "
        "backward() gives such a gradient",
    ),
    "freed gradient": (freed(lambda o: the_one(o).grad), f"the memory of its gradient {FREED}"),
    "gradient of another shape": (
        data(lambda p: p[:, :2].clone()),
        "its gradient has shape (2, 3); expected the parameter's shape (2, 2); backward() gives such a gradient",
    ),
    "gradient on another device": (data(lambda p: p.to("meta")), f"it {META}"),
    "freed parameter": (freed(the_one), f"the memory of it {FREED}"),
    "integer parameter": (data(lambda p: p.int()), f"it has dtype torch.int32; expected {DTYPES}"),
    "float8 parameter": (
        data(lambda p: p.to(torch.float8_e5m2)),
        f"it has dtype torch.float8_e5m2; expected {DTYPES}",
    ),
    "expanded parameter": (
        data(lambda p: p[:1].clone().expand(2, 3)),
        "some of its elements may share memory (shape (2, 3), strides (0, 1)), so an update in place has no meaning; "
        "expected each element in its own place; make the parameter from a clone()",
    ),
    "overlapping parameter": (
        data(lambda p: torch.ones(4).as_strided((2, 3), (1, 1))),
        "some of its elements may share memory (shape (2, 3), strides (1, 1)), so an update in place has no meaning; "
        "expected each element in its own place; make the parameter from a clone()",
    ),
}
