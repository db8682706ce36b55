"""The average of the weights: that of ``torch.optim.swa_utils``, kept in checkpoints and in copies of the optimizer,
and never moved by a step that is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import EVERY_OPTIMIZER, OF_TORCH, assert_same_bits, assert_same_result, give_gradient
from test_checkpoints import through_a_file
from test_refusals import build, everything, facts, the_one
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adamfused import Adadelta, Adagrad, AdamW, RAdam, RMSprop

NAN = float("nan")
OURS = pytest.mark.parametrize("ours", EVERY_OPTIMIZER)


def small_model(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 40), torch.nn.BatchNorm1d(40)).to(dtype)


def set_gradients(optimizer: Optimizer, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            give_gradient(p, torch.randn(p.shape, generator=source).to(p.dtype))


def train(optimizer: Optimizer, seeds: range) -> None:
    for seed in seeds:
        set_gradients(optimizer, seed)
        optimizer.step()


def averages(optimizer: Optimizer) -> list[Tensor]:
    return [optimizer.state[p]["ema"] for g in optimizer.param_groups for p in g["params"]]


def warm_up(t: float) -> float:
    return min(0.9, t / (t + 10))


# ---- what it is ----------------------------------------------------------------------------------


# Not RAdam: its first steps go so far that rounding covers the control.
@pytest.mark.parametrize("ours", [ours for ours in EVERY_OPTIMIZER if ours is not RAdam])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_it_is_that_of_swa_utils(path, ours, decay) -> None:
    """Over 50 steps, within float32 rounding. With weights up to M, c = 1 - decay and u = 2^-24, an update rounds c, a
    difference and a product, each of up to 2 c M, and a sum of up to M: off by (1 + 6 c) u M. Older errors only decay,
    so after 50 updates on both sides they are within 100 (1 + 6 c) u M."""
    model = small_model()
    lr = {Adadelta: 20.0, Adagrad: 0.5}.get(ours, 0.05)  # far enough for the control
    optimizer = ours(model.parameters(), lr=lr, ema_decay=decay, backend=path)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    other = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay * 0.99 + 0.004))
    largest = 0.0
    for seed in range(50):
        train(optimizer, range(seed, seed + 1))
        theirs.update_parameters(model)
        other.update_parameters(model)
        largest = max(largest, *(float(p.detach().abs().max()) for p in model.parameters()))
    bound = 100 * (1 + 6 * (1 - decay)) * 2**-24 * largest
    off, off_of_other = (
        max(
            float((a - b.detach()).abs().max())
            for a, b in zip(averages(optimizer), swa.module.parameters(), strict=True)
        )
        for swa in (theirs, other)
    )
    assert off <= bound < off_of_other


def test_its_first_value_is_the_first_new_weight(path) -> None:
    optimizer = build(path, 1, ema_decay=0.999)
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert torch.equal(optimizer.state[p]["ema"], p)
    optimizer.step()
    assert not torch.equal(optimizer.state[the_one(optimizer)]["ema"], the_one(optimizer))


def test_a_function_is_told_the_count_of_each_parameters_own_steps(path) -> None:
    """The average is checked against the definition in float64, within 30 roundings of float32 of the weights."""
    told: set[float] = set()

    def decay(t: float) -> float:
        assert type(t) is float
        told.add(t)
        return warm_up(t)

    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = AdamW(params, lr=0.1, ema_decay=decay, backend=path)
    expected: list[Tensor | None] = [None, None]
    counts = [0, 0]
    for seed in range(10):
        set_gradients(optimizer, seed)
        if seed % 3 == 0:
            params[1].grad = None
        told.clear()
        optimizer.step()
        for i, p in enumerate(params):
            if p.grad is None:
                continue
            counts[i] += 1
            now, before = p.detach().double(), expected[i]
            d = warm_up(counts[i])
            expected[i] = now if before is None else d * before + (1 - d) * now
        assert told == {float(n) for p, n in zip(params, counts, strict=True) if p.grad is not None}
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"].double(), e, rtol=0, atol=30 * 2**-24)
        assert not torch.allclose(optimizer.state[p]["ema"], p, rtol=0, atol=1e-3)


def test_a_parameter_that_is_not_moved_leaves_its_average_alone(path) -> None:
    optimizer = build(path, 3, ema_decay=0.5)
    p = the_one(optimizer)
    before, p.grad = optimizer.state[p]["ema"].clone(), None
    with torch.no_grad():
        p.add_(1)
    optimizer.step()
    assert_same_bits(optimizer.state[p]["ema"], before)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_its_dtype(path, dtype) -> None:
    """At least float32 by default: of bfloat16 weights it is told before they are rounded."""
    for ema_dtype, expected in (
        (None, torch.promote_types(dtype, torch.float32)),
        ("param", dtype),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ):
        model = small_model(dtype)
        optimizer = AdamW(model.parameters(), ema_decay=0.9, ema_dtype=ema_dtype, backend=path)
        train(optimizer, range(2))
        assert {average.dtype for average in averages(optimizer)} == {expected}


def test_a_small_change_of_bfloat16_weights_is_not_lost(path) -> None:
    """1 - 0.999 of a change of a bfloat16's last bit is far below that bit; in float32 1,000 of them add up."""
    seen = []
    for ema_dtype in (None, "param"):
        p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        optimizer = RMSprop([p], lr=0.0, ema_decay=0.99, ema_dtype=ema_dtype, backend=path)
        p.grad = torch.ones(1, dtype=torch.bfloat16)
        optimizer.step()
        with torch.no_grad():
            p.add_(2**-6)
        for _ in range(300):
            optimizer.step()
        seen.append(float(optimizer.state[p]["ema"]) - 1)
    assert seen[0] == pytest.approx(2**-6, rel=0.06)  # 0.99 ** 300 is 0.05
    assert seen[1] == 0


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.reference
@OURS
@pytest.mark.parametrize("decay", [-0.1, 1.5, NAN, float("inf"), torch.ones(2)], ids=repr)
def test_decay_is_refused(ours, decay) -> None:
    with pytest.raises(ValueError) as refusal:
        ours([torch.nn.Parameter(torch.ones(1))], ema_decay=decay)
    assert str(refusal.value) == f"Invalid ema_decay value: {decay}; expected a number from 0 to 1"


