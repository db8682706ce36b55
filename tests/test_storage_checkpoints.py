"""Checkpoints of every format into every other, to torch.optim and from it, and what a damaged one says."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, assert_same_result, bits
from test_checkpoints import CASES, through_a_file
from test_refusals import everything, facts
from test_storage_options import AT_RANDOM, BF16, F16, F32, LARGE, numbers, parameters, train
from torch import Tensor
from torch.optim import Optimizer

from adamfused import Adam, AdamW, RMSprop, formats, fp32_weights
from adamfused.formats import Random, place_key
from adamfused.storage import code_dtype

MASTERS = (None, "split16", "split8", "fp32")
STATES = (None, "int8", torch.bfloat16, torch.float32)
FORMATS = list(itertools.product(MASTERS, STATES))


def twin_of(params: list[Any]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def decoded(entry: dict[str, Tensor], key: str) -> Tensor:
    return formats.get(entry[key], F32, entry.get(f"{key}_scale"))


def whole_weight(optimizer: Optimizer, p: Any) -> Tensor:
    return fp32_weights(torch.nn.ParameterDict({"p": p}), optimizer)["p"].float()


def expected_codes(x: Tensor, key: str, slot: int, seed: int, place: int, t: int) -> Any:
    codes = torch.zeros(x.shape, dtype=code_dtype(key))
    scale = torch.zeros(formats.scales_shape(x.shape))
    formats.put(x, codes, scale, Random.at_step(place_key(seed, place), t).of(slot))
    return codes, scale


# ---- from one format into another ----------------------------------------------------------------


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("state_dtype", STATES, ids=str)
def test_into_every_other_format(path, master, state_dtype) -> None:
    """States: the number that the checkpoint has, rounded to what the optimizer keeps. Masters: the weight that it has,
    to 24 bits at least where the target has 24. The parameter is not touched."""
    params = parameters(BF16, BF16)
    source = AdamW(
        params, lr=1e-3, master_weights=master, state_dtype=state_dtype, seed=9, backend=path
    )
    saved = through_a_file(train(source, 3).state_dict())
    for other_master, other_dtype in FORMATS:
        others = twin_of(params)
        options = {"master_weights": other_master, "state_dtype": other_dtype}
        target = AdamW(others, lr=0.5, backend=path, **options)
        target.load_state_dict(copy.deepcopy(saved))
        group = target.param_groups[0]
        assert {key: group.get(key) for key in options} == options
        assert (group["lr"], group["seed"]) == (1e-3, 9)
        for place, (p, q) in enumerate(zip(params, others, strict=True)):
            before, after = source.state[p], target.state[q]
            assert_same_bits(p.detach(), q.detach())
            for slot, key in enumerate(("exp_avg", "exp_avg_sq"), start=2):
                x = decoded(before, key)
                if other_dtype == "int8":
                    codes, scale = before[key], before.get(f"{key}_scale")
                    if state_dtype != "int8":
                        codes, scale = expected_codes(x, key, slot, 9, place, 3)
                    assert_same_bits(after[key], codes, key)
                    assert_same_bits(after[f"{key}_scale"], scale, key)
                    continue
                dtype = other_dtype or (BF16 if state_dtype == BF16 else F32)
                assert_same_bits(after[key], x.to(dtype), key)
                assert f"{key}_scale" not in after
            assert ("master" in after) == (other_master is not None)
            if other_master is None:
                continue
            weight, found = whole_weight(source, p), whole_weight(target, q)
            if other_master == "split8" and master in ("split16", "fp32"):
                # To 16 bits that are visible and 8 below: at most one step of 2^-15 of the number.
                torch.testing.assert_close(found, weight, rtol=2.0**-15, atol=0.0)
                assert 0 < int((found != weight).sum())
            else:
                assert_same_bits(found, weight)
            assert q.equal(weight) == (master is None)
        train(target, 1)


def test_a_master_that_would_round_up_stays_below_the_next_visible_weight() -> None:
    """Loading leaves parameters alone, also where 24 bits round a weight up to the next one of 16: the largest finite
    one would become infinite."""
    p = torch.nn.Parameter(torch.tensor([1.0, -1.0, 3e-5, torch.finfo(BF16).max, 1e-40]).to(BF16))
    p.grad = torch.ones_like(p)
    source = AdamW([p], lr=0.0, weight_decay=0.0, master_weights="split16")
    source.step()
    for low in (0x7F7F, 0x7F80, 0x7FFF, -0x8000, -0x7F80):
        source.state[p]["master"].fill_(low)
        (q,) = twin_of([p])
        target = AdamW([q], master_weights="split8")
        target.load_state_dict(source.state_dict())
        assert_same_bits(q.detach(), p.detach())
        weight, found = whole_weight(source, p), whole_weight(target, q)
        distance = (bits(found).long() - bits(weight).long()).abs()
        assert int(distance.max()) <= (0xFF if low >= 0x7F80 else 0x80), hex(low)
        assert found.isfinite().all()


def test_a_loaded_format_goes_on_as_if_it_had_always_been(path) -> None:
    """From float32 master to split weights and back nothing is lost."""
    params = parameters(BF16)
    source = train(AdamW(params, lr=1e-3, master_weights="fp32", backend=path), 3)
    there, back = twin_of(params), twin_of(params)
    middle = AdamW(there, master_weights="split16", backend=path)
    middle.load_state_dict(copy.deepcopy(source.state_dict()))
    end = AdamW(back, master_weights="fp32", backend=path)
    end.load_state_dict(middle.state_dict())
    assert_same_result(source, end)
    train(source, 2, first=3)
    train(end, 2, first=3)
    assert_same_result(source, end)


def test_options_of_the_checkpoint_and_options_that_stay(path) -> None:
    params = parameters(BF16)
    source = AdamW(params, seed=3, stochastic_rounding=True, master_weights="fp32", backend=path)
    saved = train(source, 1).state_dict()
    target = AdamW(twin_of(params), seed=4, state_dtype=BF16, backend=path)
    target.load_state_dict(saved)
    group = target.param_groups[0]
    assert (group["seed"], group["stochastic_rounding"], group["state_dtype"]) == (3, True, BF16)
    assert "master_weights" not in group
    plain = torch.optim.AdamW(twin_of(params))
    target.load_state_dict(plain.state_dict())
    group = target.param_groups[0]
    assert (group["seed"], group["stochastic_rounding"], group["state_dtype"]) == (3, True, BF16)


def test_each_group_keeps_its_own_formats(path) -> None:
    params = parameters(BF16, BF16)
    saved = train(AdamW(params, backend=path), 2).state_dict()
    saved["param_groups"] = [{**saved["param_groups"][0], "params": [i]} for i in range(2)]
    p, q = twin_of(params)
    groups = [{"params": [p], "master_weights": "split8"}, {"params": [q], "state_dtype": "int8"}]
    target = AdamW(groups, backend=path)
    target.load_state_dict(saved)
    assert list(target.state[p]) == ["step", "exp_avg", "exp_avg_sq", "master"]
    assert target.state[q]["exp_avg"].dtype == torch.int8 and "master" not in target.state[q]


# ---- resuming ------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = AT_RANDOM | {
    kind: {"master_weights": kind} for kind in ("split16", "split8", "fp32")
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
@pytest.mark.parametrize("ours", [Adam, AdamW, RMSprop])
def test_a_resumed_run_continues_bit_for_bit(path, ours, options) -> None:
    """The seed comes with the checkpoint."""
    params = parameters(BF16, BF16)
    optimizer = train(ours(params, lr=1e-3, seed=7, backend=path, **options), 3)
    saved = through_a_file(optimizer.state_dict())
    others = twin_of(params)
    other = ours(others, backend=path, **options)
    other.load_state_dict(copy.deepcopy(saved))
    assert_same_result(optimizer, other)
    train(optimizer, 3, first=3)
    train(other, 3, first=3)
    assert_same_result(optimizer, other)
    later = ours(twin_of(params), backend=path, **options)
    later.load_state_dict(saved)
    train(later, 3, first=3)
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_same_result(optimizer, later)


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_copies_of_the_optimizer_go_on_alike(path, options, duplicate) -> None:
    optimizer = train(AdamW(parameters(BF16), seed=7, backend=path, **options), 2)
    twin = duplicate(optimizer)
    assert_same_result(optimizer, twin)
    for o in (optimizer, twin):
        train(o, 2, first=2)
    assert_same_result(optimizer, twin)
    assert twin.param_groups[0]["seed"] == 7


# ---- torch.optim ---------------------------------------------------------------------------------


def step_as_torch_can(optimizer: Optimizer) -> Optimizer:
    """With gradients of the parameters' dtype."""
    for p in optimizer.param_groups[0]["params"]:
        p.grad = numbers(1, *p.shape, dtype=p.dtype)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("ours", "torchs", "options"), CASES)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_torch_loads_what_it_asks_for(path, ours, torchs, options, dtype) -> None:
    kind = "split16" if dtype == BF16 else None
    own = {"master_weights": kind, "state_dtype": "int8", "ema_decay": 0.9, "seed": 5}
    params = parameters(dtype, dtype)
    optimizer = train(ours(params, backend=path, **own, **options), 2)
    saved = through_a_file(optimizer.state_dict(format="torch"))
    theirs = torchs(twin_of(params), **options)
    assert saved["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()
    theirs.load_state_dict(copy.deepcopy(saved))
    step_as_torch_can(theirs)
    for i, p in enumerate(params):
        plain = torchs(twin_of([p]), **options)
        assert saved["state"][i].keys() == step_as_torch_can(plain).state_dict()["state"][0].keys()
        for key, value in saved["state"][i].items():
            if key not in optimizer._counts():
                assert_same_bits(value, decoded(optimizer.state[p], key), key)
    back = ours(twin_of(params), backend=path, **own, **options)
    back.load_state_dict(theirs.state_dict())
    state = back.state[back.param_groups[0]["params"][0]]
    assert all(state[f"{key}_scale"].any() for key in back._known_states if key in state)
    train(back, 1)


def test_a_checkpoint_for_torch_is_the_plain_one_where_nothing_is_special() -> None:
    optimizer = train(AdamW(parameters(F32)), 1)
    plain, theirs = optimizer.state_dict(), optimizer.state_dict(format="torch")
    assert plain["param_groups"] == theirs["param_groups"]
    for key, value in plain["state"][0].items():
        assert theirs["state"][0][key] is value


def test_hooks_see_what_is_kept_and_may_change_it() -> None:
    optimizer = train(AdamW(parameters(BF16), state_dtype="int8"), 1)
    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(o))
    optimizer.register_state_dict_post_hook(lambda o, saved: saved | {"more": 1})
    for kind in (None, "torch"):
        assert optimizer.state_dict(format=kind)["more"] == 1
    assert seen == [optimizer] * 2


