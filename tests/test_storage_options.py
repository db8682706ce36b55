"""The options of formats: what each keeps, that split weights train as float32 ones do, what the random numbers depend
on, groups of several formats, and what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import EVERY_OPTIMIZER, assert_same_bits, assert_same_result
from test_one_pass import FORMS
from test_refusals import everything
from torch import Tensor
from torch.optim import Optimizer

from adamfused import AdamW, RMSprop, fp32_weights, step_in_backward
from adamfused.formats import scales_shape
from adamfused.parity.walk import give_gradient

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LARGE = (40, 128)  # 5,120 elements, enough for codes of 8 bits


def numbers(seed: int, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(*dtypes: torch.dtype, shape: tuple[int, ...] = LARGE) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(numbers(i, *shape, dtype=d)) for i, d in enumerate(dtypes)]


def train(optimizer: Optimizer, steps: int, first: int = 0) -> Optimizer:
    """The gradients depend on the step and on the parameter's place, and are of bfloat16."""
    for t in range(first, first + steps):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(params):
            give_gradient(p, numbers(1000 * t + i, *p.shape))
        optimizer.step()
    return optimizer


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", EVERY_OPTIMIZER)
def test_what_is_kept_in_which_order(path, ours) -> None:
    options = {"momentum": 0.9, "centered": True, "amsgrad": True}
    options = {k: v for k, v in options.items() if k in inspect.signature(ours).parameters}
    p = torch.nn.Parameter(numbers(0, 128, 40).t())
    optimizer = ours(
        [p], master_weights="split8", state_dtype="int8", ema_decay=0.9, backend=path, **options
    )
    states = ours._known_states
    for _ in range(2):  # as made, and as moved
        train(optimizer, 1)
        state = optimizer.state[p]
        assert list(state) == [
            *optimizer._counts(),
            *states,
            "ema",
            "master",
            *(f"{key}_scale" for key in states),
        ]
        assert (state["master"].dtype, state["master"].stride()) == (torch.int8, p.stride())
        for key in states:
            signed = key in ("exp_avg", "momentum_buffer", "grad_avg")
            assert state[key].dtype == (torch.int8 if signed else torch.uint8)
            assert state[key].shape == p.shape and state[key].is_contiguous()
            scale = state[f"{key}_scale"]
            assert (scale.dtype, tuple(scale.shape)) == (F32, scales_shape(p.shape))
            assert state[key].any() and (scale > 0).all()


@pytest.mark.parametrize("shape", [(), (4095,), (1, 4096), (4097,), (33, 130)])
def test_small_parameters_keep_float32_moments(path, shape) -> None:
    p = torch.nn.Parameter(numbers(0, *shape))
    state = train(AdamW([p], state_dtype="int8", backend=path), 1).state[p]
    assert (state["exp_avg"].dtype == torch.int8) == (p.numel() >= 4096)
    assert state["exp_avg"].dtype in (torch.int8, F32)
    assert ("exp_avg_scale" in state) == (p.numel() >= 4096)


def test_complex_parameters_keep_complex64_moments(path) -> None:
    p = torch.nn.Parameter(torch.ones(LARGE, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p], state_dtype="int8", backend=path)
    optimizer.step()
    assert {optimizer.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.complex64}


@pytest.mark.parametrize(
    ("kind", "dtype", "kept"),
    [
        ("split16", BF16, torch.int16),
        ("split8", BF16, torch.int8),
        ("fp32", BF16, F32),
        ("fp32", F16, F32),
    ],
)
def test_masters(path, kind, dtype, kept) -> None:
    """The parameter is the rounded weight, and the weight has more than that."""
    (p,) = parameters(dtype)
    model = torch.nn.ParameterDict({"p": p})
    optimizer = train(AdamW([p], lr=1e-3, master_weights=kind, backend=path), 5)
    assert optimizer.state[p]["master"].dtype == kept
    weight = fp32_weights(model, optimizer)["p"]
    # The split rounds ties away from zero, so it may be half of an ulp off: 2^-8 of the number in bfloat16.
    torch.testing.assert_close(p.float(), weight, rtol=2.0**-8, atol=0.0)
    assert int((weight != p).sum()) > 0.9 * p.numel()