@pytest.mark.parametrize("decay", [0, 1, True], ids=repr)
@pytest.mark.native
def test_a_decay_that_is_an_integer(decay) -> None:
    a, b = (build(path, 2, ema_decay=decay) for path in ("native", "reference"))
    assert_same_result(a, b)


@pytest.mark.reference
def test_a_function_cannot_be_asked_for_a_count_that_is_on_a_device() -> None:
    words = (
        "ema_decay is a function, and capturable=True keeps the step count, which it is called with, on the device; "
        "expected a number; use capturable=False for a function"
    )
    p, q = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = AdamW([p], ema_decay=warm_up)
    saved = AdamW([p], capturable=True).state_dict()

    def step() -> None:
        assert not optimizer.param_groups[0]["capturable"], "what was refused has changed nothing"
        optimizer.param_groups[0]["capturable"] = True
        optimizer.step()

    for act in (
        lambda: AdamW([p], ema_decay=warm_up, capturable=True),
        lambda: optimizer.add_param_group({"params": [q], "capturable": True}),
        lambda: optimizer.load_state_dict(saved),
        step,
    ):
        with pytest.raises(ValueError) as refusal:
            act()
        assert str(refusal.value) == words
    assert len(optimizer.param_groups) == 1
    AdamW([p], ema_decay=0.9, capturable=True)


def raises(_: float) -> float:
    raise ZeroDivisionError("of the user's own")


BAD: dict[str, tuple[Callable[[float], Any], type[Exception], str]] = {
    "raises": (raises, ZeroDivisionError, "of the user's own"),
    "2.0": (lambda _: 2.0, ValueError, "Invalid ema_decay value: 2.0"),
    "NaN": (lambda _: NAN, ValueError, "Invalid ema_decay value: nan"),
    "None": (lambda _: None, ValueError, "Invalid ema_decay value: None"),
    "a string": (lambda _: "0.9", ValueError, "Invalid ema_decay value: '0.9'"),
}


@pytest.mark.parametrize("last", [1.0, 3.0], ids=["at the first step", "later"])
@pytest.mark.parametrize(("then", "error", "words"), BAD.values(), ids=BAD.keys())
def test_a_function_that_fails_moves_nothing(path, then, error, words, last) -> None:
    """It fails for the count of the last parameter only: all others could move."""

    def decay(t: float) -> Any:
        return then(t) if t == failing else warm_up(t)

    failing = NAN
    copies = [torch.zeros(s, dtype=torch.bfloat16) for s in ((4,), (2, 2), (5,), (2, 3), (1,))]
    optimizer = build(path, int(last) - 1, ema_decay=decay, copy_to=copies, max_grad_norm=1.0)
    *others, late = (p for group in optimizer.param_groups for p in group["params"])
    grad, late.grad = late.grad, None
    optimizer.step()
    late.grad, failing = grad, last
    before = everything(optimizer), facts(copies)
    with pytest.raises(error, match=words):
        optimizer.step()
    assert (everything(optimizer), facts(copies)) == before
    failing = NAN
    optimizer.step()
    assert everything(optimizer) != before[0]
    assert optimizer.state[late]["step"] == last


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"ema_decay": 0.9}, {"ema_decay": warm_up, "ema_dtype": "param"}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_continues_bit_for_bit(path, dtype, options) -> None:
    model = small_model(dtype)
    optimizer = AdamW(model.parameters(), backend=path, **options)
    train(optimizer, range(3))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again = small_model(dtype)
    again.load_state_dict(saved["model"])
    other = AdamW(again.parameters(), backend=path, **options)
    other.load_state_dict(saved["optimizer"])
    assert_same_result(optimizer, other)
    train(optimizer, range(3, 6))
    train(other, range(3, 6))
    assert_same_result(optimizer, other)
    saved["optimizer"]["state"][0]["ema"].add_(1)  # the comparison can fail
    other.load_state_dict(saved["optimizer"])
    assert not torch.equal(averages(other)[0], averages(optimizer)[0])


