"""The CUDA kernels, compiled by g++ and run on the CPU, leave the same bits as the oracle. No GPU and no extension is
needed: ``tests/cuda_on_host`` stands in for CUDA's headers, and what it cannot show is what a GPU does at once.

To look for accesses outside of the tensors and for undefined behaviour (guard bytes find writes only)::

    LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \\
    CUDA_ON_HOST_FLAGS="-g -fsanitize=address,undefined" python -m pytest tests/test_cuda_on_host.py
"""

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
from concurrent.futures import ThreadPoolExecutor
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
pytestmark = [
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


# ---- tests -------------------------------------------------------------------------------------------

EVERY_RULE = pytest.mark.parametrize("rule", STATES)
EVERY_KIND = pytest.mark.parametrize("each", KINDS, ids="E={}".format)
ORDERS = {"up": 0, "down": 1, "mixed": 2}
FEW_BLOCKS = 4  # enough for advance_kernel, which does not go round


def test_the_structs_are_those_of_the_header(kernels: Kernels) -> None:
    here = []
    for struct, names in MIRRORED.items():
        here += [ctypes.sizeof(struct), *(getattr(struct, name).offset for name in names)]
    assert here == kernels.layout
    for name, states in STATES.items():
        known = (len(states.split()), len(GROUPS[name][0].hyper))
        assert kernels.rule(name, False)[:2] == known == kernels.rule(name, True)[:2]


def test_most_results_are_numbers(kernels: Kernels) -> None:
    """Else the tests would compare NaN with NaN."""
    for rule in STATES:
        case = seams(rule, 4, kernels.tile(4), "mixed")
        everything = torch.cat(
            [case.at(case.expected, p).double() for p in itertools.chain(*case.places)]
        )
        assert 0.9 < everything.isfinite().double().mean() < 1


@EVERY_RULE
@EVERY_KIND
def test_every_format_in_every_slot(kernels: Kernels, rule: str, each: int) -> None:
    params = {2: (F64,), 4: (F32,), 8: (F32, BF16, F16)}[each]
    others = (
        (F32, F64) if each == 4 else formats.FORMATS
    )  # one 16-bit tensor would make it 8 for all
    several = itertools.product(params, *[others] * (1 + len(STATES[rule].split())))
    sizes, shifts = (each + 1, 3 * each, 3 * each - 1, 37), ((0,) * 5, (0,) * 5, (1,) * 5)
    items = [
        Item(sizes[i % 4], dtypes, shifts[i % 3], i % 5, group=i % 3)
        for i, dtypes in enumerate(several)
    ]
    assert Case(rule, items).problems(kernels) == []


@EVERY_RULE
@EVERY_KIND
def test_sizes_at_every_seam(kernels: Kernels, rule: str, each: int) -> None:
    assert seams(rule, each, kernels.tile(each), "mixed").problems(kernels) == []


@EVERY_KIND
@pytest.mark.parametrize(
    "rule, counts", [*((rule, "mixed") for rule in STATES), ("adam", "host"), ("adam", "device")]
)
def test_more_tensors_than_a_launch_takes(
    kernels: Kernels, rule: str, each: int, counts: str
) -> None:
    assert many(rule, each, kernels.entries(rule, each == 2), counts).problems(kernels) == []


def test_counts_on_the_device_move_on_by_one_a_step(kernels: Kernels) -> None:
    case = many("adam", 4, kernels.entries("adam", False), "mixed", steps=3)
    assert case.problems(kernels) == []
    counted = [(i, c) for i, c in zip(case.items, case.counts, strict=True) if c]
    assert {i.numel == 0 for i, _ in counted} == {True, False}
    assert all(case.at(case.expected, c).item() == i.count + 3 for i, c in counted)


@pytest.mark.parametrize("each", [2, 8], ids="E={}".format)
@pytest.mark.parametrize("different", [63, 64, 65, 200])
def test_more_step_counts_than_a_launch_takes(kernels: Kernels, different: int, each: int) -> None:
    """They come again in later launches, and among them are tensors whose counts are on the device."""
    assert kernels.table == 64
    items = [
        Item(
            each + i % 3,
            KINDS[each][i % 2],
            count=i % different,
            on_device=i % 11 == 5,
            group=i % 3 * (i % 7 == 0),
        )
        for i in range(3 * different)
    ]
    assert Case("adam", items).problems(kernels) == []


@EVERY_RULE
@EVERY_KIND
def test_1000_tensors_take_at_most_4_launches(kernels: Kernels, rule: str, each: int) -> None:
    made = ctypes.create_string_buffer(kernels.rule(rule, each == 2)[2])
    spans = (Span * 1000)(*[Span(numel=5) for _ in range(1000)])
    launches = kernels.launches(
        Job(list(rules.RULES).index(rule), each == 2, spans, 1000, ctypes.addressof(made))
    )
    assert 1 <= launches <= 4


def test_empty_tensors_alone(kernels: Kernels) -> None:
    for on_device, launches in ((False, 0), (True, 1)):
        items = [Item(0, KINDS[4][0], on_device=on_device)] * 3
        before = kernels.settings.launches
        assert Case("adam", items).problems(kernels) == []
        assert kernels.settings.launches - before == launches


@pytest.mark.parametrize(
    "threads, blocks", [("up", "up"), ("down", "up"), ("down", "down"), ("mixed", "mixed")]
)
@EVERY_KIND
def test_the_order_of_threads_and_blocks_is_free(
    kernels: Kernels, each: int, threads: str, blocks: str
) -> None:
    """Also where there are fewer blocks than tiles, so that a block goes on to tiles of other tensors."""
    with kernels.set(thread_order=ORDERS[threads], block_order=ORDERS[blocks]):
        assert (
            many("adam", each, kernels.entries("adam", each == 2), "device").problems(kernels) == []
        )
        with kernels.set(largest_grid=FEW_BLOCKS):
            assert (
                many("adam", each, kernels.entries("adam", each == 2), "mixed").problems(kernels)
                == []
            )
            assert seams("adam", each, kernels.tile(each), "device").problems(kernels) == []


@pytest.mark.parametrize("pages", ["before", "after"])
@EVERY_KIND
def test_nothing_outside_of_the_tensors_is_read(kernels: Kernels, each: int, pages: str) -> None:
    case = seams("amsgrad", each, kernels.tile(each), "mixed", pages)
    assert in_child(lambda: str(case.problems(kernels))) == "[]"


def test_the_page_between_two_tensors_is_closed(kernels: Kernels) -> None:
    case = seams("amsgrad", 4, kernels.tile(4), "mixed", "before")
    last = max(end for place in case.places for _, end, _ in place)

    def read_past_the_end() -> str:
        memory = case.memory()
        with case.closed(memory):
            return str(memory[last].item())

    assert in_child(read_past_the_end) == "killed by SIGSEGV"


@pytest.mark.parametrize("each, dtype", [(8, BF16), (4, F32)], ids=["E=8", "E=4"])
@pytest.mark.parametrize("shift", [0, 1])
def test_more_than_2_to_the_32_elements(
    kernels: Kernels, each: int, dtype: torch.dtype, shift: int
) -> None:
    try:
        assert problems_of_a_huge_tensor(kernels, each, dtype, shift) == []
    except OSError as error:
        pytest.skip(f"no addresses for so much: {error}")


def test_launches_are_cut_where_tiles_can_no_longer_be_counted(kernels: Kernels) -> None:
    """Nothing runs: no such tensors exist. But a launch's tiles are counted in 32 bits."""
    made = ctypes.create_string_buffer(kernels.rule("adam", False)[2])
    spans = (Span * 5)(*[Span(numel=2**30 * kernels.tile(4)) for _ in range(5)])
    assert kernels.launches(Job(4, False, spans, 5, ctypes.addressof(made))) >= 2


def test_the_self_test_of_an_installation_passes(kernels: Kernels) -> None:
    assert kernels.c.host_self_test() is None


# ---- seeded faults: what the tests above would not let pass ---------------------------------------------

FAULTS = {
    "the body runs over the end": (
        "step.cuh",
        "entry.aligned ? n / E * E : 0",
        "entry.aligned ? (n + E - 1) / E * E : 0",
    ),
    "the tail begins too early": (
        "step.cuh",
        "int i = body + int(threadIdx.x); i < n",
        "int i = int(threadIdx.x); i < n",
    ),
    "the tail leaves some out": ("step.cuh", "i < n; i += kThreads)", "i < n; i += kThreads * E)"),
    "the body leaves some out": (
        "step.cuh",
        "i < body; i += kThreads * E)",
        "i < body; i += 2 * kThreads * E)",
    ),
    "aligned accesses to all": ("step.cuh", "entry.aligned ? n / E * E : 0", "n / E * E"),
    "the body reads ahead": (
        "step.cuh",
        "T x[kSlots][E];",
        "T x[kSlots][E]; load(entry.format[kGrad], entry.data[kGrad], start + i + E, packed[kGrad]);",
    ),
    "the gradient is written": ("step.cuh", "if (k != kGrad) store<", "store<"),
    "a state stays": ("step.cuh", "if (k != kGrad) put_one<", "if (k < kState + 1) put_one<"),
    "the tensor before": (
        "step.cuh",
        "if (job.first_tile[middle] <= tile)",
        "if (job.first_tile[middle] < tile)",
    ),
    "never the last tensor": (
        "step.cuh",
        "high = job.count;",
        "high = job.count > 1 ? job.count - 1 : 1;",
    ),
    "tiles counted from the launch's first": (
        "step.cuh",
        "int64_t(tile - job.first_tile[s]) *",
        "int64_t(tile) *",
    ),
    "an offset in 32 bits": (
        "step.cuh",
        "const int64_t start = int64_t(tile - job.first_tile[s]) *",
        "const int start = int(tile - job.first_tile[s]) *",
    ),
    "one tile a block": ("step.cuh", "tile += gridDim.x", "tile += job.first_tile[job.count]"),
    "no barrier before the rule is made": (
        "step.cuh",
        "__syncthreads();  // the tile before",
        "// the tile before",
    ),
    "no barrier after the rule is made": (
        "step.cuh",
        "entry.step);\n      __syncthreads();",
        "entry.step);",
    ),
    "a barrier for some": (
        "step.cuh",
        "if (entry.step != nullptr) {",
        "if (entry.step != nullptr && threadIdx.x < 32) {",
    ),
    "counts stay": ("step.cuh", "*job.entry[s].step += 1.0f", "*job.entry[s].step += 0.0f"),
    "one count stays": ("step.cuh", "s < job.count && job.entry", "s < job.count - 1 && job.entry"),
    "counts on the device past the first block stay": (
        "step.cuh",
        "int(blockIdx.x * blockDim.x +",
        "int(",
    ),
    "a double learning rate read as float": ("step.cuh", "recipe.lr_is_double ?", "false ?"),
    "a place is kept for the next launch": (
        "step.cu",
        "for (int32_t i : used) place[size_t(i)] = -1;",
        "",
    ),
    "a recipe's place is kept": (
        "step.cu",
        "for (int32_t i : recipe_used) recipe_place[size_t(i)] = -1;",
        "",
    ),
    "rules and recipes share places": ("step.cu", "(on_device ? recipe_place : place)", "(place)"),
    "the last tensor says whether counts move": (
        "step.cu",
        "advance |= on_device",
        "advance = on_device",
    ),
    "an empty tensor's count stays": (
        "step.cu",
        "span.numel == 0 && span.step == nullptr",
        "span.numel == 0",
    ),
    "whole tiles only": (
        "step.cu",
        "(span.numel + tile_size - 1) / tile_size",
        "span.numel / tile_size",
    ),
    "tiles of twice the size": (
        "step.cu",
        "int64_t(kThreads) * E * kRounds",
        "int64_t(kThreads) * E * kRounds * 2",
    ),
    "the first tensor's alignment": (
        "step.cu",
        "entry.aligned = span.aligned",
        "entry.aligned = job.spans[0].aligned",
    ),
}


Trial = tuple[dict[str, int], Callable[[Kernels], list[str]]]


def trials(kernels: Kernels) -> list[Trial]:
    """A few of the tests above, and the orders to run them in."""
    entries, tile = functools.partial(kernels.entries, "adam"), kernels.tile
    cases = [many("adam", 8, entries(False), "mixed"), seams("adam", 4, tile(4), "mixed")]
    cases += [many("adam", 2, entries(True), "device"), many("adam", 4, entries(False), "host")]
    cases += [seams("adam", 8, tile(8), "device", "before")]
    few = {"largest_grid": FEW_BLOCKS}
    orders = [{}, {"thread_order": 1}, few, few | {"thread_order": 2, "block_order": 2}]
    several: list[Trial] = [(order, case.problems) for order in orders for case in cases]
    return [
        *several,
        ({}, functools.partial(problems_of_a_huge_tensor, each=8, dtype=BF16, shift=0)),
    ]


def first_problem(library: Path, several: list[Trial]) -> str:
    kernels = Kernels(library)
    for order, problems in several:
        with kernels.set(**order):
            if found := problems(kernels):
                return found[0]
    return "none"


def build_small(folder: Path, *flags: str) -> Path:
    return build(folder, "small", "-O0", "-DONLY=Adam", *flags)


def build_faulty(folder: Path, fault: str) -> Path:
    name, old, new = FAULTS[fault]
    source = (CSRC / "cuda" / name).read_text()
    assert source.count(old) == 1, f"{name} has changed: '{fault}' must be seeded in another way"
    (folder / "cuda").mkdir()
    for other in ("step.cu", "step.cuh"):
        shutil.copy(CSRC / "cuda" / other, folder / "cuda")
    (folder / "cuda" / name).write_text(source.replace(old, new))
    return build_small(folder)


@pytest.fixture(scope="module")
def faulty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Those that are asked for, compiled two at a time: fault -> the future of a library."""
    asked = [
        item.callspec.params.get("fault")
        for item in request.session.items
        if hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(2) as pool:
        return {
            f: pool.submit(build_faulty, tmp_path_factory.mktemp("faulty"), f)
            for f in asked
            if f in FAULTS
        }


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_noticed(kernels: Kernels, faulty: Any, fault: str) -> None:
    library, several = faulty[fault].result(), trials(kernels)
    found = in_child(lambda: first_problem(library, several))
    print(fault, "->", found)
    assert found != "none"


@pytest.mark.slow
@pytest.mark.parametrize("version", [13000, 12000])
def test_no_fault_no_problem(kernels: Kernels, tmp_path: Path, version: int) -> None:
    """CUDA 12.0 and before take smaller arguments, hence fewer tensors a launch."""
    library = build_small(tmp_path, f"-DCUDART_VERSION={version}")
    assert (Kernels(library).entries("adam", False) < 100) == (version == 12000)
    several = trials(kernels)
    assert in_child(lambda: first_problem(library, several)) == "none"


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


# ---- the stand-in itself -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Library:
    library = Library(build(tmp_path_factory.mktemp("self"), "self", "-O1", source="self_test.cpp"))
    library.c.host_kernel.restype = ctypes.c_char_p
    return library


def run_kernel(stand_in: Library, name: str, blocks: int, n: int) -> tuple[str, list[int]]:
    numbers = torch.arange(blocks * n, dtype=torch.int32)
    said = stand_in.c.host_kernel(
        name.encode(), c_void_p(numbers.data_ptr()), c_uint32(blocks), c_uint32(n)
    )
    return (said or b"").decode(), numbers.tolist()


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_barriers_shuffles_and_shared_memory(stand_in: Library, order: int) -> None:
    with stand_in.set(thread_order=order):
        for n in (128, 32):
            assert run_kernel(stand_in, "sum", 1, n) == ("", [n * (n - 1)] * n)
        assert run_kernel(stand_in, "stale", 4, 1) == ("", [-1] * 4)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_threads_and_blocks_run_in_the_order_that_is_set(stand_in: Library, order: int) -> None:
    with stand_in.set(thread_order=order, block_order=order):
        _, numbers = run_kernel(stand_in, "order", 7, 64)
    assert sorted(numbers) == list(range(min(numbers), min(numbers) + 448))
    assert (numbers == sorted(numbers)) == (order == 0)
    assert (numbers == sorted(numbers, reverse=True)) == (order == 1)


def test_what_a_gpu_may_refuse_is_refused(stand_in: Library) -> None:
    for name, blocks, n, message in [
        ("half_barrier", 1, 64, "a barrier that some threads wait at and others never come to"),
        ("load", 1, 32, "misaligned address"),
        ("store", 1, 32, "misaligned address"),
        ("sum", 0, 32, "invalid configuration"),
        ("sum", 1, 2048, "invalid configuration"),
    ]:
        assert message in run_kernel(stand_in, name, blocks, n)[0]
        assert run_kernel(stand_in, "sum", 1, 32)[0] == ""  # and the next launch is sound
