"""What is refused, in which words, and that nothing has happened by then.

Every row of the tables provokes one refusal. The message is compared word for word; after it, every
bit, every key and every object is as it was before, also of the parameters and groups that come
first; and once the cause is mended, all goes as if nothing had been.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_result
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer

from adamfused import Adam, AdamW, RMSprop, backend
from adamfused.formats import FORMATS

NAN = float("nan")
Undo = Callable[[], Any]
Provoke = Callable[[Optimizer], Undo]


# ---- all there is to know of an optimizer --------------------------------------------------------


def facts(x: Any) -> Any:
    """``x`` as comparable data; a tensor by its identity, form, version and the bytes of its storage."""
    if isinstance(x, Tensor):
        version = None if x.is_inference() else x._version
        kind = (id(x), x.dtype, x.shape, x.device, x.layout, version)
        if x.layout is not torch.strided:
            return kind, x.to_dense().tolist()
        if x.device.type == "meta" or isinstance(x, FakeTensor):
            return kind
        memory = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
        return kind, x.stride(), x.storage_offset(), bytes(memory.tolist())
    if isinstance(x, dict):
        return [(id(k) if isinstance(k, Tensor) else k, facts(v)) for k, v in x.items()]
    return [type(x), *map(facts, x)] if isinstance(x, (list, tuple)) else repr(x)


def everything(optimizer: Optimizer) -> Any:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return facts([optimizer.param_groups, optimizer.state, grads, optimizer.defaults])


def parameter(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    source = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=source))
    p.grad = torch.randn(shape, dtype=dtype, generator=source)
    return p


def build(
    path: str | None,
    steps: int,
    make: type[Optimizer] = AdamW,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Optimizer:
    """Two groups; the tables spoil parameter 1 of group 1, which has shape (2, 3)."""
    groups = [
        {"params": [parameter(0, 4, dtype=dtype), parameter(1, 2, 2, dtype=dtype)]},
        {"params": [parameter(i, *s, dtype=dtype) for i, s in ((2, [5]), (3, [2, 3]), (4, [1]))]},
    ]
    optimizer = make(groups, backend=path, **options)
    for _ in range(steps):
        optimizer.step()
    return optimizer


def the_one(optimizer: Optimizer) -> Any:
    return optimizer.param_groups[1]["params"][1]


def test_control_one_changed_bit_or_key_is_noticed() -> None:
    def poke(optimizer: Optimizer) -> None:
        the_one(optimizer).grad.view(torch.uint8)[1, 5] ^= 1

    def add_key(optimizer: Optimizer) -> None:
        optimizer.state[the_one(optimizer)]["extra"] = 1

    def replace(optimizer: Optimizer) -> None:
        optimizer.param_groups[0]["params"][0] = parameter(0, 4)

    for change in (poke, add_key, replace, lambda o: o.param_groups[0].update(lr=0.1)):
        optimizer = build("reference", 2)
        before = everything(optimizer)
        assert everything(optimizer) == before
        change(optimizer)
        assert everything(optimizer) != before


# ---- at the step ---------------------------------------------------------------------------------


def gradient(change: Callable[[Tensor], Tensor]) -> Provoke:
    def provoke(optimizer: Optimizer) -> Undo:
        p = the_one(optimizer)
        good = p.grad
        p.grad, p.grad_dtype = None, None
        p.grad = change(good)
        return lambda: setattr(p, "grad", good)

    return provoke


def data(change: Callable[[Tensor], Tensor]) -> Provoke:
    def provoke(optimizer: Optimizer) -> Undo:
        p = the_one(optimizer)
        good = p.data
        p.data = change(good)
        return lambda: setattr(p, "data", good)

    return provoke


def swapped(change: Callable[[Tensor], Tensor]) -> Provoke:
    """Another parameter in the same place, as frameworks do before they materialise a model."""

    def provoke(optimizer: Optimizer) -> Undo:
        params, good = optimizer.param_groups[1]["params"], the_one(optimizer)
        optimizer.state[new := torch.nn.Parameter(change(good.detach()))] = optimizer.state[good]
        new.grad, params[1] = change(good.grad), new
        return lambda: (params.__setitem__(1, good), optimizer.state.pop(new))

    return provoke


def state(key: str, change: Callable[[Tensor], Any]) -> Provoke:
    def provoke(optimizer: Optimizer) -> Undo:
        entry = optimizer.state[the_one(optimizer)]
        good = dict(entry)
        entry[key] = change(entry[key])
        if entry[key] is None:
            del entry[key]
        return lambda: (entry.clear(), entry.update(good))

    return provoke


def freed(get: Callable[[Optimizer], Tensor]) -> Provoke:
    def provoke(optimizer: Optimizer) -> Undo:
        t = get(optimizer).detach()
        good, storage = t.clone(), t.untyped_storage()
        storage.resize_(0)
        return lambda: (storage.resize_(24), t.copy_(good))

    return provoke


def moments(optimizer: Optimizer) -> tuple[Tensor, Tensor]:
    entry = optimizer.state[the_one(optimizer)]
    return entry["exp_avg"], entry["exp_avg_sq"]


def in_inference_mode(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


DTYPES = "float32, float64, bfloat16 or float16, or a complex dtype made of one of these"
FREED = "has lost its memory: its storage has 0 bytes, and 6 elements of 4 bytes lie in it; step while it is allocated"
META = "is on the meta device, which has no memory; materialise it first, as with Module.to_empty()"
OVERLAP = (
    "some of its elements may share memory (shape (2, 3), strides {}), so an update in place has no meaning; "
    "expected each element in its own place; make the parameter from a clone()"
)
ANEW = "load a checkpoint that fits, or drop this parameter's state to begin anew"
A_COUNT = "expected a number from 0 to 2^53; load a checkpoint that fits"
ONE_COUNT = "expected a tensor with one number; load a checkpoint that fits"
Row = tuple[Provoke, str]

# fmt: off
TENSORS: dict[str, Row] = {
    "sparse gradient": (gradient(Tensor.to_sparse),
        "its gradient is sparse (layout torch.sparse_coo); expected a dense one; use sparse=False in the embedding "
        "that makes it, or torch.optim's SGD, Adagrad or SparseAdam, which take sparse ones"),
    "integer gradient": (gradient(lambda g: g.int()), f"its gradient has dtype torch.int32; expected {DTYPES}"),
    "float8 gradient": (gradient(lambda g: g.to(torch.float8_e4m3fn)),
        f"its gradient has dtype torch.float8_e4m3fn; expected {DTYPES}"),
    "complex gradient": (gradient(lambda g: g.cfloat()),
        "its gradient has dtype torch.complex64; expected a real one, as the parameter's torch.float32; "
        "set the gradient by backward(), or to one like the parameter"),
    "freed gradient": (freed(lambda o: the_one(o).grad), f"its gradient {FREED}"),
    "gradient of another shape": (data(lambda p: p[:, :2].clone()),
        "its gradient has shape (2, 3); expected the parameter's shape (2, 2); "
        "set the gradient by backward(), or to one like the parameter"),
    "parameter without memory": (swapped(lambda p: p.to("meta")), f"it {META}"),
    "freed parameter": (freed(the_one), f"it {FREED}"),
    "float8 parameter": (data(lambda p: p.to(torch.float8_e5m2)),
        f"it has dtype torch.float8_e5m2; expected {DTYPES}"),
    "expanded parameter": (data(lambda p: p[:1].clone().expand(2, 3)), OVERLAP.format("(0, 1)")),
    "overlapping parameter": (data(lambda p: torch.ones(4).as_strided((2, 3), (1, 1))), OVERLAP.format("(1, 1)")),
    "fake parameter": (swapped(lambda p: FakeTensorMode().from_tensor(p)),
        "it is a FakeTensor, a tensor with operations of its own; expected a plain tensor or a DTensor"),
}
STATES: dict[str, Row] = {
    "state made in inference mode": (state("exp_avg_sq", in_inference_mode),
        "state 'exp_avg_sq' was made in inference mode and cannot be written outside of it; clone() it"),
    "state that is the parameter": (lambda o: state("exp_avg", lambda _: the_one(o).detach())(o),
        "state 'exp_avg' lies in the same memory as the parameter; expected its own; clone() it"),
    "state that is another state": (lambda o: state("exp_avg_sq", lambda _: moments(o)[0])(o),
        "state 'exp_avg_sq' lies in the same memory as state 'exp_avg'; expected its own; clone() it"),
    "missing state": (state("exp_avg", lambda _: None),
        f"state 'exp_avg' is missing; expected a tensor of shape (2, 3); {ANEW}"),
    "state that is a number": (state("exp_avg_sq", lambda _: 0.0),
        f"state 'exp_avg_sq' is a float; expected a tensor of shape (2, 3); {ANEW}"),
    "short state": (state("exp_avg_sq", lambda s: s.flatten()[:5].clone()),
        f"state 'exp_avg_sq' has shape (5,); expected the parameter's shape (2, 3); {ANEW}"),
    "integer state": (state("exp_avg", lambda s: s.long()),
        f"state 'exp_avg' has dtype torch.int64; expected {DTYPES}"),
    "complex state": (state("exp_avg", lambda s: s.cfloat()),
        f"state 'exp_avg' has dtype torch.complex64; expected a real one, as the parameter's torch.float32; {ANEW}"),
    "sparse state": (state("exp_avg", Tensor.to_sparse),
        "state 'exp_avg' has layout torch.sparse_coo; expected a dense tensor; convert it with to_dense()"),
    "state on another device": (state("exp_avg", lambda s: s.to("meta")),
        f"state 'exp_avg' is on meta; expected the parameter's device cpu; {ANEW}"),
    "expanded state": (state("exp_avg", lambda s: s[:1].clone().expand(2, 3)),
        f"elements of state 'exp_avg' may share memory (strides (0, 1)); expected its own; {ANEW}"),
    "freed state": (freed(lambda o: moments(o)[0]), f"state 'exp_avg' {FREED}"),
    "missing step": (state("step", lambda _: None), f"state 'step' is missing; {ONE_COUNT}"),
    "step that is a number": (state("step", lambda _: 3), f"state 'step' is a int; {ONE_COUNT}"),
    "two steps": (state("step", lambda _: torch.ones(2)), f"state 'step' is of shape (2,); {ONE_COUNT}"),
    "NaN step": (state("step", lambda _: torch.tensor(NAN)), f"state 'step' is nan; {A_COUNT}"),
    "infinite step": (state("step", lambda s: s / 0), f"state 'step' is inf; {A_COUNT}"),
    "negative step": (state("step", lambda _: torch.tensor(-1)), f"state 'step' is -1; {A_COUNT}"),
    "bfloat16 step": (state("step", lambda s: s.bfloat16()),
        "state 'step' has dtype torch.bfloat16; expected float32, float64 or int64; load a checkpoint that fits"),
    "step without memory": (state("step", lambda s: s.to("meta")),
        "state 'step' is on meta; expected cpu or the parameter's cpu; move it there"),
}
# fmt: on


def check_refusal(optimizer: Optimizer, twin: Optimizer, row: Row) -> None:
    provoke, message = row
    mend = provoke(optimizer)
    before = everything(optimizer)
    with pytest.raises(RuntimeError) as refusal:
        optimizer.step()
    assert str(refusal.value) == "AdamW: parameter 1 of group 1: " + message
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


MANY = 40  # parameters: the kernels' side looks at 16 of them at once


@pytest.mark.parametrize("steps", [0, 2], ids=["at the first step", "later"])
@pytest.mark.parametrize("bad", [1, 15, 16, MANY - 3])
def test_any_of_many_is_refused_before_one_has_moved(path, bad, steps) -> None:
    def build_many(choice: str) -> Optimizer:
        params = [parameter(i, 3) for i in range(MANY)]
        for i in range(3, MANY, 7):
            params[i].grad = None
        optimizer = AdamW(params, backend=choice)
        for _ in range(steps):
            optimizer.step()
        return optimizer

    optimizer, twin = build_many(path), build_many("reference")
    p = optimizer.param_groups[0]["params"][bad]
    dense, p.grad = p.grad, p.grad.to_sparse()
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=f"^AdamW: parameter {bad} of group 0: its gradient is"):
        optimizer.step()
    assert everything(optimizer) == before
    p.grad = dense
    optimizer.step()
    twin.step()
    assert_same_result(optimizer, twin)


def test_a_parameter_that_was_put_in_twice_moves_twice(path) -> None:
    def build_twice(choice: str) -> Optimizer:
        params = [parameter(i, 3) for i in range(3)]
        optimizer = AdamW(params, backend=choice)
        optimizer.param_groups[0]["params"].insert(2, params[0])  # the constructor refuses it
        for _ in range(2):
            optimizer.step()
        return optimizer

    optimizer = build_twice(path)
    assert [optimizer.state[p]["step"].item() for p in optimizer.state] == [4, 2, 2]
    assert_same_result(optimizer, build_twice("reference"))


def test_a_name_stands_in_the_message(path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Embedding(4, 2, sparse=True))
    optimizer = Adam(model.named_parameters(), backend=path)
    (model[1](torch.tensor([1])).sum() + model[0](torch.ones(2)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"^Adam: parameter 2 of group 0 \('1.weight'\): its gr"):
        optimizer.step()


COUNTS = [
    *(torch.tensor(5).to(d) for d in (torch.int32, torch.float64, torch.bfloat16, torch.float16)),
    *(torch.tensor(1).to(d) for d in (torch.bool, torch.int8, torch.complex64)),
    *(torch.tensor(n, dtype=torch.int32) for n in (2**31 - 2, 2**31 - 1)),
    *(torch.tensor(n, dtype=torch.float64) for n in (2**53 - 2, 2**53 - 1, 2**53, 1e300)),
    *(
        torch.tensor(n)
        for n in (0.5, [[3.0]], 2.0**24, 1e30, 2**53 - 2, 2**53 - 1, 2**53, 2**63 - 1)
    ),
]


@pytest.mark.parametrize("count", COUNTS, ids=lambda c: f"{c.item()} {c.dtype}")
def test_any_step_count_is_counted_as_in_the_reference_or_refused_by_both(path, count) -> None:
    results = []
    for choice in ("reference", {"native": "auto"}.get(path, path)):
        optimizer = build(choice, 2, betas=(0.9, 1 - 1e-9), dtype=torch.float64)
        optimizer.state[the_one(optimizer)]["step"] = count.clone()
        before = everything(optimizer)
        try:
            optimizer.step()
            assert torch.isfinite(the_one(optimizer)).all()
            state = optimizer.state[the_one(optimizer)]
            assert state.pop("step") >= count
            results.append(optimizer)
        except RuntimeError as refusal:
            assert str(refusal).startswith("AdamW: parameter 1 of group 1: state 'step'")
            assert everything(optimizer) == before
            results.append(None)
    if None not in results:
        assert_same_result(*results)
    else:
        assert results == [None, None]


# ---- at load -------------------------------------------------------------------------------------

Spoil = Callable[[dict[str, Any]], Any]


def saved(key: str, change: Callable[[Any], Any]) -> Spoil:
    def spoil(state_dict: dict[str, Any]) -> None:
        entry = state_dict["state"][3]
        entry[key] = change(entry[key])

    return spoil


LACKS = (
    "the checkpoint lacks {}; it has {}; it was saved by another optimizer, or with other options"
)
FINITE = "expected a number from 0 to 2^53"
COUNT_DTYPES = "expected one number, float32, float64 or int64"
A_MODEL = "it was saved for another model"
# fmt: off
LOADED: dict[str, tuple[Spoil, str]] = {
    "short state": (saved("exp_avg", lambda s: s.flatten()[:5]),
        "'exp_avg' in the checkpoint has shape (5,); expected the parameter's (2, 3); "
        f"{A_MODEL} or another order of parameters"),
    "missing state": (lambda d: d["state"][3].pop("exp_avg_sq"), LACKS.format("'exp_avg_sq'", "'step', 'exp_avg'")),
    "missing step": (lambda d: d["state"][3].pop("step"), LACKS.format("'step'", "'exp_avg', 'exp_avg_sq'")),
    "unknown key": (lambda d: d["state"][3].update(exp_avg_cubed=0),
        "the checkpoint has 'exp_avg_cubed', which this optimizer does not know; "
        "expected 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'"),
    "RMSprop's": (lambda d: d["state"].update({3: build("reference", 1, RMSprop).state_dict()["state"][3]}),
        LACKS.format("'exp_avg', 'exp_avg_sq'", "'step', 'square_avg'")),
    "SGD's": (lambda d: d["state"].update({3: {"momentum_buffer": None}}),
        LACKS.format("'step', 'exp_avg', 'exp_avg_sq'", "'momentum_buffer'")),
    "state that is a list": (saved("exp_avg", Tensor.tolist),
        "'exp_avg' in the checkpoint is a list; expected a tensor"),
    "integer state": (saved("exp_avg", lambda s: s.long()), "'exp_avg' in the checkpoint has dtype torch.int64, "
        f"which does not go with the parameter's torch.float32; {A_MODEL}"),
    "complex state": (saved("exp_avg", lambda s: s.cfloat()), "'exp_avg' in the checkpoint has dtype "
        f"torch.complex64, which does not go with the parameter's torch.float32; {A_MODEL}"),
    "sparse state": (saved("exp_avg", Tensor.to_sparse), "'exp_avg' in the checkpoint has layout torch.sparse_coo; "
        "expected a dense tensor; convert it with to_dense()"),
    "meta state": (saved("exp_avg", lambda s: s.to("meta")), f"'exp_avg' in the checkpoint {META}"),
    "NaN step": (saved("step", lambda _: torch.tensor(NAN)), "'step' in the checkpoint is nan; " + FINITE),
    "infinite step": (saved("step", lambda _: float("inf")), "'step' in the checkpoint is inf; " + FINITE),
    "negative step": (saved("step", lambda _: -2), "'step' in the checkpoint is -2.0; " + FINITE),
    "step that is a string": (saved("step", str), "'step' in the checkpoint is a str; expected one number"),
    "two steps": (saved("step", lambda _: torch.ones(2)),
        f"'step' in the checkpoint has shape (2,) and dtype torch.float32 on cpu; {COUNT_DTYPES}"),
    "meta step": (saved("step", lambda s: s.to("meta")),
        f"'step' in the checkpoint has shape () and dtype torch.float32 on meta; {COUNT_DTYPES}"),
    "boolean step": (saved("step", lambda s: s.bool()),
        f"'step' in the checkpoint has shape () and dtype torch.bool on cpu; {COUNT_DTYPES}"),
}
# fmt: on


def check_load_refusal(path: str, spoil: Spoil, message: str) -> None:
    optimizer, twin, source = build(path, 2), build("reference", 2), build(path, 5)
    good = source.state_dict()
    bad = copy.deepcopy(good)
    spoil(bad)
    before, bad_before = everything(optimizer), facts(bad)
    with pytest.raises(ValueError) as refusal:
        optimizer.load_state_dict(bad)
    assert str(refusal.value) == message
    assert everything(optimizer) == before
    assert facts(bad) == bad_before
    for o in (optimizer, twin):
        o.load_state_dict(copy.deepcopy(good))
        o.step()
    assert_same_result(optimizer, twin)


@pytest.mark.parametrize(("spoil", "message"), LOADED.values(), ids=LOADED.keys())
def test_checkpoint_is_refused(path, spoil, message) -> None:
    check_load_refusal(path, spoil, "AdamW: parameter 1 of group 1: " + message)


# fmt: off
GROUPS: dict[str, tuple[Spoil, str]] = {
    "too few groups": (lambda d: d["param_groups"].pop(),
        "loaded state dict has a different number of parameter groups"),
    "too few parameters": (lambda d: d["param_groups"][1]["params"].pop(),
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"),
    "NaN lr": (lambda d: d["param_groups"][1].update(lr=NAN), "Invalid learning rate: nan"),
    "no lr": (lambda d: d["param_groups"][1].pop("lr"),
        "AdamW: group 1 of the checkpoint lacks 'lr'; expected all options of this optimizer; it was saved by another "
        "one, or is not whole"),
    "beta of 2": (lambda d: d["param_groups"][1].update(betas=(0.9, 2.0)),
        "Invalid beta parameter at index 1: 2.0"),
}
# fmt: on


@pytest.mark.parametrize(("spoil", "message"), GROUPS.values(), ids=GROUPS.keys())
def test_groups_of_a_checkpoint_are_refused(path, spoil, message) -> None:
    check_load_refusal(path, spoil, message)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_load_does_not_depend_on_the_default_device(path, device) -> None:
    optimizer, twin = build(path, 2), build("reference", 2)
    checkpoint = build("reference", 5).state_dict()
    for entry in checkpoint["state"].values():
        entry["step"] = int(entry["step"])  # as in old checkpoints
    twin.load_state_dict(copy.deepcopy(checkpoint))
    with torch.device(device):
        optimizer.load_state_dict(copy.deepcopy(checkpoint))
        optimizer.step()
    twin.step()
    assert_same_result(optimizer, twin)


def test_one_step_tensor_for_all_parameters_is_counted_as_in_the_reference(path) -> None:
    results = []
    for choice in (path, "reference"):
        optimizer, checkpoint = build(choice, 2), build("reference", 1).state_dict()
        count = torch.tensor(7.0)
        for entry in checkpoint["state"].values():
            entry["step"] = count
        optimizer.load_state_dict(checkpoint)
        optimizer.step()
        results.append(optimizer)
    assert_same_result(*results)


# ---- tensors that stand for others, inside torch.func --------------------------------------------

WRAPPERS = """
import itertools, sys, torch, adamfused
apply = {
    "functionalize": lambda f: torch.func.functionalize(f)(torch.ones(2)),
    "grad": lambda f: torch.func.grad(f)(torch.ones(2)),
    "vmap": lambda f: torch.vmap(f)(torch.ones(3, 2)),
    "jvp": lambda f: torch.func.jvp(f, (torch.ones(2),), (torch.ones(2),)),
}
for path, steps, (name, run) in itertools.product(sys.argv[1:], (0, 1), apply.items()):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    for p in params: p.grad = torch.ones(2)
    optimizer = adamfused.AdamW(params, lr=0.5, weight_decay=0, eps=0, backend=path)
    for _ in range(steps): optimizer.step()
    def step(x):
        params[1].grad = x * 2
        optimizer.step()
        return x.sum()
    try: run(step)
    except RuntimeError as error: print(len(optimizer.state), params[0].tolist(), error)
    else: print(path, name, "went through")
