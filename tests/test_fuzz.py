"""Whatever a user hands in, the native kernels do what the reference does, or both refuse in one wording.

Found by hypothesis, always the same examples: shapes, strides, dtypes, numbers, hyper-parameters,
checkpoints with one thing changed, and long lives of an optimizer with saving, loading and copying.
"""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import EVERY_OPTIMIZER, REAL_DTYPES, assert_same_bits, wild
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from torch.optim import Optimizer

from adamfused import AdamW, RMSprop, backend, rules

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(backend.native() is None, reason="the extension is not loaded"),
]
PATHS = ("native", "reference")
SETTINGS = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def outcome(act: Callable[[], Any]) -> str:
    """What the user sees: nothing, or an error."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("'native'", "").replace("'reference'", "")
    return ""


def state_facts(optimizer: Optimizer) -> list[Any]:
    """All keys and numbers of the states, the tensors still as tensors."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [sorted(optimizer.state.get(p, {}).items()) for p in params]


def snapshot(optimizer: Optimizer) -> Any:
    return copy.deepcopy([[g["params"] for g in optimizer.param_groups], optimizer.state_dict()])


def assert_same(a: Any, b: Any, what: str = "it") -> None:
    """Equal by bits, through dicts and lists."""
    assert type(a) is type(b), what
    if isinstance(a, Tensor) and (a.is_meta or a.is_sparse):
        assert repr(a) == repr(b), what
    elif isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()):
        assert_same_bits(a.detach(), b.detach(), what)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), what
    elif isinstance(a, dict):
        assert list(a) == list(b), what
        for key in a:
            assert_same(a[key], b[key], f"{what}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), what
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{what}[{i}]")
    else:
        assert repr(a) == repr(b), what


# ---- anything as a tensor ------------------------------------------------------------------------

DTYPES = (*REAL_DTYPES, torch.complex64, torch.complex128)


@st.composite
def layouts(draw, shape: tuple[int, ...], may_overlap: bool) -> tuple[tuple[int, ...], int]:
    """Strides and an offset: any order of the dimensions, with or without holes between them."""
    order = draw(st.permutations(range(len(shape))))
    strides, reach = [0] * len(shape), 1
    for d in order:
        strides[d] = reach + draw(st.sampled_from([0, 0, 0, 1, 5]))
        if shape[d] == 1:
            strides[d] = draw(st.sampled_from([strides[d], 0, 1000]))
        elif may_overlap and draw(st.integers(0, 5)) == 0:
            strides[d] = draw(st.integers(0, strides[d]))
        else:
            reach = strides[d] * max(shape[d], 1)
    return tuple(strides), draw(st.sampled_from([0, 0, 1, 3]))


class Lying:
    """A recipe for a tensor: build it as often as you like, always with the same numbers."""

    def __init__(self, shape, layout, dtype, seed: int, specials: float, waits: bool) -> None:
        self.shape, self.dtype, self.waits = shape, dtype, waits
        (self.strides, self.offset), self.seed, self.specials = layout, seed, specials

    def __repr__(self) -> str:
        return f"Lying({', '.join(f'{k}={v}' for k, v in vars(self).items())})"

    def build(self) -> Tensor:
        reach = sum(s * (n - 1) for s, n in zip(self.strides, self.shape, strict=True) if n > 1)
        n = self.offset + max(reach, 0) + 3
        whole = wild(np.random.default_rng(self.seed), n, self.dtype, self.specials)
        t = whole.as_strided(self.shape, self.strides, self.offset)
        return t.conj() if self.waits and self.dtype.is_complex else t


def whole(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def gaps(t: Tensor) -> Tensor:
    memory = whole(t).view(t.dtype)
    outside = torch.ones(memory.shape, dtype=torch.bool)
    outside.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
    return memory[outside].view(torch.uint8)


@st.composite
def parameters(draw) -> dict[str, Any]:
    """A parameter with two gradients, some of which may be missing or of another dtype."""
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 17]), max_size=4)))
    dtype = draw(st.sampled_from(DTYPES))
    specials = draw(st.sampled_from([0.0, 0.0, 0.2]))
    grad_dtypes = [d for d in DTYPES if d.is_complex == dtype.is_complex]

    def one(dtype: torch.dtype, may_overlap: bool) -> Lying:
        layout = draw(layouts(shape, may_overlap))
        return Lying(shape, layout, dtype, draw(st.integers(0, 999)), specials, draw(st.booleans()))

    p = one(dtype, may_overlap=draw(st.integers(0, 9)) == 0)
    p.waits = False
    grads = [
        one(draw(st.sampled_from([dtype, *grad_dtypes])), may_overlap=True)
        if draw(st.integers(0, 7))
        else None
        for _ in range(2)
    ]
    return {"p": p, "grads": grads}


