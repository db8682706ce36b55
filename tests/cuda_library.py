"""The CUDA kernels as a library for the CPU, and cases that compare them with the oracle, for those who test them."""

from __future__ import annotations

import ctypes
import faulthandler
import functools
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
from helpers import differing, threads, wild
from torch import Tensor

from adamfused import formats, reference, rules

HERE = Path(__file__).parent / "cuda_on_host"
CSRC = Path(__file__).parent.parent / "csrc"
CXX = shlex.split(os.environ.get("CXX") or "g++")
NEEDED = [
    pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"no {CXX[0]} on this machine"),
    pytest.mark.skipif(not CSRC.exists(), reason="run outside of a source checkout"),
]
# The stand-in answers -fsanitize=alignment itself, which is why the linker is not told of it. Its jumps from stack to
# stack are what _FORTIFY_SOURCE, a default of some compilers, takes for an attack.
FLAGS = [
    *["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden"],
    "-U_FORTIFY_SOURCE",
    *["-fsanitize=alignment", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-switch"],
]
MORE_FLAGS = shlex.split(os.environ.get("CUDA_ON_HOST_FLAGS", ""))

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAGE = mmap.PAGESIZE
MAP_NORESERVE = 0x4000  # of Linux; in mmap since Python 3.11


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
    """Compiles a file of ``tests/cuda_on_host`` to a shared library. Kernels in ``folder`` go before the project's."""
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
    def set(self, **settings: int) -> Iterator[None]:
        """Runs its body with other settings of the stand-in."""
        before = {key: getattr(self.settings, key) for key in settings}
        try:
            for key, value in settings.items():
                setattr(self.settings, key, value)
            yield
        finally:
            for key, value in before.items():
                setattr(self.settings, key, value)


class Kernels(Library):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        for function in (self.c.host_run, self.c.host_self_test):
            function.restype = ctypes.c_char_p
        facts = (c_int64 * 19)()
        self.c.host_facts(facts)
        self.layout, (self.threads, self.rounds, self.table) = list(facts[:16]), facts[16:]

    def rule(
        self,
        name: str,
        in_double: bool,
        hyper: Any = (),
        lr: float = 0,
        t: float = 0,
        to: Any = None,
    ) -> Any:
        """Of a rule: its states, its numbers, its size and how many tensors a launch takes. Makes one in ``to``."""
        facts, number = (c_int64 * 4)(), list(rules.RULES).index(name)
        self.c.host_rule(
            number, in_double, facts, (c_double * 8)(*hyper), c_double(lr), c_double(t), to
        )
        return tuple(facts)

    def entries(self, name: str, in_double: bool) -> int:
        return self.rule(name, in_double)[3]

    def run(self, job: Job) -> str | None:
        error = self.c.host_run(ctypes.byref(job))
        return error and error.decode()

    def launches(self, job: Job) -> int:
        """How many launches a job takes; its tensors have no memory."""
        before = self.settings.launches
        with self.set(first_block=2**32 - 1, largest_grid=1):
            assert self.run(job) is None
        return self.settings.launches - before

    def tile(self, each: int) -> int:
        return self.threads * each * self.rounds


# ---- a case: tensors, and how the kernels and the oracle move them ----------------------------------


class Group(NamedTuple):
    hyper: tuple[float, ...]
    lr: float
    lr_dtype: torch.dtype | None = None  # of the learning rate on the device; None: on the host


class Item(NamedTuple):
    numel: int
    dtypes: tuple[torch.dtype, ...]  # of the parameter, the gradient and the states
    shifts: tuple[int, ...] = (0, 0, 0, 0, 0)  # elements past a multiple of 16 bytes
    count: int = 0  # steps made before
    on_device: bool = False  # the count
    group: int = 0


STATES = {"rmsprop": "v", "rmsprop_momentum": "v buf", "rmsprop_centered": "v mean"}
STATES |= {"rmsprop_centered_momentum": "v buf mean", "adam": "m v", "amsgrad": "m v top"}
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
Place = tuple[int, int, torch.dtype]


@functools.cache
def numbers() -> Tensor:
    return wild(np.random.default_rng(0), 1 << 18, F64, specials=0.02)


class Case:
    """All tensors lie in one piece of memory, which exists twice: the kernels move one, the oracle the other.

    Between two tensors lie 64 bytes, or a page that cannot be read; then a tensor either ends where that page begins
    (``pages="before"``) or begins where one ends (``"after"``).
    """

    def __init__(self, rule: str, items: Sequence[Item], steps: int = 1, pages: str = "") -> None:
        self.rule, self.items, self.steps, self.pages = rule, items, steps, pages
        self.groups, self.names = GROUPS[rule], ["p", "g", *STATES[rule].split()]
        self.in_double = items[0].dtypes[0] is F64
        self.size = PAGE
        self.places = [
            [self.place(i.numel, i.dtypes[k], i.shifts[k]) for k in range(len(self.names))]
            for i in items
        ]
        self.counts = [self.place(1, F32) if i.on_device else None for i in items]
        self.rates = [self.place(1, g.lr_dtype) if g.lr_dtype else None for g in self.groups]
        self.size = -(-self.size // PAGE) * PAGE

        self.start = self.memory()
        rng = np.random.default_rng(0)
        self.start.numpy()[:] = np.frombuffer(rng.bytes(self.size), np.uint8)
        for item, places, count in zip(items, self.places, self.counts, strict=True):
            for name, place in zip(self.names, places, strict=True):
                at = int(rng.integers(len(numbers()) - item.numel))
                x = numbers()[at : at + item.numel]
                self.at(self.start, place).copy_(x.abs() if name in ("v", "top") else x)
            if count:
                self.at(self.start, count).fill_(item.count)
        for group, rate in zip(self.groups, self.rates, strict=True):
            if rate:
                self.at(self.start, rate).fill_(group.lr)
        self.expected = self.moved_by_the_oracle()

    def place(self, numel: int, dtype: torch.dtype, shift: int = 0) -> Place:
        length = numel * dtype.itemsize
        if self.pages:
            begin, room = -(-self.size // PAGE) * PAGE + PAGE, -(-length // PAGE) * PAGE
            self.size = begin + room
            begin += room - length if self.pages == "before" else 0
        else:
            begin = -(-self.size // 16) * 16 + shift * dtype.itemsize
            self.size = begin + length + 64
        return begin, begin + length, dtype

    def memory(self) -> Tensor:
        return torch.from_numpy(np.frombuffer(mmap.mmap(-1, self.size + PAGE), np.uint8))[
            : self.size
        ]

    @staticmethod
    def at(memory: Tensor, place: Place) -> Tensor:
        begin, end, dtype = place
        return memory[begin:end].view(dtype)

    def moved_by_the_oracle(self) -> Tensor:
        memory = self.memory().copy_(self.start)
        for item, places, count in zip(self.items, self.places, self.counts, strict=True):
            p, g, *states = (self.at(memory, place) for place in places)
            group, rate = self.groups[item.group], self.rates[item.group]
            lr = float(self.at(memory, rate)) if rate and count else group.lr
            made = self.at(memory, count) if count else torch.tensor([item.count])
            for _ in range(self.steps):
                reference.step(self.rule, group.hyper, lr, p, g, states, made)
        return memory

    def step(self, kernels: Kernels, memory: Tensor, t: int) -> str | None:
        """The t-th step by the kernels: what the launch says."""
        base, (_, _, size, _) = memory.data_ptr(), kernels.rule(self.rule, self.in_double)
        spans, recipes = (Span * len(self.items))(), (Recipe * len(self.groups))()
        for recipe, group, rate in zip(recipes, self.groups, self.rates, strict=True):
            recipe.hyper[: len(group.hyper)] = group.hyper
            recipe.lr = 1e30 if rate else group.lr
            recipe.lr_on_device = base + rate[0] if rate else None
            recipe.lr_is_double = group.lr_dtype is F64
        on_host: dict[tuple[int, int], int] = {}  # (group, count): index of the prepared rule
        for span, item, places, count in zip(
            spans, self.items, self.places, self.counts, strict=True
        ):
            for k, (begin, _, dtype) in enumerate(places):
                span.data[k] = base + begin
                span.format[k] = formats.FORMATS.index(dtype)
            span.aligned = all(begin % 16 == 0 for begin, _, _ in places)
            span.numel = item.numel
            span.step = base + count[0] if count else None
            rule = (item.group, item.count + t)
            span.recipe = item.group if count else on_host.setdefault(rule, len(on_host))
        prepared = ctypes.create_string_buffer(size * len(on_host) + 1)
        for (group, count), i in on_host.items():
            hyper, lr, _ = self.groups[group]
            kernels.rule(
                self.rule, self.in_double, hyper, lr, count, ctypes.byref(prepared, size * i)
            )
        number = list(rules.RULES).index(self.rule)
        return kernels.run(
            Job(number, self.in_double, spans, len(spans), ctypes.addressof(prepared), recipes)
        )

    def problems(self, kernels: Kernels) -> list[str]:
        """In what the kernels' memory differs from the oracle's: nothing, if all is well."""
        got = self.memory().copy_(self.start)
        with self.closed(got):
            for t in range(1, self.steps + 1):
                if error := self.step(kernels, got, t):
                    return [f"the launch failed: {error}"]
        other = (got != self.expected).numpy()
        found = []
        for item, places, count in zip(self.items, self.places, self.counts, strict=True):
            for what, place in zip(
                [*self.names, "the count"], [*places, count or (0, 0, F32)], strict=True
            ):
                part = other[place[0] : place[1]]
                if part.any() and (
                    n := differing(self.at(got, place), self.at(self.expected, place))
                ):
                    found.append(f"{n} wrong in {what} of {item}")
                part[:] = False
        if n := int(other.sum()):
            found.append(f"{n} bytes have changed that belong to no tensor")
        return found

    @contextmanager
    def closed(self, memory: Tensor) -> Iterator[None]:
        """The pages between the tensors cannot be touched."""
        places = sorted(p for p in itertools.chain(*self.places, self.counts, self.rates) if p)
        ends = [0, *(-(-end // PAGE) * PAGE for _, end, _ in places)] if self.pages else []
        begins = [*(begin // PAGE * PAGE for begin, _, _ in places), self.size]
        for protection in (0, mmap.PROT_READ | mmap.PROT_WRITE):
            for begin, end in zip(ends, begins, strict=False):
                address = c_void_p(memory.data_ptr() + begin)
                assert (
                    ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(end - begin), protection)
                    == 0
                )
            if protection == 0:
                yield


# ---- cases -------------------------------------------------------------------------------------------

# By the elements that a thread takes at once: the dtypes of tensors that share a launch.
KINDS = {
    2: [(F64, F64, F64, F64, F64), (F64, BF16, F32, F64, F16)],
    4: [(F32, F32, F32, F32, F32), (F32, F64, F32, F64, F32)],
    8: [
        (BF16, BF16, F32, F32, F32),
        (F16, F16, F16, F16, F16),
        (F32, F32, BF16, F32, F64),
        (F32,) * 5,
    ],
}
COUNTS = {"host": (False,), "device": (True,), "mixed": (True, False, False, True, True)}


@functools.cache
def seams(rule: str, each: int, tile: int, counts: str, pages: str = "") -> Case:
    """Every size at which something changes, with all parts aligned, none, or all but one."""
    sizes = [0, 1, each - 1, each, each + 1, tile - 1, tile, tile + 1, 2 * tile + each + 1]
    shifts = [(0,) * 5, (1,) * 5, (0, 1, 0, 0, 0), (0, 0, 0, 1, 0)]
    on_device = itertools.cycle(COUNTS[counts])
    several = [
        (n, dtypes, s)
        for n in sizes
        for dtypes in KINDS[each][:2]
        for s in shifts[: 1 if pages else 4]
    ]
    several += [(100_003, KINDS[each][-1], s) for s in shifts[:2] if not pages]
    items = [Item(*one, i % 3, next(on_device), i % 3) for i, one in enumerate(several)]
    return Case(rule, items, pages=pages)


@functools.cache
def many(rule: str, each: int, entries: int, counts: str, steps: int = 1) -> Case:
    """Small tensors for three launches; some are empty: the first, the last and those about a launch's limit. Each
    launch brings new step counts, and one is common to all."""
    n = 2 * entries + 37
    sizes, on_device = (
        itertools.cycle([1, each - 1, 0, each + 1, 53]),
        itertools.cycle(COUNTS[counts]),
    )
    empty = {0, 1, entries - 1, entries, 2 * entries - 1, 2 * entries, 2 * entries + 1, n - 1}
    dtypes = KINDS[each]
    items = [
        Item(
            next(sizes) * (i not in empty),
            dtypes[i % len(dtypes)],
            (int(i % 3 == 1),) * 5,
            i % 4 * (1 + i // 99),
            next(on_device),
            i % 3,
        )
        for i in range(n)
    ]
    return Case(rule, items, steps)


def problems_of_a_huge_tensor(
    kernels: Kernels, each: int, dtype: torch.dtype, shift: int
) -> list[str]:
    """Of more than 2^32 elements only the last tiles run; what lies before them has addresses but no memory."""
    n, size, tile = 2**32 + 12_345, dtype.itemsize, kernels.tile(each)
    end, run = (
        n % tile + tile + 100,
        n % tile + tile,
    )  # the last two tiles, and a look at what lies before
    flags, rng = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, np.random.default_rng(0)
    got = []
    for name in ("p", "g", "m", "v"):
        memory = torch.from_numpy(np.frombuffer(mmap.mmap(-1, (n + shift) * size, flags), np.uint8))
        got.append(memory[shift * size :].view(dtype))
        x = wild(rng, end, dtype)
        got[-1][-end:] = x.abs() if name == "v" else x
    want = [x[-end:].clone() for x in got]
    hyper, lr, _ = ADAM[0]
    p, g, *states = (x[-run:] for x in want)
    reference.step("adam", hyper, lr, p, g, states, torch.tensor([0.0]))

    made = ctypes.create_string_buffer(kernels.rule("adam", False)[2])
    kernels.rule("adam", False, hyper, lr, 1, made)
    span = Span((c_void_p * 5)(*(x.data_ptr() for x in got)), numel=n, aligned=shift == 0)
    span.format[:4] = [formats.FORMATS.index(dtype)] * 4
    job = Job(
        list(rules.RULES).index("adam"), False, ctypes.pointer(span), 1, ctypes.addressof(made)
    )
    with kernels.set(first_block=-(-n // tile) - 2):
        if error := kernels.run(job):
            return [error]
    wrong = [differing(x[-end:], y) for x, y in zip(got, want, strict=True)]
    return [f"{wrong} wrong in a huge tensor"] if any(wrong) else []


# ---- what the tests take ---------------------------------------------------------------------------

EVERY_RULE = pytest.mark.parametrize("rule", STATES)
EVERY_KIND = pytest.mark.parametrize("each", KINDS, ids="E={}".format)
ORDERS = {"up": 0, "down": 1, "mixed": 2}
FEW_BLOCKS = 4  # enough for advance_kernel, which does not go round


def in_child(call: Callable[[], str]) -> str:
    """What ``call`` returns in a process of its own, or what that process died of."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            signal.alarm(120)
            with threads(1):  # OpenMP's do not survive a fork
                os.write(write, call().encode()[:4000])
        except BaseException as error:
            os.write(write, repr(error).encode()[:4000])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return (
        f"killed by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else said
    )
