"""In every format of parameters and states, the kernels and the pure-Python reference give the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import (
    REAL_DTYPES,
    assert_same_bits,
    assert_same_result,
    give_gradient,
    tensors_of,
    threads,
)
from test_grad_scaler import scaler_of
from test_layout import GRADIENT_LAYOUTS, LAYOUTS, check_step
from test_one_pass import FORMS, KERNELS, WHOLE, kernel, several, step_everywhere
from test_refusals import facts
from torch import Tensor
from torch.optim import Optimizer

from adamfused import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    Lion,
    NAdam,
    RAdam,
    RMSprop,
    formats,
    reference,
)
from adamfused.rules import Now
from adamfused.storage import SMALLEST

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
]
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# ---- every rule, parameter and state -------------------------------------------------------------

RULES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"weight_decay": 0.1}),
    "sgd, momentum": (SGD, {"momentum": 0.9, "dampening": 0.1}),
    "sgd, low momentum": (SGD, {"momentum": 0.3, "nesterov": True}),
    "adagrad": (Adagrad, {"initial_accumulator_value": 0.1}),
    "adadelta": (Adadelta, {"weight_decay": 0.1}),
    "lion": (Lion, {"weight_decay": 0.1}),
    "nadam": (NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": (RAdam, {"betas": (0.9, 0.95)}),
    "adam, decoupled decay": (AdamW, {"weight_decay": 0.1}),
    "adam, coupled decay, far averages": (Adam, {"weight_decay": 0.1, "betas": (0.3, 0.4)}),
    "amsgrad, climbing": (AdamW, {"amsgrad": True, "maximize": True}),
    "rmsprop, far average": (RMSprop, {"alpha": 0.4}),
    "rmsprop, momentum": (RMSprop, {"momentum": 0.9, "weight_decay": 0.1}),
    "rmsprop, centered": (RMSprop, {"centered": True, "alpha": 0.9}),
    "rmsprop, both": (RMSprop, {"centered": True, "momentum": 0.3, "maximize": True}),
}
PARAMETERS = [
    *((dtype, None) for dtype in (*REAL_DTYPES, torch.complex64)),
    *((BF16, kind) for kind in ("split16", "split8", "fp32")),
    (F16, "fp32"),
]
STATES = (None, BF16, F16, "int8")
SEAMS = (0, 1, 15, 16, 17, 127, 128, 129, 1023, 1024, 1025, 4113)
CODED_SEAMS = (4096, 4097, 4111, 4112, 4113, 4223, 4225, 5119, 5121, 20_001, SMALLEST - 1)


class Group(NamedTuple):
    """Parameters of one dtype, kept in one way."""

    dtype: torch.dtype
    options: dict[str, Any]
    seams: tuple[int, ...]


def every_format() -> Iterator[Group]:
    for (dtype, master), state in itertools.product(PARAMETERS, STATES):
        if dtype.is_complex and state == BF16:
            continue  # torch has no complex numbers of these
        options = {"master_weights": master, "state_dtype": state}
        seams = CODED_SEAMS if state == "int8" and not dtype.is_complex else SEAMS
        yield Group(dtype, options, seams)
        if state in (BF16, F16) or (master is None and dtype in (BF16, F16)):
            yield Group(dtype, options | {"stochastic_rounding": True}, seams)


USUAL = (-12.0, 4.0)


def far_apart(
    rng: np.random.Generator,
    n: int,
    dtype: torch.dtype,
    specials: float = 0.0,
    span: tuple[float, float] = USUAL,
) -> Tensor:
    """``n`` numbers of either sign, from 10 to the first of ``span`` to 10 to the other, each of its own size or alike
    in their block; a few are zero, and a share ``specials`` infinite or NaN."""
    if dtype.is_complex:
        return torch.view_as_complex(far_apart(rng, 2 * n, F32, specials, span).reshape(n, 2))
    of_block = rng.uniform(*span, -(-n // 128)).repeat(128)[:n]
    size = rng.uniform(*span, n) if rng.random() < 0.5 else of_block + rng.uniform(-1, 0, n)
    x = rng.choice([-1.0, 1.0], n) * 10.0**size
    x[rng.random(n) < 0.02] = 0.0
    if rng.random() < 0.2:
        x[: n // 2] = 0.0  # whole blocks
    odd = rng.random(n) < specials
    x[odd] = rng.choice([np.inf, -np.inf, np.nan], int(odd.sum()))
    return torch.from_numpy(x).to(dtype)


def compare(
    make: type[Optimizer],
    options: dict[str, Any],
    groups: Sequence[Group],
    steps: int = 6,
    turn: int = 0,
    span: tuple[float, float] = USUAL,
) -> None:
    """Steps the reference and every kernel from the same weights by the same gradients; of 4 sizes in each group, other
    ones at another ``turn``. The 4th of 6 gradients has infinities and NaN. Before it, some weights are written from
    outside, as loading a model does."""
    rng = np.random.default_rng(turn)
    shapes = [
        [(group.seams[(4 * turn + j + k) % len(group.seams)], group.dtype) for k in range(4)]
        for j, group in enumerate(groups)
    ]
    weights = [[torch.from_numpy(rng.normal(size=n)).to(d) for n, d in row] for row in shapes]

    def build(path: str) -> Optimizer:
        rows = [
            {"params": [torch.nn.Parameter(w.clone()) for w in row]} | group.options
            for row, group in zip(weights, groups, strict=True)
        ]
        return make(rows, lr=0.01, seed=5, backend=path, **options)

    def move(optimizer: Optimizer, grads: list[Tensor | None]) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, g in zip(params, grads, strict=True):
            give_gradient(p, g)
        optimizer.step()

    @torch.no_grad()
    def write(optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for p in group["params"][::2]:
                p[::3] *= -1.25
                p[1::9], p[2::9], p[4::90] = 0.0, -0.0, torch.inf  # whatever is hidden below

    expected = build("reference")
    found = [build("native") for _ in KERNELS]
    for t in range(steps):
        grads: list[Tensor | None] = []
        for i, (n, dtype) in enumerate(itertools.chain(*shapes)):
            if not dtype.is_complex:
                dtype = REAL_DTYPES[i % 4] if i % 3 == 0 else dtype
            missing = i % 7 == 0 and t == 1
            grads.append(None if missing else far_apart(rng, n, dtype, 0.01 * (t == 3), span))
        with threads(1):
            move(expected, grads)
        for (isa, n_threads), optimizer in zip(KERNELS, found, strict=True):
            with kernel(isa, n_threads):
                move(optimizer, grads)
            if t in (2, steps - 1):
                assert_same_result(optimizer, expected)
            if t == 2:
                write(optimizer)
        if t == 2:
            everything = [x.detach().abs().float().flatten() for _, x in tensors_of(expected)]
            assert torch.cat(everything).isfinite().float().mean() > 0.9, "else NaN is compared"
            write(expected)


@pytest.mark.parametrize("rule", RULES)
def test_every_format_of_parameters_and_states(rule) -> None:
    compare(*RULES[rule], list(every_format()), turn=list(RULES).index(rule))


@pytest.mark.parametrize("rule", ["adam, decoupled decay", "rmsprop, centered"])
def test_moments_too_small_and_too_large_for_a_scale(rule) -> None:
    """Below 2^-90 and above 2^127, down to the least of floats."""
    make, options = RULES[rule]
    options = options | ({"betas": (0.9, 0.4)} if make is AdamW else {"alpha": 0.4})
    groups = [Group(F32, {"state_dtype": "int8"}, CODED_SEAMS)] * 4
    compare(make, options, groups, span=(-44.0, 19.2))


def test_all_formats_are_there_and_have_codes_where_they_should() -> None:
    groups = list(every_format())
    assert len(groups) == 56
    for group in groups:
        p = torch.nn.Parameter(torch.zeros(4096, dtype=group.dtype))
        p.grad = torch.ones_like(p)
        optimizer = AdamW([p], backend="native", **group.options)
        optimizer.step()
        has_codes = optimizer.state[p]["exp_avg"].dtype == torch.int8
        assert has_codes == (group.seams == CODED_SEAMS)


# ---- the comparison can fail ---------------------------------------------------------------------


def to_even(bits: Tensor) -> Tensor:
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF


INT8, SPLIT8 = {"state_dtype": "int8"}, {"master_weights": "split8"}
CHANGES: dict[str, tuple[Any, str, Any, dict[str, Any]]] = {
    "other words": (formats, "_GOLDEN", 0x9E3779BB, {"stochastic_rounding": True}),
    "other dither": (formats.Random, "dither", formats.Random.words, INT8),
    "scales of the largest": (formats, "_scale_for", lambda x, *_: x.clamp(min=2.0**-90), INT8),
    "another c": (
        formats,
        "CODES",
        formats.CODES | {torch.uint8: formats.CODES[torch.uint8]._replace(c=2.0**-30)},
        INT8,
    ),
    "ties of split weights": (formats, "_upper", to_even, SPLIT8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_format_is_noticed(monkeypatch, change) -> None:
    module, name, value, options = CHANGES[change]
    group = Group(BF16, options, (SMALLEST, 6000, 4097, 4224))
    compare(AdamW, {}, [group], 2)
    monkeypatch.setattr(module, name, value)
    with pytest.raises(AssertionError, match="differ in bits"):
        compare(AdamW, {}, [group], 3)


# ---- with the rest of the step -------------------------------------------------------------------

STORED: dict[str, tuple[tuple[torch.dtype, ...], dict[str, Any]]] = {
    "split16, int8": ((BF16,), {"master_weights": "split16", "state_dtype": "int8"}),
    "split8, bfloat16 at random": (
        (BF16,),
        {"master_weights": "split8", "state_dtype": BF16, "stochastic_rounding": True},
    ),
    "fp32, float16": ((BF16, F16), {"master_weights": "fp32", "state_dtype": F16}),
    "int8 and all at random": (
        REAL_DTYPES,
        {"state_dtype": "int8", "stochastic_rounding": True, "ema_dtype": "param"},
    ),
}
stored = pytest.mark.parametrize("how", STORED)


@stored
@pytest.mark.parametrize("form", FORMS)
def test_unscaled_clipped_averaged_and_copied(form, how) -> None:
    dtypes, options = STORED[how]
    step_everywhere(form, WHOLE | options, *several([33, 4097, 5000], dtypes, steps=3))


SHAPES = (4, 9, 12, 15), (4, 8, 12, 16)  # rows of whole blocks, and not


@stored
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, how) -> None:
    """Codes lie in the order of rows, however the parameter and its gradient lie; nothing is written beside them."""
    dtypes, options = STORED[how]
    others = [
        lie for name, lie in GRADIENT_LAYOUTS.items() if name != "overlapping"
    ]  # of a small shape
    for i, (isa, _) in enumerate(KERNELS[::2]):
        rng = np.random.default_rng(i)

        def tensor(
            dtype: torch.dtype, lie: Callable[[Tensor], Tensor], rng=rng, shape=SHAPES[i % 2]
        ) -> Tensor:
            x = far_apart(rng, int(np.prod(shape)), F32).clamp(-1e3, 1e3)
            return lie(x.to(dtype).reshape(shape))

        params = [tensor(dtype, LAYOUTS[layout]) for dtype in dtypes]
        at = list(LAYOUTS).index(layout)
        grads = [[tensor(d, others[(at + t + i) % len(others)]) for d in dtypes] for t in range(3)]
        with kernel(isa, 2):
            check_step((AdamW, {"amsgrad": True} | options), "native", params, grads)


def optimizer_of_all(path: str = "native", **options: Any) -> AdamW:
    """A group for each way of keeping."""
    rows = []
    for j, (dtypes, how) in enumerate(STORED.values()):
        source = torch.Generator().manual_seed(j)
        params = [
            torch.nn.Parameter(torch.randn(n, generator=source).to(dtype))
            for dtype in dtypes
            for n in (70, 4100)
        ]
        rows.append({"params": params} | {k: v for k, v in how.items() if k != "ema_dtype"})
    return AdamW(rows, lr=0.01, backend=path, **options)


def give(optimizer: Optimizer, seed: int, scale: float = 1.0) -> list[torch.nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        give_gradient(p, scale * torch.randn(p.shape, generator=source).to(p.dtype))
    return params


def test_a_compiled_step_has_the_same_bits() -> None:
    eager, compiled, fewer = (optimizer_of_all() for _ in range(3))
    torch._dynamo.reset()
    step = torch.compile(lambda: compiled.step(), fullgraph=True)
    for seed in range(4):
        for optimizer in (eager, compiled, fewer):
            give(optimizer, seed)
        eager.step()
        step()
        if seed < 3:
            fewer.step()
    assert_same_result(eager, compiled)
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_same_result(eager, fewer)


def test_capturable_on_a_cpu_changes_no_bit() -> None:
    plain, capturable = optimizer_of_all(), optimizer_of_all(capturable=True)
    for seed in range(3):
        for optimizer in (plain, capturable):
            give(optimizer, seed)
            optimizer.step()
    assert_same_result(plain, capturable)


@pytest.mark.parametrize("path", ["native", "reference"])
def test_an_overflow_that_a_scaler_finds_moves_nothing(path) -> None:
    """Not even the random numbers: the next step has those that it would have had."""
    scaled, plain = optimizer_of_all(path), optimizer_of_all(path)
    scaler = scaler_of(1024.0)
    give(scaled, 0, 1024.0), give(plain, 0)
    scaler.step(scaled), scaler.update(), plain.step()
    before = facts([t for p in give(scaled, 1) for t in (p, *scaled.state[p].values())])
    params = [p for group in scaled.param_groups for p in group["params"]]
    params[-1].grad[3] = torch.inf
    scaler.step(scaled), scaler.update()
    assert scaler.get_scale() == 512
    assert facts([t for p in params for t in (p, *scaled.state[p].values())]) == before
    give(scaled, 2, 512.0), give(plain, 2)
    scaler.step(scaled), plain.step()
    for p, q in zip(params, give(plain, 2), strict=True):
        assert_same_bits(p.detach(), q.detach())
    assert_same_result(scaled, plain)
    give(scaled, 3, 512.0)
    scaler.update(), scaler.step(scaled)
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_same_result(scaled, plain)


# ---- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 2.0**-90, 1.0, 1.5, 2.0**127, 1.5 * 2.0**127])
def test_codes_that_no_step_wrote(scale) -> None:
    """Every byte, also those of what is not finite in a block that is not marked, and a mark where all is finite."""
    n = 40 * formats.BLOCK
    weight, grad = torch.linspace(-1, 1, n).to(BF16), torch.linspace(2, -3, n).to(BF16)
    hyper, key = [0.9, 0.999, 1e-8, 0.01, 1.0, 0.0, 1.0], formats.place_key(7, 3)
    every = torch.arange(n, dtype=torch.int32) * 37 & 255
    every[: n // 2] &= 63
    codes, lower = every.to(torch.uint8), torch.zeros(n, dtype=torch.int16)
    scales = torch.full(formats.scales_shape(weight.shape), scale)

    def parts() -> list[Tensor]:
        return [x.clone() for x in (weight, codes.view(torch.int8), codes, scales, scales, lower)]

    p, m, v, m_scales, v_scales, master = expected = parts()
    random = formats.Random.at_step(key, 1)
    reference.step(
        "adam", hyper, Now(0.1, 1), p, grad, [m, v], scales=[m_scales, v_scales], master=master, random=random
    )  # fmt: skip
    assert not torch.equal(m, codes.view(torch.int8))
    for isa, n_threads in KERNELS:
        p, m, v, m_scales, v_scales, master = found = parts()
        with kernel(isa, n_threads):
            torch.ops.adamfused.step_(
                [p], [grad], [m, v], [torch.zeros(())], [], [master], [m_scales, v_scales], [], "adam", hyper,
                0.1, place_keys=[key], firsts=[0],
            )  # fmt: skip
        for x, y in zip(found, expected, strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("first", [0, 4096, 2**31 - 3, 2**32 - 3, 2**40 + 1])
def test_a_shard_wherever_it_begins(first) -> None:
    """Its random numbers are those of its place in the whole, counted in 32 bits."""
    source, n = torch.Generator().manual_seed(0), 4113
    weight, grad = (torch.randn(n, generator=source).to(BF16) for _ in range(2))
    hyper, key = [0.9, 0.999, 1e-8, 0.01, 1.0, 0.0, 1.0], formats.place_key(7, 3)

    def parts() -> tuple[Tensor, list[Tensor], list[Tensor]]:
        states = [torch.zeros(n, dtype=dtype) for dtype in (torch.int8, torch.uint8)]
        return (
            weight.clone(),
            states,
            [torch.zeros(formats.scales_shape(weight.shape)) for _ in states],
        )

    def by_reference(first: int) -> list[Tensor]:
        p, states, scales = parts()
        for t in (1, 2):
            random = formats.Random.at_step(key, t, first)
            reference.step(
                "adam", hyper, Now(0.1, t), p, grad, states, scales=scales, random=random, stochastic=True
            )  # fmt: skip
        return [p, *states, *scales]

    for isa, n_threads in KERNELS:
        (p, states, scales), count = parts(), torch.zeros(())
        with kernel(isa, n_threads):
            for _ in range(2):
                torch.ops.adamfused.step_(
                    [p], [grad], states, [count], [], [], scales, [], "adam", hyper, 0.1,
                    at_random=True, place_keys=[key], firsts=[first],
                )  # fmt: skip
        for x, y in zip((p, *states, *scales), by_reference(first), strict=True):
            assert_same_bits(x, y)
        with pytest.raises(AssertionError):  # the comparison can fail
            assert_same_bits(p, by_reference(first + 1)[0])


@pytest.mark.parametrize("coded", [False, True])
def test_the_registered_operator_is_sound_with_masters_and_codes(coded) -> None:
    ps = [torch.randn(n).to(BF16) for n in (4100, 5000)]
    states = [torch.zeros(p.shape, dtype=d) for p in ps for d in (torch.int8, torch.uint8)]
    if not coded:
        states = [torch.zeros(p.shape) for p in ps for _ in range(2)]
    arguments = {
        "masters": [torch.zeros_like(p, dtype=torch.int16) for p in ps],
        "scales": [torch.zeros(formats.scales_shape(s.shape)) for s in states] if coded else [],
        "carried": [],
        "at_random": True,
        "place_keys": [1, 2],
        "firsts": [0, 0],
    }
    hyper, counts = [0.9, 0.999, 1e-8, 0.01, 1.0, 0.0, 1.0], [torch.zeros(()) for _ in ps]
    torch.library.opcheck(
        torch.ops.adamfused.step_.default,
        (ps, [torch.randn_like(p) for p in ps], states, counts, []),
        arguments | {"rule": "adam", "hyper": hyper, "lr": 0.1},
    )