BETAS = st.sampled_from(
    [0.0, 0.3, 0.5, 0.9, 0.999, 0.9999, 1 - 2**-30, math.nextafter(1, 0), 5e-324]
)
LR = st.sampled_from([0.0, 1e-45, 1e-3, 0.1, 1.0, 1e30, 1e300])
OTHERS = st.sampled_from([0.0, 0.0, 1e-45, 1e-8, 0.1, 1e30, 1e300])
NUMBERS = {
    "lr": LR,
    "betas": st.tuples(BETAS, BETAS),
    "alpha": BETAS | st.just(1.0) | st.just(2.5),
    "rho": BETAS | st.just(1.0),
    "eps": OTHERS,
    "weight_decay": OTHERS,
    "momentum": st.sampled_from([0.0, 0.0, 0.3, 0.9, 1.0, 1e300]),
    "dampening": st.sampled_from([0.0, 0.0, 0.3, 1.0, -1e300]),
    "lr_decay": OTHERS,
    "initial_accumulator_value": OTHERS,
    "momentum_decay": OTHERS,
    **dict.fromkeys(("amsgrad", "maximize", "bias_correction", "centered"), st.booleans()),
    "decoupled_weight_decay": st.booleans(),
}
STATE_DTYPES = st.sampled_from([None, "param", torch.bfloat16, torch.float16, torch.float64])


@st.composite
def optimizers(draw) -> tuple[type[Optimizer], dict[str, Any]]:
    make = draw(st.sampled_from(EVERY_OPTIMIZER))
    known = inspect.signature(make).parameters
    options = draw(
        st.fixed_dictionaries({}, optional={k: v for k, v in NUMBERS.items() if k in known})
    )
    if draw(st.booleans()):
        options["state_dtype"] = draw(STATE_DTYPES)
    return make, options


ANYTHING = {
    "optimizer": optimizers(),
    "groups": st.lists(st.lists(parameters(), max_size=4), min_size=1, max_size=3).filter(any),
}


def move_anything(optimizer: Any, groups: list[list[dict[str, Any]]]) -> None:
    make, options = optimizer
    ends = []
    for path in PATHS:
        built = [[(torch.nn.Parameter(row["p"].build()), row) for row in g] for g in groups]
        o = make([{"params": [p for p, _ in g]} for g in built], backend=path, **options)
        beside = [gaps(p.detach()) for g in built for p, _ in g]
        said = []
        for t in range(2):
            grads = []
            for p, row in (pair for g in built for pair in g):
                g = row["grads"][t] and row["grads"][t].build()
                p.grad = p.grad_dtype = None  # of any dtype
                p.grad = g
                grads.append(g)
            before = [(g, whole(g).clone()) for g in grads if g is not None]
            last = snapshot(o)
            said.append(outcome(o.step))
            if said[-1]:
                assert_same(snapshot(o), last)
            for g, memory in before:
                assert torch.equal(whole(g), memory), "a gradient was written"
        after = [gaps(p.detach()) for g in built for p, _ in g]
        assert_same(after, beside)
        ends.append((said, [[p for p, _ in g] for g in built], state_facts(o), grads))
    assert ends[0][0] == ends[1][0]
    assert_same(list(ends[0][1:3]), list(ends[1][1:3]))


@settings(SETTINGS, max_examples=300)
@given(**ANYTHING)
def test_anything_moves_as_in_the_reference_or_is_refused_by_both(optimizer, groups) -> None:
    move_anything(optimizer, groups)


