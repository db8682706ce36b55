"""What only SGD has: a buffer that may begin late, and checkpoints of torch's, which has no step count."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, give_gradient
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from adamfused import SGD

pytestmark = pytest.mark.reference


def weights(n: int = 1000, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.nn.Parameter(torch.linspace(-1, 1, n, dtype=dtype))


def go_on(optimizer: torch.optim.Optimizer, p: Tensor, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        give_gradient(p, torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype))
        optimizer.step()


def close(p: Tensor, q: Tensor) -> None:
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)  # two ways to write it in float64


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_momentum_that_is_switched_on_begins_with_the_gradient(path: str, dampening: float) -> None:
    """As for a warm-up of momentum from 0; torch's first buffer is the gradient, not dampened."""
    runs = []
    for make, options in ((torch.optim.SGD, {}), (SGD, {"backend": path})):
        p = weights()
        optimizer = make([p], lr=0.1, dampening=dampening, **options)
        go_on(optimizer, p, 3)
        optimizer.param_groups[0]["momentum"] = 0.9
        go_on(optimizer, p, 3, seed=1)
        optimizer.param_groups[0]["momentum"] = 0
        go_on(optimizer, p, 1, seed=2)
        optimizer.param_groups[0]["momentum"] = 0.5
        go_on(optimizer, p, 2, seed=3)
        optimizer.state[p]["momentum_buffer"] = None  # reset by hand
        go_on(optimizer, p, 2, seed=4)
        runs.append((p, optimizer.state[p]["momentum_buffer"]))
    close(runs[1][0], runs[0][0])
    close(runs[1][1], runs[0][1])


def test_late_dampened_momentum_does_not_begin_an_average_anew(path: str) -> None:
    """The count tells which step is the first for both; without dampening it need not begin anew."""
    p = weights()
    optimizer = SGD([p], lr=0.1, dampening=0.3, ema_decay=0.9, backend=path)
    go_on(optimizer, p, 3)
    optimizer.param_groups[0]["momentum"] = 0.5
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
    with pytest.raises(ValueError, match=r"parameter 0 of group 0: momentum=0\.5 after steps with"):
        go_on(optimizer, p, 1)
    assert_same_bits(p.detach(), before)
    assert optimizer.state[p].keys() == state.keys() and optimizer.state[p]["step"] == 3
    optimizer.param_groups[0]["dampening"] = 0.0
    go_on(optimizer, p, 1)
    assert optimizer.state[p]["step"] == 4


def test_late_momentum_in_stored_formats_and_when_compiled() -> None:
    def run(how: str) -> Tensor:
        p = weights(8192, torch.bfloat16)
        backend = how if how != "compiled" else None
        formats: dict[str, Any] = {"master_weights": "split16", "state_dtype": "int8"}
        optimizer = SGD([p], lr=0.1, backend=backend, **formats)
        step = torch.compile(optimizer.step, backend="eager") if how == "compiled" else None
        generator = torch.Generator().manual_seed(0)
        for t in range(5):
            give_gradient(p, torch.randn(p.shape, generator=generator).bfloat16())
            if t == 2:
                optimizer.param_groups[0]["momentum"] = 0.9
            (step or optimizer.step)()
        assert optimizer.state[p]["momentum_buffer"].dtype == torch.int8
        return p

    reference = run("reference")
    assert_same_bits(run("auto"), reference)
    assert_same_bits(run("compiled"), reference)


def test_a_checkpoint_without_a_buffer_loads_into_momentum(path: str) -> None:
    p, q = weights(), weights()
    saved = torch.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    plain = torch.optim.SGD([p], lr=0.1)
    go_on(plain, p, 2)
    state = plain.state_dict()
    state["state"][0] = {"momentum_buffer": None}  # as older versions of torch saved it
    state["param_groups"][0] |= {"momentum": 0.9, "dampening": 0.5}
    saved.load_state_dict(state)
    with torch.no_grad():
        q.copy_(p)
    ours = SGD([q], lr=0.1, momentum=0.9, backend=path)
    ours.load_state_dict(state)
    go_on(saved, p, 3, seed=1)
    go_on(ours, q, 3, seed=1)
    close(q, p)


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_a_group_may_be_without_nesterovs_momentum(path: str, dampening: float) -> None:
    """torch looks at the constructor's arguments only: biases without momentum, beside weights with."""
    runs = []
    for make, options in ((torch.optim.SGD, {}), (SGD, {"backend": path})):
        p, q, r = weights(), weights(), weights()
        groups: list[dict[str, Any]] = [
            {"params": [p]},
            {"params": [q], "momentum": 0},
            {"params": [r], "dampening": dampening},
        ]
        optimizer = make(groups, lr=0.1, momentum=0.9, nesterov=True, **options)
        for t in range(3):
            for each in (p, q, r):
                give_gradient(each, torch.full_like(each, 0.5 + t))
            optimizer.step()
        copy = make(groups, lr=0.1, momentum=0.9, nesterov=True, **options)
        copy.load_state_dict(optimizer.state_dict())
        copy.step()
        runs.append((p, q, r))
    for theirs, ours in zip(*runs, strict=True):
        close(ours, theirs)
    for wrong in ({"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(ValueError, match="Nesterov momentum requires a momentum and zero damp"):
            SGD([weights()], nesterov=True, **wrong)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_torchs_checkpoint_loads_whatever_the_default_dtype(default: torch.dtype) -> None:
    p = weights(dtype=torch.float32)
    theirs = torch.optim.SGD([p], momentum=0.9)
    go_on(theirs, p, 2)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        ours = SGD([p], momentum=0.9)
        ours.load_state_dict(theirs.state_dict())
    finally:
        torch.set_default_dtype(before)
    assert ours.state[p]["step"].dtype == torch.float32
    assert_same_bits(ours.state[p]["momentum_buffer"], theirs.state[p]["momentum_buffer"])


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("make, into", [(torch.optim.SGD, SGD), (SGD, torch.optim.SGD), (SGD, SGD)])
def test_distributed_checkpoints_to_and_from_torch(make: Any, into: Any, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    models = [torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)]
    models[1].load_state_dict(models[0].state_dict())
    theirs = make(models[0].parameters(), lr=0.1, momentum=0.9)
    models[0](torch.ones(1, 2)).sum().backward()
    theirs.step()
    models[1].load_state_dict(models[0].state_dict())
    ours = into(models[1].parameters(), lr=0.1, momentum=0.9)
    saved = copy.deepcopy(get_optimizer_state_dict(models[0], theirs, options=options))
    set_optimizer_state_dict(models[1], ours, saved, options=options)
    for model, optimizer in zip(models, (theirs, ours), strict=True):
        model.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q, p)