def test_options_that_are_not_set_are_not_in_groups_and_states() -> None:
    (p,) = parameters(BF16)
    optimizer = train(AdamW([p], seed=0, stochastic_rounding=False, master_weights=None), 1)
    plain = torch.optim.AdamW([p])
    assert optimizer.param_groups[0].keys() == plain.param_groups[0].keys()
    assert list(optimizer.state[p]) == ["step", "exp_avg", "exp_avg_sq"]
    optimizer = AdamW([p], seed=7, stochastic_rounding=True, master_weights="split16")
    more = optimizer.param_groups[0].keys() - plain.param_groups[0].keys()
    assert more == {"seed", "stochastic_rounding", "master_weights"}


# ---- split weights train as float32 ones do ------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", FORMS)
def test_a_split_weight_is_a_float32_weight(path, form, view) -> None:
    """50 steps of random gradients, clipped and averaged: the two halves are the float32 weight, bit for bit, and so is
    every state."""
    make, options = FORMS[form]
    options = options | {"lr": 1e-3, "max_grad_norm": 50.0, "ema_decay": 0.9, "backend": path}
    start = numbers(0, 12, 11)
    split = torch.nn.Parameter(VIEWS[view](start))
    whole = torch.nn.Parameter(VIEWS[view](start.float()))
    a = train(make([split], master_weights="split16", **options), 50)
    b = train(make([whole], **options), 50)
    weights = fp32_weights(torch.nn.ParameterDict({"p": split}), a)["p"]
    assert_same_bits(weights, whole.detach())
    assert int((weights != split).sum()) > 100
    for key in b.state[whole]:
        assert_same_bits(a.state[split][key], b.state[whole][key], key)
    train(a, 1)
    with pytest.raises(AssertionError, match="differ in bits"):  # the comparison can fail
        assert_same_bits(fp32_weights(torch.nn.ParameterDict({"p": split}), a)["p"], whole.detach())


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_master_trains_as_a_split_one(path, form) -> None:
    make, options = FORMS[form]
    ends = []
    for kind in ("split16", "fp32", "split8"):
        (p,) = parameters(BF16, shape=(12, 11))
        optimizer = train(make([p], lr=1e-3, master_weights=kind, backend=path, **options), 50)
        weights = fp32_weights(torch.nn.ParameterDict({"p": p}), optimizer)["p"]
        ends.append(
            [
                p.detach(),
                weights,
                *(
                    optimizer.state[p][key]
                    for key in make._known_states
                    if key in optimizer.state[p]
                ),
            ]
        )
    for a, b in zip(*ends[:2], strict=True):
        assert_same_bits(a, b)
    with pytest.raises(AssertionError):  # 24 bits are fewer
        assert_same_bits(ends[0][1], ends[2][1])


def test_an_average_that_begins_late_begins_with_the_whole_weight(path) -> None:
    (p,) = parameters(BF16)
    first = train(AdamW([p], lr=1e-3, master_weights="split16", backend=path), 3)
    weight = fp32_weights(torch.nn.ParameterDict({"p": p}), first)["p"]
    later = AdamW([p], lr=0.0, master_weights="split16", ema_decay=1.0, backend=path)
    later.load_state_dict(first.state_dict())
    train(later, 1)
    assert_same_bits(later.state[p]["ema"], weight)
    assert not torch.equal(weight, p.float())


# ---- random numbers ------------------------------------------------------------------------------

AT_RANDOM: dict[str, dict[str, Any]] = {
    "codes": {"state_dtype": "int8"},
    "codes and split weights": {"state_dtype": "int8", "master_weights": "split16"},
    "16 bits": {"state_dtype": "param", "stochastic_rounding": True},
    "codes and 16 bits": {"state_dtype": "int8", "stochastic_rounding": True},
    "averages of 16 bits": {"stochastic_rounding": True, "ema_decay": 0.9, "ema_dtype": "param"},
}
at_random = pytest.mark.parametrize("options", AT_RANDOM.values(), ids=AT_RANDOM.keys())