# ---- a long life ---------------------------------------------------------------------------------


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Life(RuleBasedStateMachine):
    """Twins live through the same events, one with the native kernels; they must stay equal by bits."""

    seeds = st.integers(0, 2**20)

    @initialize(chosen=optimizers(), seed=seeds)
    def begin(self, chosen, seed) -> None:
        self.make, self.options = chosen
        self.twins = [
            self.make(self.new_parameters(seed), backend=path, **self.options) for path in PATHS
        ]
        self.saved = [copy.deepcopy(o.state_dict()) for o in self.twins]

    def new_parameters(self, seed: int) -> list[torch.nn.Parameter]:
        rng = np.random.default_rng(seed)
        shapes = [(), (3, 0), (1, 4), (2, 3, 2, 5), (1100,)]
        picked = [shapes[i] for i in rng.integers(0, len(shapes), 3)]
        # torch cannot pickle complex32, which a complex parameter's float16 states would be.
        known = REAL_DTYPES if self.options.get("state_dtype") is torch.float16 else DTYPES
        dtypes = [known[i] for i in rng.integers(0, len(known), 3)]
        data = [wild(rng, math.prod(s), d).reshape(s) for s, d in zip(picked, dtypes, strict=True)]
        return [torch.nn.Parameter(t) for t in data]

    def each_parameter(self) -> Any:
        for o in self.twins:
            yield from enumerate(p for group in o.param_groups for p in group["params"])

    @rule(seed=seeds, missing=st.integers(0, 7), n=st.integers(1, 3))
    def step(self, seed, missing, n) -> None:
        for k in range(n):
            for i, p in self.each_parameter():
                g = wild(np.random.default_rng(seed + 7 * i + k), p.numel(), p.dtype, 0.01)
                p.grad = None if missing >> (i % 3) & 1 else g.reshape(p.shape)
            first, second = (outcome(o.step) for o in self.twins)
            assert first == second

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none) -> None:
        for o in self.twins:
            o.zero_grad(set_to_none=to_none)
            o.step()

    @rule(data=st.booleans(), states=st.booleans(), transposed=st.booleans())
    def replace(self, data, states, transposed) -> None:
        def change(t: Tensor) -> Tensor:
            return (
                t.mT.clone(memory_format=torch.contiguous_format).mT
                if t.dim() > 1 and transposed
                else t.clone()
            )

        if data:
            for _, p in self.each_parameter():
                p.data = change(p.data)
        for state in (s for o in self.twins for s in o.state.values() if states):
            state.update({key: change(t) for key, t in state.items()})

    @rule(
        key=st.sampled_from(["lr", "weight_decay", "maximize"]),
        value=LR,
        tensor=st.booleans(),
    )
    def set_option(self, key, value, tensor) -> None:
        for group in (g for o in self.twins for g in o.param_groups[:1] if key in g):
            if key == "lr":
                group[key] = torch.tensor(value, dtype=torch.float64) if tensor else value
            else:
                group[key] = value if key == "weight_decay" else value > 0

    @rule(seed=seeds, lr=LR)
    def add_param_group(self, seed, lr) -> None:
        if len(self.twins[0].param_groups) < 4:
            for o in self.twins:
                o.add_param_group({"params": self.new_parameters(seed), "lr": lr})
            self.saved = [copy.deepcopy(o.state_dict()) for o in self.twins]

    @rule()
    def save(self) -> None:
        self.saved = [through_a_file(o.state_dict()) for o in self.twins]
        assert_same(*self.saved)

    @rule(crosswise=st.booleans())
    def load(self, crosswise) -> None:
        for o, saved in zip(self.twins, self.saved[:: -1 if crosswise else 1], strict=True):
            o.load_state_dict(copy.deepcopy(saved))

    @rule(by=st.sampled_from([copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]))
    def duplicate(self, by) -> None:
        self.twins = [by(o) for o in self.twins]

    @invariant()
    def equal(self) -> None:
        if hasattr(self, "twins"):
            first, second = self.twins
            assert_same(first.state_dict(), second.state_dict())
            for p, twin in zip(
                *(g["params"] for o in self.twins for g in o.param_groups[:1]), strict=True
            ):
                assert_same(p, twin)


TestLife = Life.TestCase
TestLife.settings = settings(SETTINGS, max_examples=40, stateful_step_count=25)