@pytest.mark.parametrize("kind", ["safetensors", "", 1])
def test_another_format_is_refused(kind) -> None:
    with pytest.raises(ValueError) as refusal:
        AdamW(parameters(BF16)).state_dict(format=kind)
    assert str(refusal.value) == f"Invalid format value: {kind!r}; expected None or 'torch'"


# ---- what is refused -----------------------------------------------------------------------------

Spoil = Callable[[dict[str, Any]], Any]


def saved(key: str, change: Callable[[Any], Any]) -> Spoil:
    def spoil(state_dict: dict[str, Any]) -> None:
        entry = state_dict["state"][1]
        entry[key] = change(entry[key])

    return spoil


def with_number(x: float) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_fill(0, torch.tensor([3]), x)


A_MODEL = "it was saved for another model"
DAMAGED = (
    "'exp_avg_scale' in the checkpoint has numbers that are no scales; expected powers of two from 2^-90 to 2^127, "
    "1.5 times one, or 0; the checkpoint is damaged"
)
# fmt: off
LOADED: dict[str, tuple[Spoil, str]] = {
    "codes without scales": (lambda d: d["state"][1].pop("exp_avg_scale"),
        "the checkpoint lacks 'exp_avg_scale', without which codes of 8 bits mean nothing; it is not whole"),
    "scales without codes": (saved("exp_avg", Tensor.float),
        "the checkpoint has 'exp_avg_scale', which this optimizer does not know; "
        "expected 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'"),
    "scales of another shape": (saved("exp_avg_scale", lambda s: s[1:]),
        "'exp_avg_scale' in the checkpoint has shape (39, 1); expected (40, 1); "
        f"{A_MODEL} or another order of parameters"),
    "scales of 16 bits": (saved("exp_avg_scale", Tensor.half), "'exp_avg_scale' in the checkpoint has dtype "
        f"torch.float16, which does not go with the parameter's torch.bfloat16; {A_MODEL}"),
    "scales that are a list": (saved("exp_avg_scale", Tensor.tolist),
        "'exp_avg_scale' in the checkpoint is a list; expected a tensor"),
    "a negative scale": (saved("exp_avg_scale", with_number(-1.0)), DAMAGED),
    "a NaN scale": (saved("exp_avg_scale", with_number(float("nan"))), DAMAGED),
    "an infinite scale": (saved("exp_avg_scale", with_number(float("inf"))), DAMAGED),
    "a scale that is no power of two": (saved("exp_avg_scale", with_number(5.0)), DAMAGED),
    "a scale that is too small": (saved("exp_avg_scale", with_number(2.0**-91)), DAMAGED),
    "strided scales": (saved("exp_avg_scale", lambda s: torch.stack([s, s], -1)[..., 0]),
        "'exp_avg_scale' in the checkpoint has strides (2, 2); expected a contiguous tensor"),
    "codes of the other kind": (saved("exp_avg_sq", lambda c: c.view(torch.int8)), "'exp_avg_sq' in the checkpoint has "
        f"dtype torch.int8, which does not go with the parameter's torch.bfloat16; {A_MODEL}"),
    "codes of 16 bits": (saved("exp_avg", lambda c: c.short()), "the checkpoint has 'exp_avg_scale', which this "
        "optimizer does not know; expected 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'"),
    "short codes": (saved("exp_avg", lambda c: c[1:]), "'exp_avg' in the checkpoint has shape (39, 128); expected the "
        f"parameter's {LARGE}; {A_MODEL} or another order of parameters"),
    "codes in another order": (saved("exp_avg", lambda c: c.t().contiguous().t()),
        "'exp_avg' in the checkpoint has strides (1, 40); expected a contiguous tensor"),
    "codes without memory": (saved("exp_avg", lambda c: c.to("meta")),
        "'exp_avg' in the checkpoint is on the meta device, which has no memory; materialise it first, as with "
        "Module.to_empty()"),
    "short master": (saved("master", lambda m: m[1:]), "'master' in the checkpoint has shape (39, 128); expected the "
        f"parameter's {LARGE}; {A_MODEL} or another order of parameters"),
    "master of 32 bits": (saved("master", lambda m: m.int()), "'master' in the checkpoint has dtype torch.int32; "
        "expected one of torch.int16, torch.int8, torch.float32"),
    "master that is a number": (saved("master", lambda m: 3), "'master' in the checkpoint is a int; expected a tensor"),
    "scales of a master": (lambda d: d["state"][1].update(master_scale=torch.ones(40, 1)),
        "the checkpoint has 'master_scale', which this optimizer does not know; "
        "expected 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'"),
}
# fmt: on


