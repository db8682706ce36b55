"""Sharded parameters (DTensor, FSDP2) in two processes: one norm for all ranks, and the step of the whole model.

Each rank runs every check that is named here and sends back what it found; the tests compare it with one process that
has the whole parameters. Where gradients are whole numbers, the sum of their squares has no rounding error in whatever
order, and all bits must agree; else the order of the sum shows in the last bits of float64.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_bits
from torch import Tensor

from adamfused import AdamW, RMSprop, backend, grad_norm, norm

INF = float("inf")
RANKS = 2
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed"),
]
SHAPES = {
    "sharded": (6, 4),
    "uneven": (5, 3),
    "of one row, so that a rank has none": (1, 7),
    "by columns": (3, 8),
    "replicated": (7,),
    "plain": (3, 3),
    "large": (3000, 11),
    "on two dimensions": (9, 10),
    "in one of two dimensions": (10, 2),
}


def whole_numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


def any_numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def full(t: Any) -> Any:
    """A DTensor put together from its shards."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def whole_parameters(make: Callable[..., Tensor]) -> list[Any]:
    params = []
    for seed, shape in enumerate(SHAPES.values()):
        params.append(torch.nn.Parameter(make(shape, 100 + seed)))
        params[-1].grad = make(shape, seed)
    return params


