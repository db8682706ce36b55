"""A clipped step is the plain step on clipped gradients: bit for bit on those multiplied by hand, within rounding on
those of ``torch.nn.utils.clip_grad_norm_``, and with infinities and NaN where torch has them. One norm for several
optimizers, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    EVERY_OPTIMIZER,
    REAL_DTYPES,
    assert_same_bits,
    assert_same_result,
    give_gradient,
    wild,
)
from test_norm import gradients, parameter
from test_one_pass import FORMS
from test_refusals import build, everything, the_one
from torch import Tensor
from torch.optim import Optimizer

import adamfused
from adamfused import Adam, AdamW, RMSprop

INF, NAN = float("inf"), float("nan")


# ---- a clipped step is the plain step on clipped gradients ---------------------------------------


def integers(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum of their squares has no rounding error, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, (n,), generator=generator).to(dtype)


def trained(
    path: str, form: str, grads: Sequence[Sequence[Tensor]], groups: bool = False, **options: Any
) -> Optimizer:
    """After a step for each row of gradients; with ``groups``, each parameter has a group and a rate of its own."""
    make, more = FORMS[form]
    params = [
        torch.nn.Parameter(torch.linspace(-1, 1, g.numel()).reshape(g.shape)) for g in grads[0]
    ]
    lists: Any = (
        [{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(params)] if groups else params
    )
    optimizer = make(lists, backend=path, **(more | {"lr": 0.1} | options))
    for row in grads:
        for p, g in zip(params, row, strict=True):
            give_gradient(p, g)
        optimizer.step()
    return optimizer


def clipped(grads: Sequence[Tensor], max_norm: float, norm_type: float = 2.0) -> list[Tensor]:
    """By hand: the coefficient in float64, rounded once to float32, times each gradient in float32."""
    every = torch.cat([g.double().reshape(-1) for g in grads])
    norm = float(every.abs().max()) if norm_type == INF else math.sqrt(float(every.square().sum()))
    return [np.float32(min(1.0, max_norm / (norm + 1e-6))).item() * g.float() for g in grads]


@pytest.mark.parametrize("norm_type", [2.0, INF])
@pytest.mark.parametrize("groups", [False, True], ids=["one group", "three groups"])
@pytest.mark.parametrize("form", FORMS)
def test_clipping_is_one_multiplication_in_float32(path, form, groups, norm_type) -> None:
    """Bit for bit, also of gradients of 16 bits, and by one coefficient for all groups."""
    options = {"max_grad_norm": 0.7, "norm_type": norm_type}
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    grads = [
        [integers(n, seed + n, d) for n, d in zip((5, 300, 1), dtypes, strict=True)]
        for seed in range(3)
    ]
    by_hand = [clipped(row, 0.7, norm_type) for row in grads]
    step = trained(path, form, grads, groups, **options)
    assert_same_result(step, trained(path, form, by_hand, groups))
    with pytest.raises(AssertionError, match="differ in bits"):
        other = [clipped(row, 0.7 * (1 + 2**-20), norm_type) for row in grads]
        assert_same_result(step, trained(path, form, other, groups))


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_a_coefficient_that_is_a_power_of_two_is_exact_in_any_dtype(path, dtype) -> None:
    g = torch.tensor([3.0, 4.0], dtype=dtype)  # its norm is 5
    for power in (1.0, 0.5, 2.0**-6):
        step = trained(path, "adamw", [[g]], max_grad_norm=power * (5 + 1e-6))
        assert_same_result(step, trained(path, "adamw", [[g * power]]))


@pytest.mark.parametrize("form", FORMS)
def test_a_norm_within_bounds_changes_no_bit(path, form) -> None:
    grads = [[integers(100, seed) for _ in range(2)] for seed in range(3)]
    for largest_norm in (2000.0, INF):
        step = trained(path, form, grads, max_grad_norm=largest_norm)
        assert_same_result(step, trained(path, form, grads))
        assert 50 < float(step.grad_norm) < 100


@pytest.mark.parametrize("form", FORMS)
def test_the_clipped_step_is_that_of_torch_within_rounding(path, form) -> None:
    """After one step, the states are multiples of the gradient g and of its square. With u = 2^-24, torch's norm of n
    numbers is off by n u / 2 and a few u at most, its coefficient and product by 3 u, ours by 2 u; the states round 3
    times on either side. So g agrees to (n / 2 + 15) u of itself, and its square to twice that."""
    n, rng = 200, np.random.default_rng(0)
    grads = [wild(rng, n // 2, torch.float32) for _ in range(2)]
    clipped_by_torch = [torch.nn.Parameter(g.clone()) for g in grads]
    for p, g in zip(clipped_by_torch, grads, strict=True):
        p.grad = g.clone()
    total = torch.nn.utils.clip_grad_norm_(clipped_by_torch, 0.7)
    assert float(total) > 1000
    options = {"weight_decay": 0}
    ours = trained(path, form, [grads], max_grad_norm=0.7, **options)
    theirs = trained(path, form, [[p.grad for p in clipped_by_torch]], **options)
    plain_step = trained(path, form, [grads], **options)
    for p, q, r in zip(
        *(o.param_groups[0]["params"] for o in (ours, theirs, plain_step)), strict=True
    ):
        for key in {"exp_avg", "exp_avg_sq", "square_avg", "grad_avg"} & set(ours.state[p]):
            a, b, unclipped = (
                o.state[x][key] for o, x in ((ours, p), (theirs, q), (plain_step, r))
            )
            torch.testing.assert_close(a, b, rtol=2 * (n / 2 + 15) * 2**-24, atol=0)
            assert not torch.allclose(a, unclipped)


@pytest.mark.parametrize("max_norm", [1.0, INF])
@pytest.mark.parametrize("norm_type", [2.0, INF])
@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_infinities_and_nan_become_what_they_become_in_torch(
    path, special, norm_type, max_norm
) -> None:
    """Element by element. An infinite norm clips to zeros, and to NaN where it came from; a NaN makes all NaN."""
    grads = [torch.tensor([1.0, -2.0, special, 3.0]), torch.tensor([5.0])]
    by_torch = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(by_torch, grads, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(by_torch, max_norm, norm_type)
    step = trained(path, "adamw", [grads], max_grad_norm=max_norm, norm_type=norm_type)
    assert_same_result(step, trained(path, "adamw", [[p.grad for p in by_torch]]))
    first = step.state[step.param_groups[0]["params"][0]]["exp_avg"]
    all_nan = math.isnan(special) or max_norm == INF
    assert first.isnan().tolist() == ([True] * 4 if all_nan else [False, False, True, False])


@pytest.mark.parametrize("special", [INF, NAN])
@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_error_if_nonfinite(path, norm_type, special) -> None:
    options = {"max_grad_norm": 1.0, "norm_type": norm_type, "error_if_nonfinite": True}
    optimizer = build(path, 2, ema_decay=0.9, **options)
    twin = build("reference", 2, ema_decay=0.9, **options)
    good, the_one(optimizer).grad[1, 1] = the_one(optimizer).grad.clone(), special
    before = everything(optimizer)
    with pytest.raises(RuntimeError) as refusal:
        optimizer.step()
    assert str(refusal.value) == (
        f"The total norm of order {norm_type} for gradients is non-finite ({special}), so it cannot be clipped; look "
        "for the cause, or use error_if_nonfinite=False"
    )
    with pytest.raises(
        RuntimeError, match=str(refusal.value)[: len("The total norm of order 2.0 for gradients")]
    ):
        torch.nn.utils.clip_grad_norm_(
            [the_one(optimizer)], 1.0, norm_type, error_if_nonfinite=True
        )
    assert everything(optimizer) == before
    the_one(optimizer).grad = good
    optimizer.step()
    twin.step()
    assert_same_result(optimizer, twin)


def test_clip_grad_norm_before_the_step_works_as_ever(path) -> None:
    row = [integers(50, seed) for seed in range(3)]
    params = [torch.nn.Parameter(g.clone()) for g in row]
    for p, g in zip(params, row, strict=True):
        p.grad = g.clone()
    optimizer = AdamW(params, backend=path)
    torch.nn.utils.clip_grad_norm_(params, 0.5)
    assert float(optimizer.compute_grad_norm()) == pytest.approx(0.5, rel=1e-6)
    expected = trained(
        path, "adamw", [[p.grad.clone() for p in params]], weight_decay=0.01, lr=1e-3
    )
    optimizer.step()
    for p, q in zip(params, expected.param_groups[0]["params"], strict=True):
        assert_same_bits(optimizer.state[p]["exp_avg"], expected.state[q]["exp_avg"])


# ---- several optimizers --------------------------------------------------------------------------


def test_several_optimizers_that_clip_by_one_norm_move_as_one(path) -> None:
    """Bit for bit: the norm that is handed over is not rounded to float32, which would show in one of 20 steps."""
    grads = gradients([5, 4097, 100], torch.float32)

    def moved(*parts: slice, together: bool = True) -> tuple[list[AdamW], list[Tensor]]:
        params = [parameter(g.clone()) for g in grads]
        each = [AdamW(params[part], lr=0.1, max_grad_norm=1.0, backend=path) for part in parts]
        for _ in range(20):
            total = adamfused.grad_norm(each)
            for optimizer in each:
                optimizer.step(**({"grad_norm": total} if together else {}))
            for p in params:
                p.grad.mul_(1.1)
        return each, [t for p in params for o in each for t in o.state.get(p, {}).values()]

    (one,), expected = moved(slice(0, 3), together=False)
    several, found = moved(slice(0, 1), slice(1, 3))
    _, apart = moved(slice(0, 1), slice(1, 3), together=False)
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)
    for optimizer in several:
        assert_same_bits(optimizer.grad_norm, one.grad_norm)
    assert not torch.equal(apart[1], expected[1])


def test_the_norm_of_several_optimizers(path) -> None:
    """A parameter that two of them have counts once."""
    three, four, twelve = (parameter(torch.tensor([x])) for x in (3.0, 4.0, -12.0))
    options: Any = {"backend": path}
    each = [AdamW([three, four], **options), RMSprop([twelve], **options), Adam([four], **options)]
    assert_same_bits(adamfused.grad_norm(each), torch.tensor(13.0).double())
    assert_same_bits(adamfused.grad_norm(iter(each[:1])), torch.tensor(5.0).double())
    largest = [Adam([p], norm_type=INF, **options) for p in (four, twelve)]
    assert_same_bits(adamfused.grad_norm(largest), torch.tensor(12.0).double())


@pytest.mark.reference
def test_optimizers_that_have_no_norm_in_common_are_refused() -> None:
    words = "expected at least one, and the same norm_type in all"
    options: list[dict[str, Any]] = [{}, {"norm_type": INF}]
    for each, got in (
        (options, "2 optimizers with norm_type [2.0, inf]"),
        ([], "0 optimizers with norm_type []"),
    ):
        with pytest.raises(ValueError) as refusal:
            adamfused.grad_norm([Adam([parameter(torch.ones(1))], **o) for o in each])
        assert str(refusal.value) == f"grad_norm() got {got}; {words}"


@pytest.mark.reference
def test_an_optimizer_of_torch_has_no_norm() -> None:
    p = parameter(torch.ones(1))
    with pytest.raises(TypeError) as refusal:
        adamfused.grad_norm([Adam([p]), torch.optim.Adam([p])])
    assert str(refusal.value) == (
        "grad_norm: optimizers[1] is of type torch.optim.adam.Adam; expected an optimizer of adamfused, such as "
        "adamfused.AdamW"
    )


def test_the_optimizer_whose_gradient_cannot_be_read_is_named(path) -> None:
    good, bad = parameter(torch.ones(2)), parameter(torch.ones(2).to_sparse(), like=torch.ones(2))
    with pytest.raises(
        RuntimeError, match="^RMSprop: parameter 1 of group 0: its gradient is sparse"
    ):
        adamfused.grad_norm(
            [AdamW([good], backend=path), RMSprop([parameter(torch.ones(1)), bad], backend=path)]
        )


@pytest.mark.parametrize(
    "given", [torch.tensor(10.0), torch.tensor([10.0]), torch.tensor(10.0).double()], ids=str
)
def test_a_norm_that_is_given_is_clipped_by(path, given) -> None:
    results = []
    for max_norm, options in ((1.0, {}), (1.0, {"grad_norm": given})):
        p = parameter(torch.tensor([3.0, 4.0]))
        optimizer = RMSprop([p], max_grad_norm=max_norm, alpha=0.0, backend=path)
        optimizer.step(**options)
        results.append(float(optimizer.state[p]["square_avg"][0]))
    assert float(optimizer.grad_norm) == 10.0
    assert results == pytest.approx([0.6**2, 0.3**2], rel=1e-6)


def test_a_norm_is_given_only_where_it_is_used(path) -> None:
    """Else it would be ignored, and the user would think that it clipped."""
    given = torch.tensor(1.0)
    for options, closure, words in (
        ({}, None, "of an optimizer that does not clip; expected one that has max_grad_norm"),
        (
            {"max_grad_norm": 1.0},
            lambda: None,
            "with a closure, which makes other gradients; expected one of them",
        ),
    ):
        optimizer = build(path, 1, **options)
        before = everything(optimizer)
        with pytest.raises(ValueError) as refusal:
            optimizer.step(closure, grad_norm=given)
        assert str(refusal.value) == "grad_norm was given to step() " + words
        assert everything(optimizer) == before


# ---- arguments -----------------------------------------------------------------------------------

NORM_TYPE = "expected 2.0 or float('inf'); for other norms call torch.nn.utils.clip_grad_norm_ before step()"
MAX_NORM = "expected None (no clipping) or a number above 0"


@pytest.mark.reference
@pytest.mark.parametrize("make", EVERY_OPTIMIZER)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"norm_type": t}, f"Invalid norm_type value: {t}; {NORM_TYPE}")
            for t in (1, 3.0, NAN, "inf", None)
        ),
        *(
            ({"max_grad_norm": m}, f"Invalid max_grad_norm value: {m!r}; {MAX_NORM}")
            for m in (0, 0.0, -1.0, NAN, "1", torch.ones(2), np.ones(2), np.float32(0))
        ),
    ],
    ids=str,
)
def test_argument_is_refused(make, options, message) -> None:
    with pytest.raises(ValueError) as refusal:
        make([parameter(torch.ones(2))], **options)
    assert str(refusal.value) == message


@pytest.mark.reference
@pytest.mark.parametrize(
    "one", [1, np.float32(1), np.int64(1), torch.tensor(1.0), torch.ones(1, dtype=torch.int32)]
)
def test_any_number_is_one(one) -> None:
    made = Adam([parameter(torch.ones(2))], max_grad_norm=one, norm_type=one + 1)
    later = Adam([parameter(torch.ones(2))], max_grad_norm=3.0)
    later.max_grad_norm = one
    for number in (made.max_grad_norm, later.max_grad_norm, made._options.norm_type - 1):
        assert type(number) is float and number == 1.0


def test_max_grad_norm_may_change_between_steps(path) -> None:
    p = parameter(torch.tensor([3.0, 4.0]))
    optimizer = RMSprop([p], max_grad_norm=2.5, alpha=0.0, backend=path)
    seen = []
    for value in (2.5, 0.5, None, INF):
        optimizer.max_grad_norm = value
        assert optimizer.max_grad_norm == value
        optimizer.step()
        seen.append(float(optimizer.state[p]["square_avg"][0]))
    assert seen == pytest.approx([1.5**2, 0.3**2, 9, 9], rel=1e-6)
    with pytest.raises(ValueError, match="Invalid max_grad_norm value: -1.0"):
        optimizer.max_grad_norm = -1.0
    assert optimizer.max_grad_norm == INF