"""


@pytest.mark.reference
def test_wrapper_of_torch_func_is_refused() -> None:
    """In a process of its own, for it may crash."""
    paths = ["reference", *(["native"] if backend.native() else [])]
    done = subprocess.run(
        [sys.executable, "-c", WRAPPERS, *paths],
        env=os.environ | {"PYTHONPATH": str(Path(backend.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    words = (
        " is a wrapper made by torch.func; expected a plain tensor or a DTensor; step outside of it"
    )
    assert len(lines) == len(paths) * 2 * 4
    for i, line in enumerate(lines):
        first_step = i % 8 < 4  # makes the states, some of which are then wrappers, too
        assert line.startswith("0 [1.0, 1.0]" if first_step else "3 [0.5, 0.5]")
        assert line.endswith(
            words if first_step else f"AdamW: parameter 1 of group 0: its gradient{words}"
        )


# ---- at the constructor --------------------------------------------------------------------------

STATE_DTYPES = "expected None (at least float32), 'param', 'int8' or one of " + ", ".join(
    map(str, FORMATS)
)
TORCHS_ARGUMENTS: list[tuple[type[Optimizer], dict[str, Any], str]] = [
    (Adam, {"lr": -1.0}, "Invalid learning rate: -1.0"),
    (Adam, {"lr": NAN}, "Invalid learning rate: nan"),
    (Adam, {"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
    (Adam, {"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    (Adam, {"eps": NAN}, "Invalid epsilon value: nan"),
    (Adam, {"betas": (1.0, 0.999)}, "Invalid beta parameter at index 0: 1.0"),
    (Adam, {"betas": (-0.1, 0.999)}, "Invalid beta parameter at index 0: -0.1"),
    (Adam, {"betas": (0.9, 1.5)}, "Invalid beta parameter at index 1: 1.5"),
    (Adam, {"betas": (0.9, NAN)}, "Invalid beta parameter at index 1: nan"),
    (Adam, {"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    (AdamW, {"weight_decay": NAN}, "Invalid weight_decay value: nan"),
    (RMSprop, {"lr": -1.0}, "Invalid learning rate: -1.0"),
    (RMSprop, {"lr": torch.ones(3)}, "Tensor lr must be 1-element"),
    (RMSprop, {"eps": -1.0}, "Invalid epsilon value: -1.0"),
    (RMSprop, {"momentum": -0.5}, "Invalid momentum value: -0.5"),
    (RMSprop, {"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    (RMSprop, {"alpha": -0.1}, "Invalid alpha value: -0.1"),
]
OWN_ARGUMENTS = [
    (Adam, {"betas": (0.9,)}, "Invalid betas value: (0.9,); expected two numbers"),
    (
        AdamW,
        {"differentiable": True},
        "adamfused.AdamW cannot be differentiated through; expected "
        "differentiable=False; use torch.optim.AdamW for that",
    ),  # fmt: skip
    (Adam, {"state_dtype": "half"}, f"Invalid state_dtype value: 'half'; {STATE_DTYPES}"),
    (Adam, {"state_dtype": torch.int8}, f"Invalid state_dtype value: torch.int8; {STATE_DTYPES}"),
    (RMSprop, {"backend": "cuda"}, "backend must be one of auto, native, reference, got 'cuda'"),
]


def refusal_of(make: type[Optimizer], options: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as refusal:
        make([parameter(0, 2)], **options)
    return str(refusal.value)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("make", "options", "message"), TORCHS_ARGUMENTS, ids=lambda x: str(x)[:40]
)
def test_argument_is_refused_in_torchs_words(make, options, message) -> None:
    assert refusal_of(make, options) == message
    assert refusal_of(getattr(torch.optim, make.__name__), options) == message


@pytest.mark.reference
@pytest.mark.parametrize(("make", "options", "message"), OWN_ARGUMENTS, ids=lambda x: str(x)[:40])
def test_own_argument_is_refused(make, options, message) -> None:
    assert refusal_of(make, options) == message


@pytest.mark.reference
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_grad_norm": 0.1}, "AdamW: a parameter group has max_grad_norm=0.1, which is an"),
        ({"ema_decay": 0.9}, "AdamW: a parameter group has ema_decay=0.9, which is an option of"),
        ({"backend": "native"}, "AdamW: a parameter group has backend='native', which is an"),
        ({"fused_unscale": False}, "AdamW: a parameter group has fused_unscale=False, which is an"),
        ({"differentiable": True}, "adamfused.AdamW cannot be differentiated through; expected"),
        ({"state_dtype": "half"}, "Invalid state_dtype value: 'half'; expected"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_option_of_the_whole_optimizer_is_refused_in_a_group(option, message) -> None:
    """There it would be asked for in vain."""
    group = {"params": [parameter(0, 2)], **option}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        AdamW([dict(group)])
    optimizer = AdamW([parameter(1, 2)])
    before = everything(optimizer)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        optimizer.add_param_group(dict(group))
    assert everything(optimizer) == before and len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [parameter(0, 2)], "max_grad_norm": None, "mine": 3})


@pytest.mark.reference
def test_format_that_was_written_into_a_group_is_refused_by_the_first_step(path) -> None:
    optimizer = AdamW([parameter(0, 2)], backend=path)
    optimizer.param_groups[0]["state_dtype"] = "half"
    with pytest.raises(ValueError, match="^Invalid state_dtype value: 'half'"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.reference
@pytest.mark.parametrize("group", [0, 1], ids=["in the constructor", "in add_param_group"])
def test_duplicate_is_refused(group) -> None:
    a, b = parameter(0, 2), parameter(1, 2)
    optimizer = AdamW([parameter(2, 2)])
    before = everything(optimizer)
    with pytest.raises(ValueError) as refusal:
        optimizer.add_param_group({"params": [a, b, a]}) if group else AdamW([a, b, a])
    assert str(refusal.value) == (
        f"AdamW: parameter 2 of group {group} is parameter 0 once more; expected each parameter once; remove one of "
        "them"
    )
    assert everything(optimizer) == before


ISAS = ", ".join(name for name, here in (backend._C.isas() if backend._C else []) if here)
KERNELS_IN_USE = bool(ISAS) and os.environ.get("ADAMFUSED_BACKEND") != "reference"
ENVIRONMENT = [
    ("ADAMFUSED_BACKEND", "gpu", " must be one of auto, native, reference, got 'gpu'"),
    pytest.param(
        *("ADAMFUSED_ISA", "sse9"),
        f"=sse9: no instruction set is called 'sse9'; this processor runs {ISAS}",
        marks=[pytest.mark.native, pytest.mark.skipif(not KERNELS_IN_USE, reason="no kernels")],
    ),
]


@pytest.mark.reference
@pytest.mark.parametrize(("variable", "value", "message"), ENVIRONMENT)
def test_environment_is_refused(monkeypatch, variable, value, message) -> None:
    optimizer = build(None, 1)
    before = everything(optimizer)
    with monkeypatch.context() as environment:
        environment.setenv(variable, value)
        for act in (lambda: AdamW([parameter(0, 2)]), optimizer.step):
            with pytest.raises(ValueError) as refusal:
                act()
            assert str(refusal.value) == variable + message
        assert everything(optimizer) == before
    optimizer.step()
    assert everything(optimizer) != before