def sharded_parameters(make: Callable[..., Tensor]) -> list[Any]:
    """In an order in which the plain one comes late."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line, plane = init_device_mesh("cpu", (RANKS,)), init_device_mesh("cpu", (1, RANKS))
    places: dict[str, Any] = {name: (line, [Shard(0)]) for name in SHAPES} | {
        "by columns": (line, [Shard(1)]),
        "replicated": (line, [Replicate()]),
        "on two dimensions": (plane, [Shard(0), Shard(1)]),
        "in one of two dimensions": (plane, [Replicate(), Shard(0)]),
    }
    params = []
    for name, p in zip(SHAPES, whole_parameters(make), strict=True):
        if name != "plain":
            grad, p = p.grad, torch.nn.Parameter(distribute_tensor(p.detach(), *places[name]))
            p.grad = distribute_tensor(grad, *places[name])
        params.append(p)
    return params


# ---- what each rank does -------------------------------------------------------------------------

CHECKS: dict[str, Callable[..., Any]] = {}
PATHS = ["reference", *(["native"] if backend.native() else [])]
OPTIONS = {"lr": 0.1, "max_grad_norm": 2.0, "ema_decay": 0.9}
TRAINING = OPTIONS | {"max_grad_norm": 0.1}


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    CHECKS[function.__name__] = function
    return function


def stepped(params: list[Any], path: str, **options: Any) -> dict[str, Any]:
    copies = [torch.zeros_like(p, dtype=torch.bfloat16, requires_grad=False) for p in params]
    optimizer = AdamW(params, copy_to=copies, backend=path, **(OPTIONS | options))
    for _ in range(2):
        optimizer.step()
    with optimizer.swap_ema():
        swapped = [full(p.detach()).clone() for p in params]
    return {
        "norm": optimizer.grad_norm,
        "weights": [full(p.detach()) for p in params],
        "averages": [full(optimizer.state[p]["ema"]) for p in params],
        "swapped": swapped,
        "copies": [full(c) for c in copies],
    }


@check
def steps(norm_type: float, path: str) -> Any:
    return stepped(sharded_parameters(whole_numbers), path, norm_type=norm_type)


@check
def norms_of_any_numbers(path: str) -> Any:
    """Twenty, for a difference in the last bit of a sum is often gone in its root."""
    native, params = backend.native() if path == "native" else None, sharded_parameters(any_numbers)
    norms = []
    for _ in range(20):
        norms.append(norm.total_norm(params, 2.0, native, str))
        for p in params:
            p.grad = p.grad * 1.1
    return torch.stack(norms)


@check
def gradients_sharded_in_another_way(path: str) -> Any:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    params = sharded_parameters(whole_numbers)[:1]
    sharded = params[0].grad
    found = []
    replicated = sharded.redistribute(placements=[Replicate()])
    of_the_first_rank = replicated.to_local() * float(dist.get_rank() == 0)
    partial = DTensor.from_local(of_the_first_rank, sharded.device_mesh, [Partial()])
    for grad in (replicated, partial):
        params[0].grad = grad
        optimizer = RMSprop(params, max_grad_norm=2.0, backend=path)
        optimizer.step()
        found.append((optimizer.grad_norm, full(optimizer.state[params[0]]["square_avg"])))
    return found


@check
def several_optimizers(path: str) -> Any:
    params = sharded_parameters(whole_numbers)
    parts = [AdamW(part, backend=path, **OPTIONS) for part in (params[:5], params[5:])]
    for _ in range(2):
        total = grad_norm(parts)
        for optimizer in parts:
            optimizer.step(grad_norm=total)
    return {"norm": total, "weights": [full(p.detach()) for p in params]}


@check
def an_infinity_on_one_rank(path: str) -> Any:
    params = sharded_parameters(whole_numbers)
    if dist.get_rank() == 1:
        params[0].grad.to_local()[0, 0] = INF
    before = [full(p.detach()).clone() for p in params]
    optimizer = AdamW(params, error_if_nonfinite=True, backend=path, **OPTIONS)
    message = "none"
    try:
        optimizer.step()
    except RuntimeError as error:
        message = str(error)
    return message, all(
        torch.equal(full(p.detach()), b) for p, b in zip(params, before, strict=True)
    )


@check
def an_overflow_on_one_rank(path: str) -> Any:
    params = sharded_parameters(whole_numbers)[:1]
    if dist.get_rank() == 1:
        params[0].grad.to_local()[0, 0] = INF
    before = full(params[0].detach()).clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    optimizer = AdamW(params, backend=path, **OPTIONS)
    scaler.step(optimizer)
    scaler.update()
    return torch.equal(full(params[0].detach()), before), len(optimizer.state), scaler.get_scale()


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))


def trained(model: torch.nn.Module, optimizer: Any) -> list[Tensor]:
    norms = []
    for seed in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        norms.append(optimizer.grad_norm)
    return norms


@check
def fully_sharded(path: str) -> Any:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = net(), init_device_mesh("cpu", (RANKS,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = AdamW(model.parameters(), backend=path, **TRAINING)
    norms = trained(model, optimizer)
    saved = get_optimizer_state_dict(model, optimizer)
    fresh = AdamW(model.parameters(), backend=path, **TRAINING)
    set_optimizer_state_dict(model, fresh, saved)
    return {
        "norms": norms,
        "weights": [full(p.detach()) for p in model.parameters()],
        "averages": [full(t) for t in optimizer.ema_state_dict(model).values()],
        "loaded": [full(fresh.state[p]["ema"]) for p in model.parameters()],
    }


@check
def flattened(path: str) -> Any:
    """What is said where the norm is asked for. Nothing has moved then, and what it says to do works."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    refusals = []
    for use_orig_params in (True, False):
        model = FullyShardedDataParallel(
            net(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        optimizer = AdamW(model.parameters(), backend=path, **TRAINING)
        model(torch.ones(4, 5)).sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        compiled = torch.compile(lambda o=optimizer: o.step(), backend="eager")
        for act in (
            optimizer.step,
            compiled,
            optimizer.compute_grad_norm,
            lambda o=optimizer: grad_norm([o]),
        ):
            with pytest.raises(RuntimeError) as refusal:
                act()
            refusals.append(str(refusal.value))
        assert all(map(torch.equal, before, model.parameters())) and not optimizer.state
        optimizer.max_grad_norm = None
        model.clip_grad_norm_(1.0)
        optimizer.step()
        assert not all(map(torch.equal, before, model.parameters()))
    return refusals


def run_as_rank(rank: int, folder: str) -> None:
    """Whatever a check finds or raises, under its name and arguments, in a file."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for name, function in CHECKS.items():
        for arguments in (
            [(t, p) for t in (2.0, INF) for p in PATHS]
            if name == "steps"
            else [(p,) for p in PATHS]
        ):
            try:
                found[f"{name}{arguments}"] = function(*arguments)
            except Exception:
                found[f"{name}{arguments}"] = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


# ---- what is expected of it ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """What a check found, on each rank."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    code = "import sys, test_dtensor_norm as t; t.run_as_rank(int(sys.argv[1]), sys.argv[2])"
    path = [str(Path(__file__).parent), str(Path(backend.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), folder],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        for child in children:
            _, said = child.communicate(timeout=120)
            assert child.returncode == 0, said
    finally:
        for child in children:
            child.kill()
    results = [torch.load(f"{folder}/{rank}") for rank in range(RANKS)]

    def found_by(name: str, *arguments: Any) -> list[Any]:
        mine = [result[f"{name}{arguments}"] for result in results]
        for one in mine:
            assert not isinstance(one, str), one
        return mine

    return found_by


def assert_same_lists(a: list[Tensor], b: list[Tensor], what: str) -> None:
    for name, x, y in zip(SHAPES, a, b, strict=False):
        assert_same_bits(x, y, f"{what} of {name}")
    assert len(a) == len(b)


@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_the_step_is_that_of_the_whole_model(found, path, norm_type) -> None:
    expected = stepped(whole_parameters(whole_numbers), "reference", norm_type=norm_type)
    assert float(expected["norm"]) > 8
    for result in found("steps", norm_type, path):
        assert_same_bits(result["norm"], expected["norm"])
        for what in ("weights", "averages", "swapped", "copies"):
            assert_same_lists(result[what], expected[what], what)
    other = stepped(whole_parameters(whole_numbers), "reference", max_grad_norm=None)
    with pytest.raises(AssertionError, match="weights of sharded: .* differ in bits"):
        assert_same_lists(
            found("steps", norm_type, path)[0]["weights"], other["weights"], "weights"
        )


def test_all_ranks_have_the_same_bits_of_the_norm(found, path) -> None:
    """In float64, before it is rounded; and it is that of one process to 400 roundings: a chunk's sum has 133, and the
    two orders of 33,000 numbers differ in three levels of them at most."""
    one, other = found("norms_of_any_numbers", path)
    assert one.dtype == torch.float64
    assert_same_bits(one, other)
    whole = norm.total_norm(whole_parameters(any_numbers), 2.0, None, str)
    torch.testing.assert_close(one[0], whole, rtol=400 * 2**-53, atol=0)


@pytest.mark.native
def test_both_backends_have_the_same_bits_of_the_norm(found) -> None:
    assert_same_bits(
        found("norms_of_any_numbers", "native")[0], found("norms_of_any_numbers", "reference")[0]
    )


def test_gradients_that_are_sharded_in_another_way_than_the_parameter(found, path) -> None:
    p = whole_parameters(whole_numbers)[0]
    optimizer = RMSprop([p], max_grad_norm=2.0)
    optimizer.step()
    for result in found("gradients_sharded_in_another_way", path):
        for total, square_avg in result:
            assert_same_bits(total, optimizer.grad_norm)
            assert_same_bits(square_avg, optimizer.state[p]["square_avg"])


def test_several_optimizers_clip_by_one_norm(found, path) -> None:
    expected = stepped(whole_parameters(whole_numbers), "reference")
    for result in found("several_optimizers", path):
        assert_same_bits(result["norm"].float(), expected["norm"])
        assert_same_lists(result["weights"], expected["weights"], "weights")


def test_an_infinity_on_one_rank_is_an_error_on_all(found, path) -> None:
    for message, unmoved in found("an_infinity_on_one_rank", path):
        assert message.startswith("The total norm of order 2.0 for gradients is non-finite (inf)")
        assert unmoved


def test_an_overflow_on_one_rank_skips_the_step_on_all(found, path) -> None:
    for unmoved, states, scale in found("an_overflow_on_one_rank", path):
        assert (unmoved, states, scale) == (True, 0, 2.0)


def test_flattened_parameters_are_refused(found, path) -> None:
    expected = (
        "AdamW: parameter 0 of group 0: FullyShardedDataParallel has flattened it, so a rank knows the norm of its own "
        "part of the gradients only; expected a whole parameter or a DTensor; call clip_grad_norm_() of the "
        "FullyShardedDataParallel before step() and leave max_grad_norm out, or use "
        "torch.distributed.fsdp.fully_shard"
    )
    for refusals in found("flattened", path):
        assert refusals == [expected] * 8


def test_fully_sharded_model(found, path) -> None:
    """Both ranks have the same data, of which the mean gradient is the gradient. The order of the sum shows in the last
    bits of the norm in float64, and in a float32 only next to a tie: once in 10^8."""
    model = net()
    optimizer = AdamW(model.parameters(), backend=path, **TRAINING)
    norms = trained(model, optimizer)
    assert all(float(n) > 0.2 for n in norms), "all are clipped"
    for result in found("fully_sharded", path):
        for a, b in zip(result["norms"], norms, strict=True):
            assert_same_bits(a, b)
        for what, expected in (
            ("weights", [p.detach() for p in model.parameters()]),
            ("averages", [optimizer.state[p]["ema"] for p in model.parameters()]),
            ("loaded", [optimizer.state[p]["ema"] for p in model.parameters()]),
        ):
            assert_same_lists(result[what], expected, what)