@at_random
def test_a_seed_of_numpy_is_a_seed(path, options) -> None:
    """Also in a group and written into it. A checkpoint has a plain number."""
    ends = []
    for seed in (5, np.int64(5), torch.tensor(5)):
        of_all = AdamW(parameters(BF16, BF16), seed=seed, backend=path, **options)
        of_group = AdamW(
            [{"params": parameters(BF16, BF16), "seed": seed}], backend=path, **options
        )
        for optimizer in (of_all, of_group):
            assert type(optimizer.state_dict()["param_groups"][0]["seed"]) is int
        written = AdamW(parameters(BF16, BF16), seed=0, backend=path, **options)
        written.param_groups[0]["seed"] = seed
        ends += [train(optimizer, 3) for optimizer in (of_all, of_group, written)]
    for end in ends[1:]:
        assert_same_bits(end.param_groups[0]["params"][0], ends[0].param_groups[0]["params"][0])


@at_random
def test_they_depend_on_the_seed(path, options) -> None:
    def end(seed: int) -> Optimizer:
        return train(AdamW(parameters(BF16, BF16), seed=seed, backend=path, **options), 3)

    assert_same_result(end(5), end(5))
    for other in (0, 2**32 + 5, 2**64 - 1):
        with pytest.raises(AssertionError):
            assert_same_result(end(5), end(other))


@at_random
def test_they_depend_on_the_place_in_the_optimizer_not_in_a_group(path, options) -> None:
    def end(*groups: int) -> Optimizer:
        params = parameters(BF16, BF16, BF16)
        cuts = [{"params": params[a:b]} for a, b in zip((0, *groups), (*groups, 3), strict=True)]
        return train(AdamW(cuts, backend=path, **options), 3)

    def tensors(optimizer: Optimizer) -> list[Tensor]:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return [t for p in params for t in (p.detach(), *optimizer.state[p].values())]

    whole = tensors(end())
    for parts in ((1,), (2,), (1, 2), (0, 2)):
        assert all(torch.equal(a, b) for a, b in zip(whole, tensors(end(*parts)), strict=True))


@at_random
def test_equal_parameters_at_different_places_are_rounded_differently(path, options) -> None:
    p, q = (torch.nn.Parameter(numbers(0, *LARGE)) for _ in range(2))
    optimizer = AdamW([p, q], backend=path, **options)
    for x in (p, q):
        x.grad = numbers(1, *LARGE)
    optimizer.step()
    pairs = zip(optimizer.state[p].values(), optimizer.state[q].values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in [(p, q), *pairs])


def test_what_is_not_random_does_not_depend_on_the_seed(path) -> None:
    """A master, and states of float32."""
    ends = [
        train(AdamW(parameters(BF16), master_weights="split16", seed=s, backend=path, **more), 3)
        for s, more in ((0, {}), (1, {"stochastic_rounding": True}))
    ]
    assert_same_result(*ends)


@at_random
@pytest.mark.parametrize("cut", [1, 3])
def test_a_step_in_backward_has_those_of_the_whole_step(path, options, cut) -> None:
    def net() -> torch.nn.Sequential:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(64, 64).bfloat16() for _ in range(2)]
        return torch.nn.Sequential(*layers)

    def make(params: list[Any]) -> AdamW:
        groups = [{"params": params[:cut]}, {"params": params[cut:]}]
        return AdamW(groups, lr=1e-2, backend=path, **options)

    model, twin = net(), net()
    optimizer = make(list(model.parameters()))
    with step_in_backward(twin, lambda named: make([p for _, p in named])) as handle:
        for seed in range(3):
            for m, o in ((model, optimizer), (twin, handle.optimizer)):
                m(numbers(seed, 8, 64)).square().sum().backward()
                o.step()
                o.zero_grad()
        assert_same_result(optimizer, handle.optimizer)
    train(optimizer, 1)
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_same_result(optimizer, handle.optimizer)


