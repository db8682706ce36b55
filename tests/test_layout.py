"""However the memory of a tensor is laid out, the step moves it as it moves a contiguous copy.

And it writes nowhere else: not into a gradient, not between the elements of a strided view, not
past either end. Each test steps tensors in some layout and compares all bits with the reference on
contiguous copies of the same numbers.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, give_gradient, threads, wild
from torch import Tensor
from torch.optim import Optimizer

from adamfused import SGD, AdamW, Lion, RMSprop

# Rules with as many states as there are.
CASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}),
    "lion": (Lion, {"lr": 0.1, "weight_decay": 0.1}),
    "amsgrad": (AdamW, {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}),
    "rmsprop": (RMSprop, {"lr": 0.1, "momentum": 0.9, "centered": True}),
}
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)
SHAPE = (2, 3, 4, 6)
PARALLEL = (4, 8, 32, 66)  # enough numbers for two threads


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Any:
    return request.param


# ---- layouts: each gives the numbers of `x`, somewhere in a larger piece of memory ---------------


def lie(
    x: Tensor, order: Sequence[int] = (), step: int = 1, gap: int = 0, offset: int = 0
) -> Tensor:
    """``x`` with its dimensions in some order in memory, and holes between elements and between rows."""
    strides, reach = [0] * x.dim(), step
    for d in reversed(order or range(x.dim())):
        strides[d] = reach
        reach = reach * max(x.shape[d], 1) + gap
    whole = torch.full((offset + reach + 1,), 7.0).to(x.dtype)
    return whole.as_strided(x.shape, strides, offset).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lie,
    "channels last": lambda x: lie(x, order=(0, 2, 3, 1)),
    "transposed": lambda x: lie(x, order=range(x.dim())[::-1]),
    "second columns": lambda x: lie(x, step=2),
    "odd columns": lambda x: lie(x, step=2, offset=1),
    "inner rows": lambda x: lie(x, gap=2, offset=3),
    "one element in": lambda x: lie(x, offset=1),
    "transposed with holes": lambda x: lie(x, range(x.dim())[::-1], step=3, gap=1, offset=2),
}
# What only a gradient may be: elements may lie upon each other, and numbers may wait for their sign.
GRADIENT_LAYOUTS = LAYOUTS | {
    "one row, expanded": lambda x: x[:1].clone().expand(x.shape),
    "one number, expanded": lambda x: x[:1, :1, :1, :1].clone().expand(x.shape),
    "overlapping": lambda x: x.flatten()[:15].clone().as_strided(x.shape, (1, 2, 1, 1)),
    "negative bit": lambda x: torch._neg_view(x.clone()),
}


def around(t: Tensor) -> Tensor:
    """The bytes of the storage that are not in ``t``."""
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    outside = torch.ones(whole.shape, dtype=torch.bool)
    outside.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
    return whole[outside].view(torch.uint8)


def raw(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()


# ---- the comparison ------------------------------------------------------------------------------


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return wild(rng, int(np.prod(shape)), dtype, specials=0.05).reshape(shape)


def plain(t: Tensor) -> Tensor:
    return t.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def check_step(
    case: tuple[type[Optimizer], dict[str, Any]],
    path: str,
    params: list[Tensor],
    grads: list[list[Tensor]],
    between: Callable[[Optimizer], None] = lambda _: None,
) -> None:
    """Steps ``params`` once for each list in ``grads``, as they lie, and checks all that was promised."""
    make, options = case
    ours = [torch.nn.Parameter(p) for p in params]
    twins = [torch.nn.Parameter(plain(p)) for p in params]
    subject = make(ours, backend=path, **options)
    oracle = make(twins, backend="reference", **options)
    neighbours = [around(p) for p in params]
    for row in grads:
        before = [raw(g) for g in row]
        for p, twin, g in zip(ours, twins, row, strict=True):
            give_gradient(p, g)
            give_gradient(twin, plain(g))
        subject.step()
        oracle.step()
        for g, bytes_before in zip(row, before, strict=True):
            assert torch.equal(raw(g), bytes_before), "a gradient was written"
        between(subject)
    for i, (p, twin) in enumerate(zip(subject.param_groups[0]["params"], twins, strict=True)):
        assert_same_bits(plain(p), twin.detach(), f"parameter {i}")
        assert list(subject.state[p]) == list(oracle.state[twin])
        for key, state in subject.state[p].items():
            assert_same_bits(plain(state), oracle.state[twin][key], f"'{key}' of parameter {i}")
    for p, bytes_before in zip(params, neighbours, strict=True):
        assert torch.equal(around(p), bytes_before), "a neighbour was written"


def check_layouts(
    case: Any, path: str, shape: tuple[int, ...], dtype: torch.dtype, p: str, g: str
) -> None:
    params = [LAYOUTS[p](numbers(shape, dtype, 0))]
    grads = [[GRADIENT_LAYOUTS[g](numbers(shape, dtype, seed))] for seed in (1, 2)]
    check_step(case, path, params, grads)


@pytest.mark.parametrize("what", ["gradient", "neighbour", "parameter"])
def test_control_a_poke_is_noticed(what) -> None:
    p, g = (LAYOUTS["odd columns"](numbers(SHAPE, torch.float32, seed)) for seed in (0, 1))

    class Poking(AdamW):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            if self._options.backend == "reference":
                return
            poked = {"gradient": g, "neighbour": p, "parameter": p}[what]
            memory = torch.empty(0).set_(poked.untyped_storage())
            memory[int(what == "parameter")] += 1  # the view begins at the second place

    with pytest.raises(AssertionError, match=what):
        check_step((Poking, {}), "auto", [p], [[g]])


@pytest.mark.parametrize("p", LAYOUTS)
def test_any_parameter_with_any_gradient(case, path, p) -> None:
    for g in GRADIENT_LAYOUTS:
        check_layouts(case, path, SHAPE, torch.float32, p, g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", LAYOUTS)
def test_any_dtype(path, p, dtype) -> None:
    for g in ("contiguous", "channels last", "second columns", "one row, expanded"):
        check_layouts(CASES["amsgrad"], path, SHAPE, dtype, p, g)


@pytest.mark.native
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("p", LAYOUTS)
def test_any_number_of_threads(p, n_threads) -> None:
    with threads(n_threads):
        check_layouts(CASES["amsgrad"], "native", PARALLEL, torch.float32, p, "channels last")


# ---- numbers that wait for their sign ------------------------------------------------------------

COMPLEX, REAL = torch.complex64, torch.float32
WAITING: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor]]] = {
    "conjugate": (COMPLEX, lambda z: z.conj()),
    "negative": (COMPLEX, torch._neg_view),
    "negative conjugate": (COMPLEX, lambda z: torch._neg_view(z).conj()),
    "imaginary part of a conjugate": (REAL, lambda x: torch.complex(x, x).conj().imag),
}


@pytest.mark.parametrize("shape", [(1,), (), (2,), (5, 7)], ids=str)
@pytest.mark.parametrize("what", ["parameter", "gradient"])
@pytest.mark.parametrize(("dtype", "wait"), WAITING.values(), ids=WAITING.keys())
def test_numbers_that_wait_for_their_sign(path, dtype, wait, what, shape) -> None:
    for case in CASES.values():
        p, *grads = (numbers(shape, dtype, seed) for seed in (0, 1, 2))
        if what == "parameter":
            check_step(case, path, [wait(p)], [[g] for g in grads])
        else:
            check_step(case, path, [p], [[wait(g)] for g in grads])


# ---- shapes and lists at the edges ---------------------------------------------------------------


def in_strides(strides: tuple[int, ...], *shape: int) -> Callable[[int], Tensor]:
    n = 1 + sum(st * (n - 1) for st, n in zip(strides, shape, strict=True))
    return lambda seed: numbers((max(n, 1),), torch.float32, seed).as_strided(shape, strides)


ODD_SHAPES: dict[str, Callable[[int], Tensor]] = {
    "0-dim": in_strides(()),
    "one element": in_strides((1, 1), 1, 1),
    "empty": in_strides((1,), 0),
    "empty in the middle": in_strides((2, 2, 1), 3, 0, 2),
    "empty, expanded": in_strides((0, 1), 5, 0),
    "size 1 with a huge stride": in_strides((4, 999, 1), 3, 1, 4),
    "size 1 with stride 0": in_strides((4, 0, 1), 3, 1, 4),
    "all sizes 1, all strides 0": in_strides((0, 0), 1, 1),
    "1x1 kernel, channels last": in_strides((3, 1, 3, 3), 5, 3, 1, 1),
}


@pytest.mark.parametrize("make", ODD_SHAPES.values(), ids=ODD_SHAPES.keys())
def test_odd_shape(case, path, make) -> None:
    as_made, contiguous = ([[f(make(seed))] for seed in (1, 2)] for f in (torch.clone, plain))
    check_step(case, path, [make(0)], contiguous)
    check_step(case, path, [make(0)], [[make(seed)] for seed in (1, 2)])
    check_step(case, path, [plain(make(0))], as_made)


EMPTIES = [(5, {0}), (5, {1}), (5, {4}), (5, {0, 4}), (5, {1, 2}), (5, set(range(5)))]
EMPTIES += [(400, {0, 29, 30, 35, 36, 109, 110, 320, 321, 399})]  # seams of launch parameters


@pytest.mark.parametrize(("n", "empties"), EMPTIES, ids=str)
def test_empty_parameters_anywhere_in_the_list(path, n, empties) -> None:
    shapes = [(0,) if i in empties else (3 + 500 * (i % 5),) for i in range(n)]
    lists = [[numbers(s, torch.float32, seed) for s in shapes] for seed in (0, 1)]
    check_step(CASES["amsgrad"], path, lists[0], lists[1:])


# ---- parameters that share a piece of memory -----------------------------------------------------


@pytest.mark.parametrize("rows", [5, 20_000])
def test_interleaved_columns_as_two_parameters(case, path, rows) -> None:
    base = numbers((rows, 4), torch.float32, 0)
    params = [base[:, ::2], base[:, 1::2]]
    expected = [plain(p) for p in params]
    grads = [[numbers((rows, 2), torch.float32, 2 * seed + i) for i in (0, 1)] for seed in (1, 2)]
    make, options = case
    for group, choice in ((params, path), (expected, "reference")):
        optimizer = make([torch.nn.Parameter(t) for t in group], backend=choice, **options)
        for row in grads:
            for p, g in zip(optimizer.param_groups[0]["params"], row, strict=True):
                p.grad = g
            optimizer.step()
    for p, twin in zip(params, expected, strict=True):
        assert_same_bits(plain(p), twin)


SAME_MEMORY: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "dense": lambda x: [x.view(-1), x.view(-1)],
    "dense, in part": lambda x: [x.view(-1)[:-9], x.view(-1)[9:]],
    "columns": lambda x: [x[:, ::2], x[:, ::2]],
    "columns, in part": lambda x: [x[:-2, ::2], x[1:, ::2]],
    "columns and all": lambda x: [x[:, 1::2], x.view(-1)],
}


@pytest.mark.native
@pytest.mark.parametrize("cut", SAME_MEMORY.values(), ids=SAME_MEMORY.keys())
def test_parameters_in_the_same_memory_move_one_after_the_other(case, cut) -> None:
    ends = []
    for choice in ("native", "reference"):
        base = numbers((20_000, 4), torch.float32, 0)
        make, options = case
        optimizer = make([torch.nn.Parameter(t) for t in cut(base)], backend=choice, **options)
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            p.grad = numbers(p.shape, torch.float32, i + 1)
        with threads(2):
            optimizer.step()
        ends.append(base)
    assert_same_bits(*ends)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_parts_of_one_flat_buffer(case, path, n_threads) -> None:
    """As FSDP has it: parameters and gradients are cut from two flat tensors, at odd places."""
    shapes = [(3,), (5, 7), (1,), (0,), (33, 1025), (2, 3, 5), (1023,)]
    cuts = list(itertools.accumulate((int(np.prod(s)) for s in shapes), initial=1))
    flat, *flat_grads = (numbers((cuts[-1] + 3,), torch.float32, seed) for seed in (0, 1, 2))

    def cut(whole: Tensor) -> list[Tensor]:
        parts = zip(itertools.pairwise(cuts), shapes, strict=True)
        return [whole[a:b].view(shape) for (a, b), shape in parts]

    whole = flat.clone()
    make, options = case
    optimizers = [
        make([torch.nn.Parameter(p) for p in cut(flat)], backend=path, **options),
        make([torch.nn.Parameter(p.clone()) for p in cut(whole)], backend="reference", **options),
    ]
    for flat_grad, optimizer in itertools.product(flat_grads, optimizers):
        for p, g in zip(optimizer.param_groups[0]["params"], cut(flat_grad), strict=True):
            p.grad = g
        with threads(n_threads):
            optimizer.step()
    for moved, p in zip(cut(whole), optimizers[1].param_groups[0]["params"], strict=True):
        moved.copy_(p.detach())
    assert_same_bits(flat, whole)


# ---- what the user may put in place of things between two steps ----------------------------------


def each_state(change: Callable[[Tensor], Tensor]) -> Callable[[Optimizer], None]:
    def replace(optimizer: Optimizer) -> None:
        for state in optimizer.state.values():
            for key in state:
                state[key] = change(state[key])

    return replace


def interleave_states(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        keys = [key for key in state if key != "step"]
        state.update(zip(keys, torch.stack([state[k] for k in keys], -1).unbind(-1), strict=True))


def each_parameter(change: Callable[[Tensor], None]) -> Callable[[Optimizer], None]:
    def replace(optimizer: Optimizer) -> None:
        for p in optimizer.param_groups[0]["params"]:
            change(p)

    return replace


def swap(p: Tensor) -> None:
    other = torch.nn.Parameter(p.detach().clone())
    other.grad = p.grad
    torch.utils.swap_tensors(p, other)


REPLACEMENTS: dict[str, Callable[[Optimizer], None]] = {
    "states cloned": each_state(torch.clone),
    "states transposed": each_state(LAYOUTS["transposed"]),
    "states with holes": each_state(LAYOUTS["odd columns"]),
    "states interleaved in one buffer": interleave_states,
    "states as views of one buffer": each_state(lambda s: torch.stack([s, s])[1]),
    "p.data cloned": each_parameter(lambda p: setattr(p, "data", p.data.clone())),
    "p.data with holes": each_parameter(lambda p: setattr(p, "data", lie(p.data, step=2))),
    "p.grad removed": each_parameter(lambda p: setattr(p, "grad", None)),
    "tensors swapped": each_parameter(swap),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS.keys())
def test_replaced_between_steps(case, path, replace) -> None:
    params = [numbers(SHAPE, torch.float32, seed) for seed in (7, 8)]
    grads = [[numbers(SHAPE, torch.float32, 2 * seed + i) for i in (0, 1)] for seed in range(3)]
    check_step(case, path, params, grads, between=replace)


# ---- between two pages that may not be touched ---------------------------------------------------

SEAMS = [1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 2049]


def guarded(x: Tensor, at_end: bool) -> Tensor:
    """A copy of ``x`` that ends, or begins, where a page begins that may not be touched."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    inside = -(-size // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (address, address + page + inside):
        assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0  # PROT_NONE
    begin = page + (inside - size if at_end else 0)
    window = memoryview(memory)[page : page + inside]
    whole = torch.frombuffer(window, dtype=x.dtype).copy_(torch.full((), 7.0).to(x.dtype))
    first = (begin - page) // x.element_size()
    return whole[first : first + x.numel()].copy_(x)


