"""Formats of sharded parameters (DTensor, FSDP2) in two processes: the bits of the whole model, and checkpoints.

Each rank runs every check and sends back what it found; the tests compare it with one process that has the whole
parameters.
"""

from __future__ import annotations

import copy
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
from test_storage_options import AT_RANDOM, BF16, F32, numbers
from torch import Tensor

from adamfused import AdamW, backend, fp32_weights, load_fp32_weights

RANKS = 2
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed"),
]
SHAPES = {
    "sharded": (42, 128),
    "uneven": (33, 256),
    "of no whole blocks": (64, 70),
    "replicated": (5000,),
}
FORMATS: dict[str, dict[str, Any]] = AT_RANDOM | {
    "split weights at random": {
        "master_weights": "split16",
        "state_dtype": BF16,
        "stochastic_rounding": True,
    },
    "24 bits": {"master_weights": "split8", "state_dtype": "int8"},
    "whole master": {"master_weights": "fp32", "state_dtype": "int8", "ema_decay": 0.9},
}
PATHS = ["reference", *(["native"] if backend.native() else [])]


def mesh() -> Any:
    return dist.device_mesh.init_device_mesh("cpu", (RANKS,))


def whole() -> list[Tensor]:
    return [numbers(i, *shape) for i, shape in enumerate(SHAPES.values())]


def gradients(t: int) -> list[Tensor]:
    return [numbers(100 * t + i, *shape) for i, shape in enumerate(SHAPES.values())]


def sharded(tensors: list[Tensor]) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line = mesh()
    placements = [[Replicate() if name == "replicated" else Shard(0)] for name in SHAPES]
    return [distribute_tensor(t, line, p) for t, p in zip(tensors, placements, strict=True)]


def full(t: Any) -> Any:
    """A DTensor put together from its shards, or a copy. Neither gloo nor NCCL sends integers of 16 bits."""
    if not hasattr(t, "full_tensor"):
        return t.clone()
    if t.dtype != torch.int16:
        return t.full_tensor()
    wide = type(t).from_local(
        t.to_local().int(), t.device_mesh, t.placements, shape=t.shape, stride=t.stride()
    )
    return wide.full_tensor().short()


def stepped(path: str, options: dict[str, Any], place: Callable[[list[Tensor]], list[Any]]) -> Any:
    params = [torch.nn.Parameter(p) for p in place(whole())]
    optimizer = AdamW(params, lr=1e-2, seed=3, backend=path, **options)
    for t in range(3):
        for p, g in zip(params, place(gradients(t)), strict=True):
            p.grad = g
        optimizer.step()
    return optimizer


def tensors(optimizer: Any) -> list[dict[str, Tensor]]:
    """Each parameter and its state, whole."""
    params = optimizer.param_groups[0]["params"]
    return [
        {"parameter": full(p.detach()), **{k: full(t) for k, t in optimizer.state[p].items()}}
        for p in params
    ]


# ---- what each rank does -------------------------------------------------------------------------


def steps(path: str) -> Any:
    return {name: tensors(stepped(path, options, sharded)) for name, options in FORMATS.items()}


def sharded_by_columns(path: str) -> list[str]:
    from torch.distributed.tensor import Shard, distribute_tensor

    said = []
    for options in ({}, {"state_dtype": BF16, "master_weights": "split16"}):
        p = torch.nn.Parameter(distribute_tensor(numbers(0, 42, 128), mesh(), [Shard(1)]))
        try:
            AdamW([p], stochastic_rounding=True, backend=path, **options)
        except ValueError as error:
            said.append(str(error))
        optimizer = AdamW([p], master_weights="split16", state_dtype="int8", backend=path)
        p.grad = distribute_tensor(numbers(1, 42, 128), mesh(), [Shard(1)])
        optimizer.step()
        said.append(str(optimizer.state[p]["exp_avg"].dtype))
        optimizer.param_groups[0].update(
            options | {"stochastic_rounding": True, "state_dtype": BF16}
        )
        optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].bfloat16()
        before = optimizer.state[p]["step"].clone()
        try:
            optimizer.step()
        except RuntimeError as error:
            said.append(str(error))
        assert torch.equal(before, optimizer.state[p]["step"])
    return said