def test_a_small_update_is_not_lost_on_average(path) -> None:
    """An update of a sixteenth of an ulp: to nearest nothing ever moves; at random the mean of 5,120 weights is right
    to 5 standard deviations, of at most half of an ulp each."""
    ulp = 2.0**-7  # of bfloat16 numbers from 1 to 2
    steps, lr = 16, ulp / 16
    for stochastic in (False, True):
        p = torch.nn.Parameter(torch.full(LARGE, 1.5, dtype=BF16))
        optimizer = RMSprop(
            [p], lr=lr, alpha=0.0, eps=0.0, stochastic_rounding=stochastic, backend=path
        )
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved = 1.5 - float(p.detach().float().mean())
        if stochastic:
            assert abs(moved - steps * lr) < 5 * 0.5 * steps**0.5 * ulp / 5120**0.5
        else:
            assert moved == 0.0


# ---- groups --------------------------------------------------------------------------------------


def test_groups_of_several_formats_move_as_alone(path) -> None:
    each: list[tuple[torch.dtype, dict[str, Any]]] = [
        (BF16, {"master_weights": "split16"}),
        (F32, {"state_dtype": torch.bfloat16}),
        (BF16, {"master_weights": "split8", "state_dtype": "int8"}),
        (F16, {"master_weights": "fp32"}),
        (F32, {"state_dtype": "int8", "seed": 3}),
        (BF16, {}),
    ]
    params = parameters(*(dtype for dtype, _ in each))
    groups = [{"params": [p], **more} for p, (_, more) in zip(params, each, strict=True)]
    together = train(AdamW(groups, backend=path), 3)
    assert [g.get("master_weights") for g in together.param_groups] == [
        m.get("master_weights") for _, m in each
    ]
    for place, (_, more) in enumerate(each):
        twins = parameters(*(d for d, _ in each))
        others = [{"params": twins[:place]}, {"params": twins[place + 1 :]}]
        alone = AdamW([others[0], {"params": [twins[place]], **more}, others[1]], backend=path)
        train(alone, 3)
        p, twin = params[place], twins[place]
        assert_same_bits(p.detach(), twin.detach())
        assert list(together.state[p]) == list(alone.state[twin])
        for a, b in zip(together.state[p].values(), alone.state[twin].values(), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype


def test_a_group_may_do_without_the_default(path) -> None:
    p, q = parameters(BF16, F32)
    groups = [{"params": [p]}, {"params": [q], "master_weights": None, "state_dtype": None}]
    optimizer = AdamW(groups, master_weights="split16", state_dtype="int8", backend=path)
    train(optimizer, 1)
    assert "master" in optimizer.state[p] and optimizer.state[p]["exp_avg"].dtype == torch.int8
    assert list(optimizer.state[q]) == ["step", "exp_avg", "exp_avg_sq"]


# ---- what is refused -----------------------------------------------------------------------------

DTYPES = "torch.float32, torch.float64, torch.bfloat16, torch.float16"
# fmt: off
VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "master": ({"master_weights": "split"},
        "Invalid master_weights value: 'split'; expected None or one of 'split16', 'split8', 'fp32'"),
    "master dtype": ({"master_weights": F32},
        "Invalid master_weights value: torch.float32; expected None or one of 'split16', 'split8', 'fp32'"),
    "state_dtype": ({"state_dtype": "int4"},
        f"Invalid state_dtype value: 'int4'; expected None (at least float32), 'param', 'int8' or one of {DTYPES}"),
    "ema_dtype": ({"ema_dtype": "int8", "ema_decay": 0.9},
        f"Invalid ema_dtype value: 'int8'; expected None (at least float32), 'param' or one of {DTYPES}"),
    "rounding": ({"stochastic_rounding": 1}, "Invalid stochastic_rounding value: 1; expected True or False"),
    "negative seed": ({"seed": -1}, "Invalid seed value: -1; expected an integer from 0 to 2^64 - 1"),
    "large seed": ({"seed": 2**64}, f"Invalid seed value: {2**64}; expected an integer from 0 to 2^64 - 1"),
    "fraction": ({"seed": 0.5}, "Invalid seed value: 0.5; expected an integer from 0 to 2^64 - 1"),
    "boolean seed": ({"seed": True}, "Invalid seed value: True; expected an integer from 0 to 2^64 - 1"),
}
OF_GROUP = "put it in a group with master_weights=None"
PARAMETERS: dict[str, tuple[str, torch.dtype, str]] = {
    "float32": ("split16", F32, "its group has master_weights='split16' and it has dtype torch.float32; expected "
        f"torch.bfloat16; float32 weights need no master; {OF_GROUP}"),
    "float32, whole": ("fp32", F32, "its group has master_weights='fp32' and it has dtype torch.float32; expected "
        f"torch.bfloat16 or torch.float16; float32 weights need no master; {OF_GROUP}"),
    "float16, split": ("split8", F16, "its group has master_weights='split8' and it has dtype torch.float16; expected "
        f"torch.bfloat16; {OF_GROUP}"),
    "float64": ("fp32", torch.float64, "its group has master_weights='fp32' and it has dtype torch.float64; expected "
        f"torch.bfloat16 or torch.float16; {OF_GROUP}"),
}
# fmt: on