@pytest.mark.parametrize("source", [AdamW, torch.optim.AdamW], ids=["ours", "torch"])
def test_a_checkpoint_without_averages_begins_them_with_the_weights(path, source) -> None:
    """With the decay 1 they stay there."""
    model = small_model()
    first = source(model.parameters())
    train(first, range(3))
    optimizer = AdamW(model.parameters(), ema_decay=1.0, backend=path)
    optimizer.load_state_dict(through_a_file(first.state_dict()))
    before = [p.detach().clone() for p in model.parameters()]
    train(optimizer, range(3, 6))
    for average, b, p in zip(averages(optimizer), before, model.parameters(), strict=True):
        assert_same_bits(average, b)
        assert not torch.equal(b, p)


def test_an_overflow_of_the_first_step_leaves_averages_to_the_next(path) -> None:
    optimizer = build(path, 0, ema_decay=1.0)
    optimizer.load_state_dict(build(path, 2).state_dict())
    begun = the_one(optimizer).detach().clone()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    before = everything(optimizer)
    optimizer.step()
    assert everything(optimizer) == before
    del optimizer.grad_scale, optimizer.found_inf
    optimizer.step()
    assert_same_bits(optimizer.state[the_one(optimizer)]["ema"], begun)


def test_a_refused_step_begins_no_averages(path) -> None:
    optimizer, source = build(path, 0, ema_decay=0.9), build(path, 2)
    optimizer.load_state_dict(source.state_dict())
    the_one(optimizer).grad = the_one(optimizer).grad.to_sparse()
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match="its gradient is sparse"):
        optimizer.step()
    assert everything(optimizer) == before


@pytest.mark.parametrize(
    "names_it",
    [
        False,
        True,
    ],
    ids=["is refused", "and says why"],
)
def test_a_checkpoint_with_averages_where_there_are_none(path, names_it) -> None:
    optimizer = build(path, 1)
    before = everything(optimizer)
    with pytest.raises(
        ValueError, match="parameter 0 of group 0: the checkpoint has 'ema'"
    ) as refusal:
        optimizer.load_state_dict(build(path, 3, ema_decay=0.9).state_dict())
    assert everything(optimizer) == before
    assert not names_it or "ema_decay" in str(refusal.value)


def test_an_average_of_another_shape_is_refused_at_load(path) -> None:
    optimizer, saved = build(path, 1, ema_decay=0.9), build(path, 2, ema_decay=0.9).state_dict()
    saved["state"][3]["ema"] = torch.zeros(5)
    before = everything(optimizer)
    with pytest.raises(
        ValueError, match=r"parameter 1 of group 1: 'ema' in the checkpoint has shape \(5,\)"
    ):
        optimizer.load_state_dict(saved)
    assert everything(optimizer) == before


@pytest.mark.parametrize("ours", OF_TORCH)
def test_torch_loads_a_checkpoint_with_averages(path, ours) -> None:
    """And moves on as if there were none; what it saves then still has them, as they were."""
    ends, params = [], []
    for decay in (0.9, None):
        model = small_model()
        source = ours(model.parameters(), ema_decay=decay, backend=path)
        train(source, range(3))
        target = getattr(torch.optim, ours.__name__)(model.parameters())
        target.load_state_dict(through_a_file(source.state_dict()))
        train(target, range(3, 6))
        ends.append(target.state_dict())
        params.append(list(model.parameters()))
    for p, q in zip(*params, strict=True):
        assert_same_bits(p, q)
    assert "ema" in ends[0]["state"][0] and "ema" not in ends[1]["state"][0]
    back = ours(params[0], ema_decay=0.9, backend=path)
    back.load_state_dict(ends[0])
    train(back, range(6, 7))


def test_a_group_that_is_added_has_averages_from_its_first_step(path) -> None:
    optimizer = build(path, 2, ema_decay=0.5)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [p]})
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["ema"], p)


DUPLICATES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES.keys())
@pytest.mark.parametrize("decay", [0.9, warm_up], ids=["number", "function"])
def test_copies_of_the_optimizer_keep_options_averages_and_copies(path, decay, duplicate) -> None:
    optimizer = build(
        path,
        2,
        ema_decay=decay,
        ema_dtype=torch.float64,
        max_grad_norm=0.5,
        norm_type=float("inf"),
        copy_to=[torch.zeros(s, dtype=torch.bfloat16) for s in ((4,), (2, 2), (5,), (2, 3), (1,))],
    )
    model = torch.nn.ParameterList(p for g in optimizer.param_groups for p in g["params"])
    twin, twins, copies = duplicate((optimizer, model, list(optimizer._copies.values())))
    assert twin._options == optimizer._options
    assert all(a is b for a, b in zip(twin._copies.values(), copies, strict=True))
    for o in (optimizer, twin):
        train(o, range(2))
    assert_same_result(optimizer, twin)
    assert_same_bits(optimizer.grad_norm, twin.grad_norm)
    for c, p, q in zip(copies, twins, model, strict=True):
        assert torch.equal(c, p.bfloat16()) and p is not q
