"""The whole step in one pass: unscaled, clipped, averaged and copied, with the bits of the reference everywhere; and a
clipped step is the plain step on clipped gradients."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    COMPLEX_DTYPES,
    REAL_DTYPES,
    assert_same_bits,
    assert_same_result,
    give_gradient,
    tensors_of,
    threads,
    wild,
)
from test_layout import (
    GRADIENT_LAYOUTS,
    LAYOUTS,
    SHAPE,
    WAITING,
    around,
    guarded,
    plain,
    raw,
)
from test_process import Alarm, in_threads
from test_refusals import STATES, TENSORS, Row, build, everything, facts, state, the_one
from torch import Tensor
from torch.optim import Optimizer

from adamfused import SGD, Adadelta, Adagrad, Adam, AdamW, Lion, NAdam, RAdam, RMSprop, backend

INF, NAN = float("inf"), float("nan")
KERNELS = [
    (isa, n) for isa, here in (backend._C.isas() if backend._C else []) if here for n in (1, 2)
]
FORMS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"weight_decay": 0.1}),
    "sgd-momentum": (SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "adagrad": (Adagrad, {"initial_accumulator_value": 0.1, "lr_decay": 0.1}),
    "adadelta": (Adadelta, {"weight_decay": 0.1}),
    "lion": (Lion, {"weight_decay": 0.1}),
    "nadam": (NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": (RAdam, {"weight_decay": 0.1}),
    "adam": (Adam, {"weight_decay": 0.1, "maximize": True}),
    "adamw": (AdamW, {"weight_decay": 0.1}),
    "amsgrad": (AdamW, {"amsgrad": True}),
    "rmsprop": (RMSprop, {}),
    "rmsprop-momentum": (RMSprop, {"momentum": 0.9, "maximize": True}),
    "rmsprop-centered": (RMSprop, {"centered": True, "weight_decay": 0.1}),
    "rmsprop-centered-momentum": (RMSprop, {"centered": True, "momentum": 0.9}),
}


def warm_up(t: float) -> float:
    return min(0.99, t / (t + 10))


# "scale" is what a GradScaler says, "copies" whether there are copies of the weights; the others are arguments.
WHOLE = {"max_grad_norm": 2.0, "ema_decay": 0.9, "scale": 3000.7, "copies": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 2.0},
    "clipped by the largest": {"max_grad_norm": 0.5, "norm_type": INF},
    "unscaled": {"scale": 3000.7},
    "averaged": {"ema_decay": 0.9},
    "averaged by a function, in float64": {"ema_decay": warm_up, "ema_dtype": torch.float64},
    "averaged in the parameter's dtype": {"ema_decay": 0.4, "ema_dtype": "param"},
    "copied": {"copies": True},
}
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")


@contextmanager
def kernel(isa: str, n_threads: int) -> Iterator[None]:
    """Runs its body with an instruction set and as many threads."""
    native = backend.native()
    assert native is not None
    before = native.isa()
    native.set_isa(isa)
    try:
        with threads(n_threads):
            yield
    finally:
        native.set_isa(before)


# ---- the same bits as the reference --------------------------------------------------------------


class Model:
    """An optimizer of parameters in some layouts, with copies of them in others, and in several dtypes."""

    def __init__(
        self,
        form: str,
        options: dict[str, Any],
        path: str,
        weights: Sequence[Tensor],
        copy_like: Callable[[Tensor], Tensor] = torch.clone,
    ) -> None:
        make, more = FORMS[form]
        options = more | options
        self.scale = options.pop("scale", None)
        self.params = [torch.nn.Parameter(w) for w in weights]
        self.copies = None
        if options.pop("copies", False):
            narrow = [*COMPLEX_DTYPES, torch.complex32]
            dtypes = [
                (narrow if w.is_complex() else REAL_DTYPES)[i % 3] for i, w in enumerate(weights)
            ]
            self.copies = [copy_like(plain(w).to(d)) for w, d in zip(weights, dtypes, strict=True)]
        self.optimizer = make(self.params, lr=0.1, copy_to=self.copies, backend=path, **options)

    def step(self, grads: Sequence[Tensor | None]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            give_gradient(p, g)
        if self.scale is not None:
            self.optimizer.grad_scale = torch.tensor(self.scale)
            self.optimizer.found_inf = torch.tensor(0.0)
        self.optimizer.step()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, plain(t)) for name, t in tensors_of(self.optimizer))
        yield from ((f"copy {i}", plain(c)) for i, c in enumerate(self.copies or []))
        if self.optimizer.max_grad_norm is not None:
            yield "the norm", self.optimizer.grad_norm


def assert_same(model: Model, expected: Model) -> None:
    for (name, x), (other_name, y) in zip(model.tensors(), expected.tensors(), strict=True):
        assert name == other_name
        assert_same_bits(x, y, name)


def step_everywhere(
    form: str,
    options: dict[str, Any],
    weights: Callable[[], list[Tensor]],
    grads: Sequence[Sequence[Tensor | None]],
    copy_like: Callable[[Tensor], Tensor] = torch.clone,
    changed: dict[str, Any] | None = None,
) -> Model:
    """Steps the reference and every kernel with the same gradients, and compares all they hold after each step."""
    expected = Model(form, options | (changed or {}), "reference", weights(), copy_like)
    models = [Model(form, options, "native", weights(), copy_like) for _ in KERNELS]
    with threads(1):
        for row in grads:
            expected.step(row)
            for (isa, n_threads), model in zip(KERNELS, models, strict=True):
                with kernel(isa, n_threads):
                    model.step(row)
                assert_same(model, expected)
    return expected


def several(sizes: Sequence[int], dtypes: Sequence[torch.dtype], steps: int = 4) -> tuple[Any, Any]:
    """Weights, and gradients that are now and then missing, and of which the last have special values."""
    rng = np.random.default_rng(0)
    shapes = [(n, dtype) for dtype in dtypes for n in sizes]
    weights = [wild(rng, *shape) for shape in shapes]
    grads: list[list[Tensor | None]] = [
        [wild(rng, *shape, specials=0.02 * (t == steps - 1)) for shape in shapes]
        for t in range(steps)
    ]
    for t, row in enumerate(grads):
        row[t % 3 :: 3] = [None if t % 2 else g for g in row[t % 3 :: 3]]
    return lambda: [w.clone() for w in weights], grads


def dtypes_for(options: dict[str, Any]) -> tuple[torch.dtype, ...]:
    return REAL_DTYPES if options.get("norm_type") == INF else (*REAL_DTYPES, torch.complex64)


CHANGES = {
    "clipped": {"max_grad_norm": 2.0 * (1 + 2**-20)},
    "clipped by the largest": {"max_grad_norm": 0.5 * (1 + 2**-20)},
    "unscaled": {"scale": 3000.7 * (1 + 2**-20)},
    "averaged": {"ema_decay": 0.9 + 2**-20},
    "averaged by a function, in float64": {"ema_decay": lambda t: warm_up(t + (t == 2))},
}


@pytest.mark.native
@pytest.mark.parametrize("name", CHANGES)
def test_control_another_number_is_noticed(name) -> None:
    weights, grads = several([4097], [torch.float32], steps=3)
    step_everywhere("adam", OPTIONS[name], weights, grads[::2])
    with pytest.raises(AssertionError, match="differ in bits"):
        step_everywhere("adam", OPTIONS[name], weights, grads[::2], changed=CHANGES[name])


@pytest.mark.native
def test_control_another_bit_of_a_copy_is_noticed() -> None:
    weights, grads = several([4097], [torch.float32])
    model, expected = (
        Model("adam", OPTIONS["copied"], path, weights()) for path in ("native", "reference")
    )
    for each in (model, expected):
        each.step(grads[0])
    assert_same(model, expected)
    model.copies[0].view(torch.int32)[-1] ^= 1
    with pytest.raises(AssertionError, match="copy 0: 1 of 4097 differ in bits"):
        assert_same(model, expected)


FEW = [0, 33, 1025]


@pytest.mark.native
@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_all_options_in_every_dtype(form) -> None:
    for options in (WHOLE, WHOLE | {"state_dtype": "param", "ema_decay": warm_up}):
        step_everywhere(form, options, *several(FEW, dtypes_for(options)))


@pytest.mark.native
@pytest.mark.parametrize("form", ["amsgrad", "rmsprop"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_alone_in_every_dtype(form, options) -> None:
    """With as many states as there are, and with as few."""
    weights, grads = several(FEW, dtypes_for(options))
    model = step_everywhere(form, options, weights, grads[:-1])
    numbers = torch.cat([t.abs().double().reshape(-1) for _, t in model.tensors()])
    assert numbers.isfinite().double().mean() > 0.9, "else NaN would be compared with NaN"
    step_everywhere(form, options, weights, grads[-1:])


@pytest.mark.native
@pytest.mark.parametrize("form", ["amsgrad", "rmsprop"])
def test_sizes_at_every_seam_and_for_several_threads(form) -> None:
    weights, grads = several([4095, 4097, 100_003], [torch.float32, torch.bfloat16], steps=2)
    step_everywhere(form, WHOLE, weights, grads)


@pytest.mark.native
@pytest.mark.parametrize("grad_dtype", REAL_DTYPES, ids=str)
def test_gradients_of_another_dtype(grad_dtype) -> None:
    weights, _ = several([5, 4097], REAL_DTYPES)
    _, grads = several([5, 4097], [grad_dtype] * 4)
    step_everywhere("amsgrad", WHOLE, weights, grads)


@pytest.mark.native
@pytest.mark.parametrize("p", LAYOUTS)
def test_any_layout_of_parameter_gradient_and_copy(p) -> None:
    for i, g in enumerate(GRADIENT_LAYOUTS):
        rng = np.random.default_rng(i)
        shape = (2, 8, 16, 33) if g == "channels last" else SHAPE  # more than a chunk of the norm
        base, *raw_grads = (
            wild(rng, math.prod(shape), torch.float32).reshape(shape) for _ in range(3)
        )
        copy_like = list(LAYOUTS.values())[(i + 1) % len(LAYOUTS)]
        row = [GRADIENT_LAYOUTS[g](x) for x in raw_grads]
        before = [raw(x) for x in row]
        weights = lambda b=base: [LAYOUTS[p](b)]  # noqa: E731
        step_everywhere("amsgrad", WHOLE, weights, [[x] for x in row], copy_like)
        assert all(map(torch.equal, map(raw, row), before)), "a gradient was written"


@pytest.mark.native
@pytest.mark.parametrize("shape", [(), (1,), (5, 7)], ids=str)
@pytest.mark.parametrize("what", ["parameter", "gradient", "copy"])
@pytest.mark.parametrize(("dtype", "wait"), WAITING.values(), ids=WAITING.keys())
def test_numbers_that_wait_for_their_sign(dtype, wait, what, shape) -> None:
    rng = np.random.default_rng(0)
    base, *grads = (wild(rng, math.prod(shape), dtype).reshape(shape) for _ in range(3))
    turn = {what: wait}.get
    step_everywhere(
        "amsgrad",
        WHOLE,
        lambda: [turn("parameter", torch.clone)(base.clone())],
        [[turn("gradient", torch.clone)(g)] for g in grads],
        turn("copy", torch.clone),
    )


@pytest.mark.native
@pytest.mark.parametrize("at_end", [False, True], ids=["at the beginning", "at the end"])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_nothing_past_either_end_of_gradients_averages_and_copies_is_touched(dtype, at_end) -> None:
    """Pages that may not be touched lie there: a stray access ends the process."""
    for n in (1, 7, 31, 32, 33, 1023, 1025, 4096, 4097):
        (weights, grads), model = several([n], [dtype], steps=1), None
        for isa, n_threads in KERNELS:
            model = Model("amsgrad", WHOLE, "native", weights(), lambda c: guarded(c, at_end))
            with kernel(isa, n_threads):
                for _ in range(2):
                    model.step([guarded(grads[0][0], at_end)])
                    for entry in model.optimizer.state.values():
                        entry["ema"] = guarded(entry["ema"], at_end)


def test_gradients_and_the_neighbours_of_a_copy_are_not_written(path) -> None:
    rng = np.random.default_rng(0)
    base, grad = (wild(rng, math.prod(SHAPE), torch.float32).reshape(SHAPE) for _ in range(2))
    for copy_like in LAYOUTS.values():
        model = Model("adam", WHOLE, path, [base.clone()], copy_like)
        before, around_before = raw(grad), around(model.copies[0])
        model.step([grad])
        assert torch.equal(raw(grad), before) and torch.equal(
            around(model.copies[0]), around_before
        )


# ---- what is refused, is refused before anything has moved ---------------------------------------

AVERAGES: dict[str, Row] = {
    "average that is another state": (
        lambda o: state("ema", lambda _: o.state[the_one(o)]["exp_avg_sq"])(o),
        "state 'ema' lies in the same memory as state 'exp_avg_sq'; expected its own; clone() it",
    ),
    "short average": (
        state("ema", lambda s: s.flatten()[:5].clone()),
        "state 'ema' has shape (5,); expected the parameter's shape (2, 3); load a checkpoint that fits, or drop this "
        "parameter's state to begin anew",
    ),
}


REFUSED = (
    TENSORS
    | AVERAGES
    | {name: STATES[name] for name in ("missing state", "freed state", "NaN step")}
)


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_step_has_moved_nothing(path, row) -> None:
    provoke, message = row
    models = []
    for choice in (path, "reference"):
        copies = [torch.zeros(s, dtype=torch.bfloat16) for s in ((4,), (2, 2), (5,), (2, 3), (1,))]
        options = {"copy_to": copies, "max_grad_norm": 1.0, "ema_decay": 0.9}
        models.append((build(choice, 2, **options), copies))
    (optimizer, copies), (twin, twins_copies) = models
    mend = provoke(optimizer)
    before = everything(optimizer), facts(copies)
    with pytest.raises(RuntimeError) as refusal:
        optimizer.step()
    assert str(refusal.value) == "AdamW: parameter 1 of group 1: " + message
    assert (everything(optimizer), facts(copies)) == before
    mend()
    optimizer.step()
    twin.step()
    assert_same_result(optimizer, twin)
    assert all(torch.equal(a, b) for a, b in zip(copies, twins_copies, strict=True))


# ---- closures, hooks, threads, interruptions -----------------------------------------------------


def test_a_closure_makes_the_gradients_that_are_clipped(path) -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = RMSprop([p], max_grad_norm=1.0, ema_decay=0.5, backend=path)
    p.grad = torch.full((2,), NAN)

    def closure() -> float:
        p.grad = torch.tensor([6.0, 8.0])
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert float(optimizer.grad_norm) == 10.0


def test_hooks_see_the_norm_that_is_given(path) -> None:
    optimizer, seen = build(path, 0, max_grad_norm=1.0), []
    optimizer.register_step_pre_hook(lambda _, args, kwargs: seen.append(kwargs))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(float(o.grad_norm)))
    optimizer.step(grad_norm=torch.tensor(3.0))
    assert seen == [{"grad_norm": torch.tensor(3.0)}, 3.0]


@pytest.mark.native
def test_optimizers_stepped_at_once_in_two_threads() -> None:
    weights, grads = several([3, 70_001], [torch.float32])
    models = [Model("amsgrad", options, "native", weights()) for options in (WHOLE, {})]
    twins = [Model("amsgrad", options, "reference", weights()) for options in (WHOLE, {})]
    with threads(2):
        in_threads([lambda m=m: [m.step(row) for row in grads] for m in models])
    for model, twin in zip(models, twins, strict=True):
        for row in grads:
            twin.step(row)
        assert_same(model, twin)


@pytest.mark.native
def test_an_interrupted_step_is_either_made_or_not() -> None:
    """Weights, states, averages and copies of all parameters together."""
    options = WHOLE | {"max_grad_norm": 2.0, "ema_decay": warm_up}
    (weights, _), g = (
        several([3, 60_000, 5], [torch.float32]),
        [torch.ones(n) for n in (3, 60_000, 5)],
    )

    def after(steps: int) -> Model:
        model = Model("amsgrad", options, "native", weights())
        for _ in range(steps):
            model.step(g)
        return model

    def all_bits(model: Model) -> list[Tensor]:
        return [
            t.reshape(-1).view(torch.uint8) for name, t in model.tensors() if name != "the norm"
        ]

    def ring(*_: Any) -> None:
        raise Alarm

    either = [all_bits(after(1)), all_bits(after(2))]
    handler, seen = signal.signal(signal.SIGALRM, ring), []
    try:
        with threads(1):
            begin, model = time.perf_counter(), after(1)
            model.step(g)
            took = time.perf_counter() - begin
            for delay in np.random.default_rng(0).uniform(1e-6, took, 200):
                model = after(1)
                try:
                    signal.setitimer(signal.ITIMER_REAL, delay)
                    model.step(g)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Alarm:
                    found = all_bits(model)
                    seen.append(any(all(map(torch.equal, found, known)) for known in either))
                if len(seen) == 20:
                    break
    finally:
        signal.signal(signal.SIGALRM, handler)
        torch.set_grad_enabled(True)  # an alarm in the __exit__ of torch.no_grad() leaves it off
    assert len(seen) > 5
    assert all(seen), f"{seen.count(False)} of {len(seen)} interrupted steps were made in part"