@pytest.mark.reference
@pytest.mark.parametrize(("options", "message"), VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("ours", EVERY_OPTIMIZER)
def test_a_value_is_refused(ours, options, message) -> None:
    with pytest.raises(ValueError) as refusal:
        ours(parameters(BF16), **options)
    assert str(refusal.value) == message
    if "ema_dtype" in options:
        return
    optimizer = ours(parameters(BF16))
    before = everything(optimizer)
    with pytest.raises(ValueError) as refusal:
        optimizer.add_param_group({"params": parameters(BF16), **options})
    assert str(refusal.value) == message
    assert everything(optimizer) == before


@pytest.mark.reference
@pytest.mark.parametrize(("kind", "dtype", "message"), PARAMETERS.values(), ids=PARAMETERS.keys())
def test_a_parameter_is_refused_by_place_and_name(kind, dtype, message) -> None:
    good, bad = parameters(F16 if kind == "fp32" else BF16, dtype)
    with pytest.raises(ValueError) as refusal:
        AdamW([good, bad], master_weights=kind)
    assert str(refusal.value) == f"AdamW: parameter 1 of group 0: {message}"
    optimizer = AdamW([("good", good)], master_weights=kind)
    before = everything(optimizer)
    for params in ([("head.bias", bad)], ("head.bias", bad)):
        if isinstance(params, tuple):
            params = [params]
        with pytest.raises(ValueError) as refusal:
            optimizer.add_param_group({"params": params})
        assert str(refusal.value) == f"AdamW: parameter 0 of group 1 ('head.bias'): {message}"
    assert everything(optimizer) == before
    optimizer.add_param_group({"params": [("head.bias", bad)], "master_weights": None})


@pytest.mark.reference
def test_a_group_of_one_bare_tensor_is_looked_at_too() -> None:
    with pytest.raises(ValueError, match="float32 weights need no master"):
        AdamW([{"params": parameters(F32)[0]}], master_weights="split16")
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        AdamW([{"params": parameters(F32)[0], "lr": -1.0}])


# What a user may do to an optimizer between two steps, and what the next one says.
def of(key: str, change: Callable[[Tensor], Any]) -> Callable[[Optimizer, Tensor], None]:
    def spoil(optimizer: Optimizer, p: Tensor) -> None:
        entry = optimizer.state[p]
        entry[key] = change(entry[key])
        if entry[key] is None:
            del entry[key]

    return spoil


def in_group(**options: Any) -> Callable[[Optimizer, Tensor], None]:
    return lambda optimizer, _: optimizer.param_groups[0].update(options)


ANEW = "load a checkpoint that fits, or drop this parameter's state to begin anew"
CHANGED = "load the optimizer's own state_dict() after it"
ONLY_WHERE = f"expected it only where that is set; to change it, {CHANGED}"
# fmt: off
SPOILED: dict[str, tuple[Callable[[Optimizer, Tensor], None], str]] = {
    "master gone": (of("master", lambda _: None),
        f"state 'master' is missing, and its group has master_weights='split16'; {ONLY_WHERE}"),
    "master no longer wanted": (in_group(master_weights=None),
        f"state 'master' is there, and its group has master_weights=None; {ONLY_WHERE}"),
    "another kind of master wanted": (in_group(master_weights="split8"),
        "state 'master' has dtype torch.int16; expected torch.int8"),
    "master a number": (of("master", lambda _: 0),
        f"state 'master' is a int; expected a tensor of shape {LARGE}; {ANEW}"),
    "short master": (of("master", lambda m: m[1:].clone()),
        f"state 'master' has shape (39, 128); expected the parameter's shape {LARGE}; {ANEW}"),
    "wide master": (of("master", lambda m: m.int()), "state 'master' has dtype torch.int32; expected torch.int16"),
    "expanded master": (of("master", lambda m: m[:1].clone().expand(LARGE)),
        f"elements of state 'master' may share memory (strides (0, 1)); expected its own; {ANEW}"),
    "codes of the other kind": (of("exp_avg", lambda c: c.view(torch.uint8)),
        "state 'exp_avg' has dtype torch.uint8; expected torch.int8"),
    "codes no longer wanted": (in_group(state_dtype=None),
        "state 'exp_avg' has codes of 8 bits, and its group has state_dtype=None; expected 'int8'; to change it, "
        f"{CHANGED}"),
    "codes in another order": (of("exp_avg", lambda c: c.t().contiguous().t()),
        f"state 'exp_avg' has strides (1, 40); expected a contiguous tensor; {ANEW}"),
    "scales gone": (of("exp_avg_scale", lambda _: None),
        f"state 'exp_avg_scale' is missing; expected a tensor of shape (40, 1); {ANEW}"),
    "scales of another shape": (of("exp_avg_sq_scale", torch.flatten),
        f"state 'exp_avg_sq_scale' has shape (40,); expected (40, 1); {ANEW}"),
    "scales of 16 bits": (of("exp_avg_scale", Tensor.bfloat16),
        "state 'exp_avg_scale' has dtype torch.bfloat16; expected torch.float32"),
    "one tensor for two": (lambda o, p: o.state[p].update(exp_avg_scale=o.state[p]["exp_avg_sq_scale"]),
        "state 'exp_avg_sq_scale' lies in the same memory as state 'exp_avg_scale'; expected its own; clone() it"),
    "parameter of another dtype": (lambda o, p: setattr(p, "data", p.data.float()),
        "its group has master_weights='split16' and it has dtype torch.float32; expected torch.bfloat16; float32 "
        f"weights need no master; {OF_GROUP}"),
}
# fmt: on


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_a_spoiled_state_is_refused_by_the_step_and_nothing_moves(path, spoil, message) -> None:
    params = parameters(BF16, BF16)
    optimizer = AdamW(params, master_weights="split16", state_dtype="int8", backend=path)
    train(optimizer, 2)
    spoil(optimizer, params[0])
    for i, p in enumerate(params):
        give_gradient(p, numbers(i, *LARGE))
    before = everything(optimizer)
    with pytest.raises(RuntimeError) as refusal:
        optimizer.step()
    assert str(refusal.value) == f"AdamW: parameter 0 of group 0: {message}"
    assert everything(optimizer) == before


@pytest.mark.parametrize(
    "options",
    [{"master_weights": None}, {"master_weights": "split8"}, {"state_dtype": None}],
    ids=str,
)
def test_what_the_message_says_mends_it(path, options) -> None:
    (p,) = parameters(BF16)
    optimizer = AdamW([p], master_weights="split16", state_dtype="int8", backend=path)
    train(optimizer, 2)
    optimizer.param_groups[0].update(options)
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, 1)
    assert ("master" in optimizer.state[p]) == (
        optimizer.param_groups[0]["master_weights"] is not None
    )
    assert (optimizer.state[p]["exp_avg"].dtype == F32) == ("state_dtype" in options)


def test_a_gradient_of_another_dtype_goes_with_a_master(path) -> None:
    (p,) = parameters(BF16)
    optimizer = AdamW([p], lr=1e-3, master_weights="split16", backend=path)
    whole = torch.nn.Parameter(p.detach().float())
    plain = AdamW([whole], lr=1e-3, backend=path)
    for x, o in ((p, optimizer), (whole, plain)):
        give_gradient(x, numbers(3, *LARGE, dtype=F32))
        o.step()
    assert_same_bits(fp32_weights(torch.nn.ParameterDict({"p": p}), optimizer)["p"], whole.detach())