def fully_sharded(path: str) -> Any:
    """FSDP2: trained, saved and loaded by torch.distributed.checkpoint, and the float32 weights out and in."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    found = {}
    for name, options in FORMATS.items():
        model, other = net(), net()
        for m in (model, other):
            for layer in (m[0], m[1], m):
                fully_shard(layer, mesh=mesh())
        optimizer = AdamW(model.parameters(), lr=1e-2, seed=3, backend=path, **options)
        train(model, optimizer, 0)
        fresh = AdamW(other.parameters(), lr=1e-2, seed=3, backend=path, **options)
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        set_optimizer_state_dict(other, fresh, saved)
        load_fp32_weights(other, fresh, fp32_weights(model, optimizer))
        loaded = tensors(fresh)
        train(other, fresh, 3)
        weights = {k: full(w) for k, w in fp32_weights(model, optimizer).items()}
        found[name] = (tensors(optimizer), loaded, tensors(fresh), weights)
    return found


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(128, 128).bfloat16() for _ in range(2)))


def train(model: Any, optimizer: Any, first: int) -> None:
    """Both ranks have the same data, of which the mean gradient is the gradient."""
    for t in range(first, first + 3):
        optimizer.zero_grad()
        model(numbers(t, 4, 128)).square().sum().backward()
        optimizer.step()


CHECKS = (steps, sharded_by_columns, fully_sharded)


def run_as_rank(rank: int, folder: str) -> None:
    """Whatever a check finds or raises, under its name and path, in a file."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    found: dict[tuple[str, str], Any] = {}
    for check in CHECKS:
        for path in PATHS:
            try:
                found[check.__name__, path] = check(path)
            except Exception:
                found[check.__name__, path] = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


# ---- what is expected of it ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, str], list[Any]]:
    """What a check found, on each rank."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    code = "import sys, test_storage_dtensor as t; t.run_as_rank(int(sys.argv[1]), sys.argv[2])"
    path = [str(Path(__file__).parent), str(Path(backend.__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    children = [
        subprocess.Popen(
            [*command, str(rank), folder], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    try:
        for child in children:
            _, said = child.communicate(timeout=240)
            assert child.returncode == 0, said
    finally:
        for child in children:
            child.kill()
    results = [torch.load(f"{folder}/{rank}") for rank in range(RANKS)]

    def found_by(check: Any, path: str) -> list[Any]:
        mine = [result[check.__name__, path] for result in results]
        for one in mine:
            assert not isinstance(one, str), one
        return mine

    return found_by


def assert_same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> None:
    for one, other in zip(a, b, strict=True):
        assert list(one) == list(other)
        for key in one:
            assert_same_bits(one[key], other[key], key)


@pytest.mark.parametrize("name", FORMATS)
def test_the_step_is_that_of_the_whole_model(found, path, name) -> None:
    """But for what a shard cannot keep in codes: its blocks would not be those of the whole."""
    expected = tensors(stepped(path, FORMATS[name], lambda tensors: tensors))
    other = tensors(stepped(path, FORMATS[name] | {"weight_decay": 0.5}, lambda tensors: tensors))
    in_codes = FORMATS[name].get("state_dtype") == "int8"
    for result in found(steps, path):
        n = 2 if in_codes else len(SHAPES)
        assert_same(result[name][:n], expected[:n])
        with pytest.raises(AssertionError, match="differ in bits"):
            assert_same(result[name][:n], other[:n])
        for rest in result[name][n:]:
            assert rest["exp_avg"].dtype == F32


def test_what_shards_by_columns_cannot_have(found, path) -> None:
    words = (
        "AdamW: parameter 0 of group 0: stochastic_rounding=True for numbers of 16 bits, and its placements are "
        "(Shard(dim=1),); expected Shard(0) or Replicate(), where each number has the random bits that it has in the "
        "whole parameter; put it in a group with stochastic_rounding=False"
    )
    for said in found(sharded_by_columns, path):
        assert said == [words, "torch.float32", words] * 2


@pytest.mark.parametrize("name", FORMATS)
def test_fully_sharded(found, path, name) -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=1e-2, seed=3, backend=path, **FORMATS[name])
    train(model, optimizer, 0)
    before, weights = tensors(optimizer), fp32_weights(model, optimizer)
    weights = {name: value.clone() for name, value in weights.items()}
    train(model, optimizer, 3)
    after = tensors(optimizer)
    for result in found(fully_sharded, path):
        trained, loaded, resumed, whole_weights = result[name]
        assert_same(trained, before)
        assert_same(loaded, before)
        assert_same(resumed, after)
        for key, value in weights.items():
            assert_same_bits(whole_weights[key], value, key)
        with pytest.raises(AssertionError):
            assert_same(loaded, after)