@pytest.mark.native
@pytest.mark.parametrize("at_end", [False, True], ids=["at the beginning", "at the end"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_past_either_end_is_touched(case, dtype, at_end) -> None:
    for n in SEAMS:
        params, *grads = [[guarded(numbers((n,), dtype, seed), at_end)] for seed in (0, 1, 2)]
        guard_states = each_state(lambda s: s if s.dim() == 0 else guarded(s, at_end))
        check_step(case, "native", params, grads, between=guard_states)


FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (torch.bfloat16, {}),
    "split16": (torch.bfloat16, {"master_weights": "split16", "state_dtype": torch.bfloat16}),
    "split8": (torch.bfloat16, {"master_weights": "split8", "state_dtype": torch.float16}),
    "fp32 master": (torch.float16, {"master_weights": "fp32"}),
    "int8": (torch.bfloat16, {"master_weights": "split16", "state_dtype": "int8"}),
    "at random": (torch.float16, {"stochastic_rounding": True, "state_dtype": "param"}),
}


@pytest.mark.native
@pytest.mark.parametrize(
    "copy_dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("dtype, options", FORMATS.values(), ids=FORMATS.keys())
def test_nothing_past_the_end_is_touched_in_any_format(dtype, options, copy_dtype) -> None:
    """Codes are made of 4,096 numbers or more."""
    for n in [4096 + n for n in SEAMS] if "int8" in options.values() else SEAMS:
        results = []
        for place in (lambda x: guarded(x, at_end=True), lambda x: x.clone()):
            p = place(numbers((n,), dtype, 0)).requires_grad_()
            copies = [] if copy_dtype is None else [place(torch.zeros(n, dtype=copy_dtype))]
            extra = {"copy_to": copies} if copies else {}
            optimizer = AdamW([p], lr=0.1, backend="native", **options, **extra)
            for seed in (1, 2):
                p.grad = place(numbers((n,), dtype, seed))
                optimizer.step()
                state = optimizer.state[p]
                state.update({k: place(t) for k, t in state.items() if t.dim() > 0})
            results.append([p.detach(), *copies, *optimizer.state[p].values()])
        for a, b in zip(*results, strict=True):
            assert_same_bits(a.clone(), b.clone())


@pytest.mark.native
@pytest.mark.parametrize("at_end", [False, True], ids=["before the beginning", "past the end"])
def test_control_touching_a_guard_page_is_fatal(at_end) -> None:
    code = (
        "import ctypes, torch; from test_layout import guarded; "
        f"t = guarded(torch.ones(5), {at_end}); assert t.sum() == 5; "
        f"ctypes.memmove(t.data_ptr() + ({'20' if at_end else '-1'}), b'x', 1)"
    )
    path = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    )
    assert done.returncode == -signal.SIGSEGV