@pytest.mark.parametrize(("spoil", "message"), LOADED.values(), ids=LOADED.keys())
@pytest.mark.parametrize("target", [("split16", "int8"), ("fp32", None)], ids=str)
def test_a_damaged_checkpoint_is_refused_before_anything_changes(
    path, spoil, message, target
) -> None:
    formats_of = dict(zip(("master_weights", "state_dtype"), target, strict=True))
    params = parameters(BF16, BF16)
    source = AdamW(params, master_weights="split16", state_dtype="int8", backend=path)
    good = train(source, 2).state_dict()
    optimizer = train(AdamW(twin_of(params), backend=path, **formats_of), 1)
    bad = copy.deepcopy(good)
    spoil(bad)
    before, bad_before = everything(optimizer), facts(bad)
    with pytest.raises(ValueError) as refusal:
        optimizer.load_state_dict(bad)
    assert str(refusal.value) == f"AdamW: parameter 1 of group 0: {message}"
    assert everything(optimizer) == before
    assert facts(bad) == bad_before
    optimizer.load_state_dict(good)
    train(optimizer, 1)


def test_codes_of_an_average_are_refused(path) -> None:
    params = parameters(BF16)
    source = train(AdamW(params, state_dtype="int8", ema_decay=0.9, backend=path), 1)
    bad = copy.deepcopy(source.state_dict())
    bad["state"][0]["ema"] = bad["state"][0]["exp_avg"].clone()
    with pytest.raises(
        ValueError, match="'ema' in the checkpoint has dtype torch.int8, which does"
    ):
        source.load_state_dict(bad)


def test_split_weights_of_another_model_dtype_are_refused_where_they_matter(path) -> None:
    """The lower bits of a bfloat16 mean nothing beside a float16; without a master they are not looked at."""
    params = parameters(BF16)
    good = train(AdamW(params, master_weights="split16", backend=path), 1).state_dict()
    halves = parameters(F16)
    target = AdamW(halves, master_weights="fp32", backend=path)
    with pytest.raises(ValueError) as refusal:
        target.load_state_dict(good)
    assert str(refusal.value) == (
        "AdamW: parameter 0 of group 0: 'master' in the checkpoint has dtype torch.int16, which does not go with the "
        f"parameter's torch.float16; {A_MODEL}"
    )
    AdamW(halves, backend=path).load_state_dict(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "Invalid seed value: -1"),
        ({"stochastic_rounding": None}, "Invalid stochastic_rounding value: None"),
    ],
    ids=["seed", "stochastic_rounding"],
)
def test_a_damaged_option_is_refused(change, message) -> None:
    optimizer = train(AdamW(parameters(BF16), stochastic_rounding=True), 1)
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0].update(change)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    assert everything(optimizer) == before
