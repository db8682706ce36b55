"""Averages in the place of the weights, for a while or in a state dict: the trained weights come back bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same_bits
from test_average import averages, small_model, train
from test_checkpoints import through_a_file
from test_refusals import build, everything, the_one
from torch import Tensor
from torch.optim import Optimizer

from adamfused import AdamW


def weights(optimizer: Optimizer) -> list[Tensor]:
    return [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_swap_ema(path, dtype) -> None:
    optimizer = build(path, 3, dtype=dtype, ema_decay=0.5)
    p = the_one(optimizer)
    trained, average, same = weights(optimizer), averages(optimizer), p.data_ptr()
    version = p._version
    with optimizer.swap_ema() as nothing:
        assert nothing is None and p.data_ptr() == same
        assert_equal(weights(optimizer), [a.to(dtype) for a in average])
        assert not torch.equal(p, trained[3])
        assert p._version > version, "a backward pass through the trained weights is an error"
    assert_equal(weights(optimizer), trained)
    assert_equal(averages(optimizer), average)
    optimizer.step()


def test_trained_weights_come_back_after_an_exception(path) -> None:
    optimizer = build(path, 3, ema_decay=0.5)
    trained = weights(optimizer)
    for error in (ValueError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error):
            with optimizer.swap_ema():
                raise error
        assert_equal(weights(optimizer), trained)
    with optimizer.swap_ema():
        pass


def test_what_is_refused_around_a_swap(path) -> None:
    optimizer = build(path, 3, ema_decay=0.5)
    trained, expected = weights(optimizer), averages(optimizer)
    with optimizer.swap_ema():
        before = everything(optimizer)
        with pytest.raises(
            RuntimeError, match=r"AdamW.swap_ema\(\) is not for use inside of itself"
        ):
            with optimizer.swap_ema():
                pass
        with pytest.raises(RuntimeError, match=r"AdamW: step\(\) inside of swap_ema\(\)"):
            optimizer.step()
        assert everything(optimizer) == before
        assert_equal(weights(optimizer), expected)
    assert_equal(weights(optimizer), trained)
    with pytest.raises(RuntimeError, match=r"AdamW.swap_ema\(\) needs ema_decay"):
        with build(path, 1).swap_ema():
            pass


def test_parameters_without_an_average_stay(path) -> None:
    optimizer = build(path, 0, ema_decay=0.5)
    trained = weights(optimizer)
    with optimizer.swap_ema():
        assert_equal(weights(optimizer), trained)
    the_one(optimizer).grad = None
    for _ in range(2):
        optimizer.step()
    before = the_one(optimizer).detach().clone()
    with optimizer.swap_ema():
        assert_same_bits(the_one(optimizer).detach(), before)
        assert not torch.equal(weights(optimizer)[0], trained[0])


def test_copies_of_the_weights_are_those_of_the_trained_ones(path) -> None:
    p, half = torch.nn.Parameter(torch.ones(3)), torch.zeros(3, dtype=torch.bfloat16)
    optimizer = AdamW([p], lr=0.1, ema_decay=0.5, copy_to=[half], backend=path)
    train(optimizer, range(3))
    with optimizer.swap_ema():
        assert not torch.equal(half, p.detach().bfloat16())
    assert torch.equal(half, p.detach().bfloat16())


# ---- a state dict to keep ------------------------------------------------------------------------


def test_ema_state_dict(path) -> None:
    model = small_model(torch.bfloat16)
    optimizer = AdamW(model.parameters(), lr=0.1, ema_decay=0.9, backend=path)
    model(torch.ones(4, 3, dtype=torch.bfloat16))
    train(optimizer, range(3))
    found = optimizer.ema_state_dict(model)
    assert list(found) == list(model.state_dict())
    for name, p in model.named_parameters():
        assert_same_bits(found[name], optimizer.state[p]["ema"])
        assert found[name].dtype == torch.float32 and not found[name].requires_grad
    for name, b in model.named_buffers():
        assert torch.equal(found[name], b)
    other = small_model(torch.bfloat16)
    other.load_state_dict(through_a_file(found))
    with optimizer.swap_ema():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert_same_bits(p, q)


def test_ema_state_dict_of_shared_frozen_and_foreign_parameters(path) -> None:
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    model.b.weight = model.a.weight
    model.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = AdamW([model.a.weight], lr=0.1, ema_decay=0.9, backend=path)
    train(optimizer, range(3))
    found = optimizer.ema_state_dict(model)
    (average,) = averages(optimizer)
    assert_same_bits(found["a.weight"], average)
    assert_same_bits(found["b.weight"], average)
    assert_same_bits(found["frozen"], model.frozen)
    inside = optimizer.ema_state_dict(torch.nn.Sequential(model))
    assert_same_bits(inside["0.a.weight"], average)


def test_ema_state_dict_is_refused(path) -> None:
    model = small_model()
    with pytest.raises(RuntimeError, match=r"AdamW.ema_state_dict\(\) needs ema_decay"):
        AdamW(model.parameters(), backend=path).ema_state_dict(model)
    optimizer = AdamW(model.parameters(), ema_decay=0.9, backend=path)
    with pytest.raises(ValueError) as refusal:
        optimizer.ema_state_dict(copy.deepcopy(model))
    assert str(refusal.value) == (
        "none of the 4 parameters of the model is one of this optimizer; expected the model that it trains"
    )
