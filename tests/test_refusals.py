"""What is refused, in which words, and that nothing has happened by then.

Every row of the tables provokes one refusal. The message is compared word for word; after it, every
bit, every key and every object is as it was before, also of the parameters and groups that come
first; and once the cause is mended, the step goes as if nothing had been.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_result
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.optim import Optimizer

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
    return facts(
        [optimizer.param_groups, optimizer.state, [p.grad for p in params], optimizer.defaults]
    )


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameter(seed: int, *shape: int, **kw: Any) -> torch.nn.Parameter:
    p = torch.nn.Parameter(numbers(seed, *shape, **kw))
    p.grad = numbers(seed + 100, *shape, **kw)
    return p


def build(path: str, steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> Optimizer:
    """Two groups; the tables spoil parameter 1 of group 1, which has shape (2, 3)."""
    shapes = [[(4,), (2, 2)], [(5,), (2, 3), (1,)]]
    groups = [
        {"params": [parameter(7 * j + i, *s, dtype=dtype) for i, s in enumerate(g)]}
        for j, g in enumerate(shapes)
    ]
    optimizer = AdamW(groups, backend=path, **options)
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


def freed(get: Callable[[Optimizer], Tensor]) -> Callable[[Optimizer], Undo]:
    def provoke(optimizer: Optimizer) -> Undo:
        t = get(optimizer)
        good, storage = t.detach().clone(), t.untyped_storage()
        storage.resize_(0)
        return lambda: (storage.resize_(24), t.detach().copy_(good))

    return provoke


def moment(optimizer: Optimizer) -> Tensor:
    return optimizer.state[the_one(optimizer)]["exp_avg"]


def swapped(change: Callable[[Tensor], Tensor]) -> Callable[[Optimizer], Undo]:
    """Another parameter in the same place, as some frameworks have it before they materialise the model."""

    def provoke(optimizer: Optimizer) -> Undo:
        params, good = optimizer.param_groups[1]["params"], the_one(optimizer)
        params[1] = torch.nn.Parameter(change(good.detach()))
        params[1].grad = change(good.grad)
        return lambda: params.__setitem__(1, good)

    return provoke


FREED = "has been freed: its storage has 0 bytes, and 6 elements of 4 bytes lie in it; step while it is allocated"
META = "is on the meta device, which has no memory; materialise it first, as with Module.to_empty()"
OVERLAP = (
    "some of its elements may share memory (shape (2, 3), strides {}), so an update in place has no meaning; "
    "expected each element in its own place; make the parameter from a clone()"
)
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
    "parameter without memory": (swapped(lambda p: p.to("meta")), f"it {META}"),
    "freed parameter": (freed(the_one), f"the memory of it {FREED}"),
    "float8 parameter": (
        data(lambda p: p.to(torch.float8_e5m2)),
        f"it has dtype torch.float8_e5m2; expected {DTYPES}",
    ),
    "expanded parameter": (data(lambda p: p[:1].clone().expand(2, 3)), OVERLAP.format("(0, 1)")),
    "overlapping parameter": (
        data(lambda p: torch.ones(4).as_strided((2, 3), (1, 1))),
        OVERLAP.format("(1, 1)"),
    ),
    "fake parameter": (
        swapped(lambda p: FakeTensorMode().from_tensor(p)),
        "it is a FakeTensor, a tensor with operations of its own; expected a plain tensor or a DTensor",
    ),
}
A_COUNT = "expected a finite number of at least 0; load a checkpoint that fits"
ONE_COUNT = "expected a tensor with one number; load a checkpoint that fits"
STATES: dict[str, Row] = {
    "missing state": (
        state("exp_avg", lambda _: None),
        f"state 'exp_avg' is missing; expected a tensor of shape (2, 3); {ANEW}",
    ),
    "state that is a number": (
        state("exp_avg_sq", lambda _: 0.0),
        f"state 'exp_avg_sq' is a float; expected a tensor of shape (2, 3); {ANEW}",
    ),
    "short state": (
        state("exp_avg_sq", lambda s: s.flatten()[:5].clone()),
        f"state 'exp_avg_sq' has shape (5,); expected the parameter's shape (2, 3); {ANEW}",
    ),
    "integer state": (
        state("exp_avg", lambda s: s.long()),
        f"state 'exp_avg' has dtype torch.int64; expected {DTYPES}",
    ),
    "complex state": (
        state("exp_avg", lambda s: s.cfloat()),
        f"state 'exp_avg' has dtype torch.complex64; expected a real one, as the parameter's torch.float32; {ANEW}",
    ),
    "sparse state": (
        state("exp_avg", Tensor.to_sparse),
        "state 'exp_avg' has layout torch.sparse_coo; expected a dense tensor; convert it with to_dense()",
    ),
    "state on another device": (
        state("exp_avg", lambda s: s.to("meta")),
        f"state 'exp_avg' is on meta; expected the parameter's device cpu; {ANEW}",
    ),
    "expanded state": (
        state("exp_avg", lambda s: s[:1].clone().expand(2, 3)),
        f"elements of state 'exp_avg' may share memory (strides (0, 1)); expected its own; {ANEW}",
    ),
    "freed state": (freed(moment), f"the memory of state 'exp_avg' {FREED}"),
    "missing step": (state("step", lambda _: None), f"state 'step' is NoneType; {ONE_COUNT}"),
    "step that is a number": (state("step", lambda _: 3), f"state 'step' is int; {ONE_COUNT}"),
    "two steps": (
        state("step", lambda _: torch.ones(2)),
        f"state 'step' is of shape (2,); {ONE_COUNT}",
    ),
    "step that is not a number": (
        state("step", lambda _: torch.tensor(NAN)),
        f"state 'step' is nan; {A_COUNT}",
    ),
    "infinite step": (
        state("step", lambda _: torch.tensor(float("inf"))),
        f"state 'step' is inf; {A_COUNT}",
    ),
    "negative step": (
        state("step", lambda _: torch.tensor(-1)),
        f"state 'step' is -1; {A_COUNT}",
    ),
    "step without memory": (
        state("step", lambda s: s.to("meta")),
        "state 'step' is on meta; expected cpu or the parameter's cpu; move it there",
    ),
}


def check_refusal(optimizer: Optimizer, twin: Optimizer, row: Row) -> None:
    provoke, message = row
    mend = provoke(optimizer)
    before = everything(optimizer)
    with pytest.raises(RuntimeError) as refusal:
        optimizer.step()
    assert str(refusal.value) == PLACE + message
    assert everything(optimizer) == before
    mend()
    optimizer.step()
    twin.step()
    assert_same_result(optimizer, twin)


@pytest.mark.parametrize("row", TENSORS.values(), ids=TENSORS.keys())
@pytest.mark.parametrize("steps", [0, 2], ids=["at the first step", "later"])
def test_tensor_is_refused_at_the_step(path, row, steps) -> None:
    check_refusal(build(path, steps), build("reference", steps), row)


@pytest.mark.parametrize("row", STATES.values(), ids=STATES.keys())
def test_state_is_refused_at_the_step(path, row) -> None:
    check_refusal(build(path, 2), build("reference", 2), row)


def test_names_stand_in_the_message(path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Embedding(4, 2, sparse=True))
    optimizer = Adam(model.named_parameters(), backend=path)
    (model[1](torch.tensor([1])).sum() + model[0](torch.ones(2)).sum()).backward()
    with pytest.raises(
        RuntimeError, match=r"^Adam: parameter 2 of group 0 \('1.weight'\): its grad"
    ):
        optimizer.step()


def test_control_one_changed_bit_or_key_is_noticed() -> None:
    optimizer = build("reference", 2)
    before = everything(optimizer)
    the_one(optimizer).grad[1, 2] *= 1 + 1e-7
    assert everything(optimizer) != before
    the_one(optimizer).grad[1, 2] *= 1
    before = everything(optimizer)
    optimizer.state[the_one(optimizer)] = dict(optimizer.state[the_one(optimizer)], extra=1)
    assert everything(optimizer) != before


# A step count of any dtype and size: the reference is right, or both refuse.
COUNTS = [
    *(torch.tensor(5).to(d) for d in (torch.int32, torch.float64, torch.bfloat16, torch.float16)),
    *(torch.tensor(1).to(d) for d in (torch.bool, torch.int8, torch.complex64)),
    torch.tensor(255, dtype=torch.uint8),
    torch.tensor(0.5),
    torch.tensor([[3.0]]),
    torch.tensor(2.0**24),
    torch.tensor(1e30),
    *(torch.tensor(n, dtype=torch.int32) for n in (2**31 - 2, 2**31 - 1)),
    *(torch.tensor(n) for n in (2**53, 2**62, 2**63 - 1)),
]


@pytest.mark.parametrize("count", COUNTS, ids=lambda c: f"{c.item()} {c.dtype}")
def test_any_step_count_moves_as_in_the_reference_or_is_refused(path, count) -> None:
    results = []
    for choice in (path, "reference"):
        optimizer = build(choice, 2, betas=(0.9, 1 - 1e-9), dtype=torch.float64)
        optimizer.state[the_one(optimizer)]["step"] = count.clone()
        before = everything(optimizer)
        try:
            optimizer.step()
            assert all(p.isfinite().all() for g in optimizer.param_groups for p in g["params"])
            results.append(optimizer)
        except RuntimeError as refusal:
            assert str(refusal).startswith(PLACE)
            assert everything(optimizer) == before
            results.append(None)
    if None not in results:
        assert_same_result(*results)
    else:
        assert results == [None, None]


# ---- at the constructor --------------------------------------------------------------------------

STATE_DTYPES = "expected None (at least float32), 'param' or one of " + ", ".join(
    f"torch.{name}" for name in ("float32", "float64", "bfloat16", "float16")
)
ARGUMENTS: list[tuple[type[Optimizer], dict[str, Any], str]] = [
    (Adam, {"lr": -1.0}, "Invalid learning rate: -1.0"),
    (Adam, {"lr": NAN}, "Invalid learning rate: nan"),
    (Adam, {"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
    (Adam, {"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    (Adam, {"eps": NAN}, "Invalid epsilon value: nan"),
    (Adam, {"betas": (1.0, 0.999)}, "Invalid beta parameter at index 0: 1.0"),
    (Adam, {"betas": (-0.1, 0.999)}, "Invalid beta parameter at index 0: -0.1"),
    (Adam, {"betas": (0.9, 1.5)}, "Invalid beta parameter at index 1: 1.5"),
    (Adam, {"betas": (0.9, NAN)}, "Invalid beta parameter at index 1: nan"),
    (Adam, {"betas": (torch.ones(2), 0.9)}, "Tensor betas[0] must be 1-element"),
    (Adam, {"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    (AdamW, {"weight_decay": NAN}, "Invalid weight_decay value: nan"),
    (RMSprop, {"lr": -1.0}, "Invalid learning rate: -1.0"),
    (RMSprop, {"lr": torch.ones(3)}, "Tensor lr must be 1-element"),
    (RMSprop, {"eps": -1.0}, "Invalid epsilon value: -1.0"),
    (RMSprop, {"momentum": -0.5}, "Invalid momentum value: -0.5"),
    (RMSprop, {"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    (RMSprop, {"alpha": -0.1}, "Invalid alpha value: -0.1"),
    (
        AdamW,
        {"differentiable": True},
        "adamfused.AdamW cannot be differentiated through; expected differentiable=False; use torch.optim.AdamW for "
        "that",
    ),
    (Adam, {"state_dtype": "half"}, f"Invalid state_dtype value: 'half'; {STATE_DTYPES}"),
    (Adam, {"state_dtype": torch.int8}, f"Invalid state_dtype value: torch.int8; {STATE_DTYPES}"),
    (
        RMSprop,
        {"backend": "cuda"},
        "backend must be one of auto, native, reference, got 'cuda'",
    ),
]


@pytest.mark.reference
@pytest.mark.parametrize(("make", "options", "message"), ARGUMENTS, ids=lambda x: str(x)[:40])
def test_argument_is_refused(make, options, message) -> None:
    with pytest.raises(ValueError) as refusal:
        make([parameter(0, 2)], **options)
    assert str(refusal.value) == message


@pytest.mark.reference
@pytest.mark.parametrize(
    ("make", "options", "message"),
    [a for a in ARGUMENTS if not {"backend", "state_dtype", "differentiable"} & set(a[1])],
    ids=lambda x: str(x)[:40],
)
def test_torch_says_the_same(make, options, message) -> None:
    with pytest.raises(ValueError) as refusal:
        getattr(torch.optim, make.__name__)([parameter(0, 2)], **options)
    assert str(refusal.value) == message


@pytest.mark.reference
@pytest.mark.parametrize("add", [False, True], ids=["in the constructor", "in add_param_group"])
def test_duplicate_is_refused(add) -> None:
    a, b = parameter(0, 2), parameter(1, 2)
    optimizer = AdamW([parameter(2, 2)])
    before = everything(optimizer)
    with pytest.raises(ValueError) as refusal:
        optimizer.add_param_group({"params": [a, b, a]}) if add else AdamW([a, b, a])
    assert str(refusal.value) == (
        f"AdamW: parameter 2 of group {int(add)} is parameter 0 once more; expected each parameter once; remove one of "
        "them"
    )
    assert everything(optimizer) == before


ENVIRONMENT = [
    ("ADAMFUSED_BACKEND", "gpu", "must be one of auto, native, reference, got 'gpu'", []),
    pytest.param(
        *(
            "ADAMFUSED_ISA",
            "sse9",
            "=sse9: no instruction set is called 'sse9'; this processor runs ",
        ),
        backend.native() and [name for name, here in backend.native().isas() if here],
        marks=pytest.mark.native,
    ),
]


@pytest.mark.reference
@pytest.mark.parametrize(("variable", "value", "message", "choices"), ENVIRONMENT)
def test_environment_is_refused(monkeypatch, variable, value, message, choices) -> None:
    if choices is None:
        pytest.skip("the extension is not loaded")
    optimizer = build("auto", 1)
    before = everything(optimizer)
    monkeypatch.setenv(variable, value)
    said = variable + message.replace("must", " must") + ", ".join(choices)
    for act in (lambda: AdamW([parameter(0, 2)]), optimizer.step):
        with pytest.raises(ValueError) as refusal:
            act()
        assert str(refusal.value) == said
    assert everything(optimizer) == before
    monkeypatch.delenv(variable)
    optimizer.step()