def test_control_a_last_bit_is_found(monkeypatch) -> None:
    """Both searches fail when the reference's running averages are off by one rounding."""
    exact = rules.average

    def off(a: Tensor, b: Tensor, w: rules.Weight) -> Tensor:
        return exact(a.double(), b.double(), w).to(a.dtype)

    monkeypatch.setattr(rules, "average", off)
    quick = settings(SETTINGS, max_examples=50, phases=[Phase.generate])
    with pytest.raises(BaseException, match="differ in bits"):
        quick(given(**ANYTHING)(move_anything))()
    with pytest.raises(BaseException, match="differ in bits"):
        run_state_machine_as_test(Life, settings=quick)


# ---- a checkpoint with one thing changed ---------------------------------------------------------

JUNK: list[Callable[[], Any]] = [
    *(lambda x=x: x for x in (None, True, -1, 7, 10**400, math.nan, math.inf, 2.0)),
    *(lambda x=x: copy.copy(x) for x in ("x", "0.5", [], {}, [1, 2], {"step": 1}, (0.9, 2.0))),
    *(lambda s=s: torch.full(s, 0.5) for s in ((), (1,), (6,), (2, 3), (3, 2), (0,))),
    *(lambda d=d: torch.ones(2, 3).to(d) for d in (torch.int64, torch.bool, torch.complex64)),
    *(lambda d=d: torch.ones(()).to(d) for d in (torch.int64, torch.bool, torch.float16)),
    lambda: torch.ones(2, 3, device="meta"),
    lambda: torch.ones(2, 3).to_sparse(),
    lambda: torch.ones(()).expand(2, 3),
    lambda: torch.tensor(math.nan),
    lambda: torch.tensor(1e30),
    lambda: np.int64(3),
]


def places(x: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within."""
    keys = list(x) if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else []
    within = [place for key in keys if key != 1 for place in places(x[key])]  # of two alike, one
    return [(x, key) for key in keys] + within


def life_after(path: str, chosen: Any, spoil: Callable[[dict[str, Any]], None]) -> list[Any]:
    make, options = chosen
    params = [
        torch.nn.Parameter(torch.linspace(1, 2, n).reshape(s)) for n, s in ((6, (2, 3)), (1, ()))
    ]
    optimizer = make(params, backend=path, **options)
    for p in params:
        p.grad = p.detach() - 1.4
    optimizer.step()
    bad = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    spoil(bad)
    said = []
    for act in (lambda: optimizer.load_state_dict(bad), optimizer.step):
        before = snapshot(optimizer)
        said.append(outcome(act))
        if said[-1]:
            assert_same(snapshot(optimizer), before, f"after '{said[-1]}', it")
    return [said, [p.detach() for p in params], state_facts(optimizer)]


REMOVE = len(JUNK)
RICH = [
    (AdamW, {"amsgrad": True, "lr": torch.tensor(0.1)}),
    (RMSprop, {"momentum": 0.9, "centered": True, "state_dtype": torch.bfloat16}),
]


def change_checkpoints() -> None:
    """Every place in a checkpoint times every piece of junk."""
    failures = []
    for chosen in RICH:
        count = []
        life_after("reference", chosen, lambda saved, count=count: count.extend(places(saved)))
        for where, how in itertools.product(range(len(count)), range(REMOVE + 1)):
            changed = []

            def spoil(saved: dict[str, Any], where=where, how=how, changed=changed) -> None:
                container, key = places(saved)[where]
                changed.append(f"{key!r} = {JUNK[how]() if how < REMOVE else 'removed'}")
                if how < REMOVE:
                    container[key] = JUNK[how]()
                else:
                    del container[key]

            try:
                lives = [life_after(path, chosen, spoil) for path in ("auto", "reference")]
                assert_same(*lives)
            except Exception as failure:
                failures.append(f"{changed[0]}: {str(failure).splitlines()[0]}")
    assert not failures, "\n".join(failures)


def test_checkpoint_with_one_thing_changed() -> None:
    """In a process of its own, for it may crash."""
    root = str(Path(backend.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-X", "faulthandler", __file__],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    change_checkpoints()
