"""The CUDA kernels, compiled by g++ and run on the CPU, leave the same bits as the oracle. No GPU and no extension is
needed: ``tests/cuda_on_host`` stands in for CUDA's headers, and what it cannot show is what a GPU does at once.

To look for accesses outside of the tensors and for undefined behaviour (guard bytes find writes only)::

    LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \\
    CUDA_ON_HOST_FLAGS="-g -fsanitize=address,undefined" python -m pytest tests/test_cuda_on_host.py
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_bool, c_double, c_int, c_int32, c_int64, c_uint8, c_uint32, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, differing, threads, wild
from torch import Tensor

from adamfused import formats, reference, rules

HERE = Path(__file__).parent / "cuda_on_host"
CSRC = Path(__file__).parent.parent / "csrc"
CXX = shlex.split(os.environ.get("CXX") or "g++")
pytestmark = [
    pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"no {CXX[0]} on this machine"),
    pytest.mark.skipif(not CSRC.exists(), reason="run outside of a source checkout"),
]
# The stand-in answers -fsanitize=alignment itself, which is why the linker is not told of it.
FLAGS = [
    *["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden"],
    *["-fsanitize=alignment", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-switch"],
]
MORE_FLAGS = shlex.split(os.environ.get("CUDA_ON_HOST_FLAGS", ""))

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
UP, DOWN, MIXED = range(3)
WHOLE_GRID = 2**32 - 1


# ---- the library ---------------------------------------------------------------------------------


class Span(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p * 5),
        ("format", c_uint8 * 5),
        ("aligned", c_bool),
        ("recipe", c_int32),
        ("numel", c_int64),
        ("step", c_void_p),
    ]


class Recipe(ctypes.Structure):
    _fields_ = [
        ("hyper", c_double * 8),
        ("lr", c_double),
        ("lr_on_device", c_void_p),
        ("lr_is_double", c_bool),
    ]


class Job(ctypes.Structure):
    _fields_ = [
        ("rule", c_int),
        ("in_double", c_bool),
        ("spans", ctypes.POINTER(Span)),
        ("count", c_int64),
        ("rules", c_void_p),
        ("recipes", ctypes.POINTER(Recipe)),
        ("first_tile", c_void_p),
    ]


class Settings(ctypes.Structure):
    _fields_ = [
        ("thread_order", c_int32),
        ("block_order", c_int32),
        ("largest_grid", c_uint32),
        ("first_block", c_uint32),
        ("launches", c_int64),
    ]


MIRRORED = {Span: ("format", "aligned", "recipe", "numel", "step")}
MIRRORED[Recipe] = ("lr", "lr_on_device", "lr_is_double")
MIRRORED[Job] = ("in_double", "spans", "count", "rules", "recipes")


def build(folder: Path, name: str, *flags: str, source: str = "step.cpp") -> Path:
    """Compiles a file of ``tests/cuda_on_host`` to a shared library. What ``folder`` has goes before ``csrc``."""
    obj, library = folder / f"{name}.o", folder / f"{name}.so"
    include = [f"-I{folder}", f"-I{HERE}", f"-I{CSRC}"]
    compiling = [*CXX, *FLAGS, *flags, *MORE_FLAGS, *include, "-c", str(HERE / source), "-o"]
    linking = [*CXX, "-shared", *MORE_FLAGS, str(obj), "-o", str(library)]
    for command in ([*compiling, str(obj)], linking):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return library


class Library:
    def __init__(self, path: Path) -> None:
        self.c: Any = ctypes.CDLL(str(path))
        self.c.host_settings.restype = ctypes.POINTER(Settings)
        self.settings = self.c.host_settings().contents

    @contextmanager
    def set(self, thread_order: int = UP, block_order: int = UP, **more: int) -> Iterator[None]:
        usual = {"largest_grid": WHOLE_GRID, "first_block": 0}
        for some in ({"thread_order": thread_order, "block_order": block_order, **more}, None):
            for key, value in (some or usual | {"thread_order": UP, "block_order": UP}).items():
                setattr(self.settings, key, value)
            if some is not None:
                yield


class Kernels(Library):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        for function in (self.c.host_run, self.c.host_self_test):
            function.restype = ctypes.c_char_p
        facts = (c_int64 * 19)()
        self.c.host_facts(facts)
        self.layout, (self.threads, self.rounds, self.table) = list(facts[:16]), facts[16:]

    def rule(self, name: str, in_double: bool) -> tuple[int, int, int, int]:
        """Of a rule: its states, its numbers, its size and how many tensors a launch takes."""
        facts = (c_int64 * 4)()
        self.c.host_rule(list(rules.RULES).index(name), in_double, facts, None, c_double(), c_double(), None)
        return tuple(facts)

    def tile(self, each: int) -> int:
        return self.threads * each * self.rounds

    def launches(self, case: Case) -> int:
        before = self.settings.launches
        assert case.problems(self) == []
        return self.settings.launches - before


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(build(tmp_path_factory.mktemp("all"), "all", "-O1"))


# ---- a case: tensors, and how the kernels and the oracle move them ----------------------------------


class Group(NamedTuple):
    hyper: tuple[float, ...]
    lr: float
    lr_dtype: torch.dtype | None = None  # of the learning rate on the device; None: on the host


class Item(NamedTuple):
    numel: int
    dtypes: tuple[torch.dtype, ...]  # of the parameter, the gradient and the states
    shifts: tuple[int, ...] = (0, 0, 0, 0, 0)  # elements past a multiple of 16 bytes
    count: float = 0.0  # steps made before
    on_device: bool = False  # the count
    group: int = 0


STATES = {"rmsprop": "v", "rmsprop_momentum": "v buf", "rmsprop_centered": "v mean"}
STATES |= {"rmsprop_centered_momentum": "v buf mean", "adam": "m v", "amsgrad": "m v top"}
# Of each rule three groups. Where the count is on the device, so may the learning rate be.
RMSPROP = [
    Group((0.99, 1e-8, 0.0, 0.9, 0.0), 1e-2),
    Group((0.3, 1e-6, 0.1, 0.2, 1.0), 0.1, F32),
    Group((0.9, 0.0, 0.01, 0.6, 0.0), 1e-3, F64),
]
ADAM = [
    Group((0.9, 0.999, 1e-8, 0.01, 1.0, 0.0, 1.0), 1e-3),
    Group((0.3, 0.95, 1e-8, 0.1, 0.0, 1.0, 1.0), 0.1, F32),
    Group((0.9, 0.99, 0.0, 0.1, 1.0, 0.0, 0.0), 1e-2, F64),
]
GROUPS = {name: ADAM if name in ("adam", "amsgrad") else RMSPROP for name in STATES}
GUARD = 64  # bytes between two tensors


class Case:
    """All tensors lie in one piece of memory, which exists twice: the kernels move one, the oracle the other."""

    def __init__(self, rule: str, items: Sequence[Item], steps: int = 1, specials: float = 0.02):
        self.rule, self.items, self.steps, self.groups = rule, items, steps, GROUPS[rule]
        self.in_double = items[0].dtypes[0] is F64
        self.parts = 2 + len(STATES[rule].split())
        self.size = GUARD
        self.places = [
            [self.place(i.numel, i.dtypes[k], i.shifts[k]) for k in range(self.parts)]
            for i in items
        ]
        self.counts = [self.place(1, F32) if i.on_device else None for i in items]
        self.rates = [self.place(1, g.lr_dtype) if g.lr_dtype else None for g in self.groups]
        self.start = aligned_bytes(self.size)
        rng = np.random.default_rng(0)
        self.start[:] = torch.from_numpy(rng.integers(0, 256, self.size, np.uint8))
        for item, places, count in zip(items, self.places, self.counts, strict=True):
            for k, (name, place) in enumerate(zip(["p", "g", *STATES[rule].split()], places, strict=True)):
                x = wild(rng, item.numel, item.dtypes[k], specials)
                self.at(self.start, place).copy_(x.abs() if name in ("v", "top") else x)
            if count:
                self.at(self.start, count).fill_(item.count)
        for group, rate in zip(self.groups, self.rates, strict=True):
            if rate:
                self.at(self.start, rate).fill_(group.lr)
        self.expected: Tensor | None = None

    def place(self, numel: int, dtype: torch.dtype, shift: int = 0) -> tuple[int, int, torch.dtype]:
        begin = (self.size + 15) // 16 * 16 + shift * dtype.itemsize
        self.size = begin + numel * dtype.itemsize + GUARD
        return begin, begin + numel * dtype.itemsize, dtype

    @staticmethod
    def at(memory: Tensor, place: tuple[int, int, torch.dtype]) -> Tensor:
        begin, end, dtype = place
        return memory[begin:end].view(dtype)

    def oracle(self) -> Tensor:
        if self.expected is None:
            memory = aligned_bytes(self.size).copy_(self.start)
            for item, places, count in zip(self.items, self.places, self.counts, strict=True):
                p, g, *states = (self.at(memory, place) for place in places)
                group = self.groups[item.group]
                rate = self.rates[item.group] if item.on_device else None
                lr = float(self.at(memory, rate)) if rate else group.lr
                steps = self.at(memory, count) if count else torch.tensor([item.count], dtype=F64)
                for _ in range(self.steps):
                    reference.step(self.rule, group.hyper, lr, p, g, states, steps)
            self.expected = memory
        return self.expected

    def run(self, kernels: Kernels, memory: Tensor) -> str | None:
        """Steps once: null, or what the launch says."""
        number = list(rules.RULES).index(self.rule)
        base, (_, _, size, _) = memory.data_ptr(), kernels.rule(self.rule, self.in_double)
        spans, recipes = (Span * len(self.items))(), (Recipe * len(self.groups))()
        for recipe, group, rate in zip(recipes, self.groups, self.rates, strict=True):
            recipe.hyper[: len(group.hyper)] = group.hyper
            recipe.lr = 1e30 if rate else group.lr
            recipe.lr_on_device = base + rate[0] if rate else None
            recipe.lr_is_double = group.lr_dtype is F64
        made: dict[tuple[int, float], int] = {}
        for i, (span, item, count) in enumerate(zip(spans, self.items, self.counts, strict=True)):
            for k, (begin, _, dtype) in enumerate(self.places[i]):
                span.data[k] = base + begin
                span.format[k] = formats.FORMATS.index(dtype)
            span.aligned = all(begin % 16 == 0 for begin, _, _ in self.places[i])
            span.numel = item.numel
            span.step = base + count[0] if count else None
            key = (item.group, item.count + self.steps_made + 1)
            span.recipe = item.group if count else made.setdefault(key, len(made))
        prepared = ctypes.create_string_buffer(max(1, size * len(made)))
        for (j, t), place in made.items():
            hyper, facts = (c_double * 8)(*self.groups[j].hyper), (c_int64 * 4)()
            to = ctypes.byref(prepared, size * place)
            lr = c_double(self.groups[j].lr)
            kernels.c.host_rule(number, self.in_double, facts, hyper, lr, c_double(t), to)
        job = Job(number, self.in_double, spans, len(spans), ctypes.addressof(prepared), recipes)
        error = kernels.c.host_run(ctypes.byref(job))
        return error and error.decode()

    def problems(self, kernels: Kernels) -> list[str]:
        """In what the kernels' memory differs from the oracle's: nothing, if all is well."""
        want, got = self.oracle(), aligned_bytes(self.size).copy_(self.start)
        for self.steps_made in range(self.steps):
            if error := self.run(kernels, got):
                return [f"the launch failed: {error}"]
        found, outside = [], torch.ones(self.size, dtype=torch.bool)
        for i, (places, count) in enumerate(zip(self.places, self.counts, strict=True)):
            for k, place in enumerate([*places, *([count] if count else [])]):
                what = f"part {k}" if k < self.parts else "the count"
                if n := differing(self.at(got, place), self.at(want, place)):
                    found.append(f"{n} in {what} of tensor {i}, {self.items[i]}")
                outside[place[0] : place[1]] = False
        if touched := int(((got != want) & outside).sum()):
            found.append(f"{touched} bytes outside of the tensors have changed")
        return found


def aligned_bytes(size: int) -> Tensor:
    memory = torch.empty(size + 64, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 64 :][:size]
    assert memory.data_ptr() % 64 == 0
    return torch.from_numpy(memory.numpy())  # with no offset into a storage that would be rounded


# ---- tests -----------------------------------------------------------------------------------------


EVERY_RULE = pytest.mark.parametrize("rule", STATES)
# By the elements that a thread takes at once: the dtype of the parameter, and the others.
KINDS = {2: (F64, (F64, BF16, F16, F32)), 4: (F32, (F32, F64)), 8: (BF16, (F16, BF16, F32, F64))}
EVERY_KIND = pytest.mark.parametrize("each", KINDS, ids="E={}".format)


def test_the_structs_are_those_of_the_header(kernels: Kernels) -> None:
    here = []
    for struct, names in MIRRORED.items():
        here += [ctypes.sizeof(struct), *(getattr(struct, name).offset for name in names)]
    assert here == kernels.layout
    assert kernels.table == 64
    for name, states in STATES.items():
        facts = kernels.rule(name, False)
        assert facts[:2] == (len(states.split()), len(GROUPS[name][0].hyper))


@EVERY_RULE
@EVERY_KIND
def test_every_format_in_every_slot(kernels: Kernels, rule: str, each: int) -> None:
    """All of a job's tensors share the width that its narrowest format asks for."""
    params = {2: (F64,), 4: (F32,), 8: (F32, BF16, F16)}[each]
    others = [F32, F64] if each == 4 else formats.FORMATS
    several = itertools.product(params, *[others] * (1 + len(STATES[rule].split())))
    sizes, shifts = itertools.cycle([each + 1, 3 * each, 3 * each - 1, 37]), itertools.cycle([0, 0, 0, 1])
    items = [Item(next(sizes), dtypes, (next(shifts),) * 5, i % 5, group=i % 3) for i, dtypes in enumerate(several)]
    assert Case(rule, items).problems(kernels) == []
