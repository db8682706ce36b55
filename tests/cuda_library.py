"""The CUDA kernels as libraries for the CPU, and memory that tells when they touch what is not theirs: for tests."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_double,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint32,
    c_void_p,
)
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import threads
from torch import Tensor

from adamfused import rules

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
PAGE = mmap.PAGESIZE


# ---- the structs of csrc/job.h and csrc/sum.h ------------------------------------------------------

PARTS, COPY = 7, 6  # parameter, gradient, up to four states, and a copy behind those
MASTER, SCALE, SLOTS = PARTS, PARTS + 1, PARTS + 5  # what lies beside the parameter, and the states


class Span(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p * SLOTS),
        ("format", c_uint8 * PARTS),
        ("aligned", c_bool),
        ("key", c_uint32),
        ("t", c_uint32),
        ("first", c_uint32),
        ("recipe", c_int32),
        ("numel", c_int64),
        ("step", c_void_p),
        ("carried", c_void_p),
    ]


class Recipe(ctypes.Structure):
    _fields_ = [
        ("hyper", c_double * 8),
        ("lr", c_double),
        ("t", c_double),
        ("ema_decay", c_double),
        ("carried", c_double),
        ("lr_on_device", c_void_p),
        ("lr_is_double", c_bool),
    ]


class Job(ctypes.Structure):
    _fields_ = [
        ("rule", c_int),
        ("averaged", c_bool),
        ("in_double", c_bool),
        ("spans", POINTER(Span)),
        ("count", c_int64),
        ("rules", c_void_p),
        ("recipes", POINTER(Recipe)),
        ("factor", c_void_p),
        ("found_inf", c_void_p),
        ("first_tile", c_void_p),
    ]


class Addends(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("format", c_uint8), ("numel", c_int64)]


class SumJob(ctypes.Structure):
    _fields_ = [
        ("what", c_uint8),
        ("tensors", POINTER(Addends)),
        ("count", c_int64),
        ("first_chunk", POINTER(c_int64)),
        ("sums", c_void_p),
    ]


class Settings(ctypes.Structure):
    _fields_ = [
        ("thread_order", c_int32),
        ("block_order", c_int32),
        ("largest_grid", c_uint32),
        ("first_block", c_uint32),
        ("launches", c_int64),
        ("large_arguments", c_int32),
    ]


def layout(*structs: type[ctypes.Structure]) -> list[int]:
    """The sizes of structs, and where their parts lie."""
    facts = []
    for struct in structs:
        offsets = (getattr(struct, name).offset for name, *_ in struct._fields_)
        facts += [ctypes.sizeof(struct), *offsets]
    return facts


# ---- the libraries -----------------------------------------------------------------------------------


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
        self.c.host_settings.restype = POINTER(Settings)
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

    def facts(self, structs: Sequence[type[ctypes.Structure]], more: int) -> tuple[list[int], ...]:
        """The layout of structs as the compiler made it, and as many more numbers as there are."""
        n = len(layout(*structs))
        numbers = (c_int64 * (n + more))()
        self.c.host_facts(numbers)
        return numbers[:n], numbers[n:]

    def run(self, job: Job | SumJob) -> str | None:
        """What is wrong with a launch, if anything."""
        self.c.host_run.restype = c_char_p
        error = self.c.host_run(ctypes.byref(job))
        return error and error.decode()


class Rule(NamedTuple):
    """A rule by its name, and whether it also keeps an average of the weights."""

    name: str
    averaged: bool = False

    def __str__(self) -> str:
        return self.name + "-averaged" * self.averaged

    @property
    def number(self) -> int:
        return list(rules.RULES).index(self.name)


class Kind(NamedTuple):
    """Of the kernels of a rule, which: for jobs of plain numbers of 4 bytes and more, of 2 and more, for jobs of every
    format, or in double."""

    name: str
    each: int  # that a thread takes at once

    def __str__(self) -> str:
        return self.name

    @property
    def in_double(self) -> bool:
        return self is DOUBLES

    @property
    def stored(self) -> bool:
        return self in (STORED, DOUBLES)


FLOATS, HALVES, STORED, DOUBLES = (
    Kind("floats", 4),
    Kind("halves", 8),
    Kind("stored", 8),
    Kind("doubles", 4),
)


class About(NamedTuple):
    states: int
    numbers: int
    size: int
    entries: int  # tensors that a launch takes
    few: int  # and one whose arguments are few, as in a graph


class Kernels(Library):
    """Those of ``csrc/cuda/step.cu``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.c.host_self_test.restype = c_char_p
        self.layout, numbers = self.facts((Span, Recipe, Job), 3)
        self.threads, self.rounds, self.table = numbers

    def about(self, rule: Rule, kind: Kind) -> About:
        *facts, plain, stored, few = self._rule(rule, kind.in_double, (), rules.Now(0, 1), None)
        return About(*facts, stored if kind.stored else plain, few)

    def make(
        self, rule: Rule, in_double: bool, hyper: Sequence[float], now: rules.Now, to: Any
    ) -> None:
        """Makes a rule in the memory ``to``, as the host does."""
        self._rule(rule, in_double, hyper, now, to)

    def _rule(
        self, rule: Rule, in_double: bool, hyper: Sequence[float], now: rules.Now, to: Any
    ) -> list[int]:
        facts, number = (c_int64 * 6)(), rule.number
        numbers = (c_double * 8)(*hyper), (c_double * 5)(*now)
        self.c.host_rule(number, rule.averaged, in_double, facts, *numbers, to)
        return list(facts)

    def launches(self, job: Job) -> int:
        """How many launches a job takes; its tensors have no memory."""
        before = self.settings.launches
        with self.set(first_block=2**32 - 1, largest_grid=1):
            assert self.run(job) is None
        return self.settings.launches - before

    def tile(self, kind: Kind) -> int:
        return self.threads * kind.each * self.rounds


# ---- memory ------------------------------------------------------------------------------------------


class Place(NamedTuple):
    begin: int
    end: int
    dtype: torch.dtype

    def of(self, memory: Tensor) -> Tensor:
        return memory[self.begin : self.end].view(self.dtype)


class Memory:
    """Places for tensors in one piece of memory, of which there may be several with other contents.

    Between two tensors lie 64 bytes, or a page that cannot be read; then a tensor either ends where that page begins
    (``pages="before"``) or begins where one ends (``"after"``).
    """

    def __init__(self, pages: str = "") -> None:
        self.pages, self.places = pages, list[Place]()
        self.end = PAGE

    def place(self, numel: int, dtype: torch.dtype, shift: int = 0) -> Place:
        """Of a tensor ``shift`` elements past a multiple of 16 bytes."""
        length = numel * dtype.itemsize
        if self.pages:
            begin, room = -(-self.end // PAGE) * PAGE + PAGE, -(-length // PAGE) * PAGE
            self.end = begin + room
            begin += room - length if self.pages == "before" else 0
        else:
            begin = -(-self.end // 16) * 16 + shift * dtype.itemsize
            self.end = begin + length + 64
        self.places.append(Place(begin, begin + length, dtype))
        return self.places[-1]

    @property
    def size(self) -> int:
        return -(-self.end // PAGE) * PAGE

    def rubbish(self) -> Tensor:
        memory = self.copy_of(torch.zeros(self.size, dtype=torch.uint8))
        memory.numpy()[:] = np.frombuffer(np.random.default_rng(0).bytes(self.size), np.uint8)
        return memory

    def copy_of(self, other: Tensor) -> Tensor:
        memory = np.frombuffer(mmap.mmap(-1, self.size + PAGE), np.uint8)
        return torch.from_numpy(memory)[: self.size].copy_(other)

    @contextmanager
    def closed(self, memory: Tensor) -> Iterator[None]:
        """The pages between the tensors cannot be touched."""
        places = sorted((begin, end) for begin, end, _ in self.places)
        ends = [0, *(-(-end // PAGE) * PAGE for _, end in places)] if self.pages else []
        begins = [*(begin // PAGE * PAGE for begin, _ in places), self.size]
        mprotect = ctypes.CDLL(None).mprotect
        for protection in (0, mmap.PROT_READ | mmap.PROT_WRITE):
            for begin, end in zip(ends, begins, strict=False):
                address = c_void_p(memory.data_ptr() + begin)
                assert mprotect(address, c_size_t(end - begin), protection) == 0
            if protection == 0:
                yield


def numbers_of_nothing(size: int) -> Tensor:
    """So many bytes that have addresses, but no memory until they are written."""
    no_reserve = 0x4000  # of Linux; in mmap since Python 3.11
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.from_numpy(np.frombuffer(mmap.mmap(-1, size, flags), np.uint8))


# ---- how the tests run ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of torch's: with tensors so small, several would mostly wait for one another."""
    with threads(1):
        yield


ORDERS = {"up": 0, "down": 1, "mixed": 2}
FEW_BLOCKS = 4  # enough for advance_kernel, which does not go round


def in_child(call: Callable[[], str]) -> str:
    """What ``call`` returns in a process of its own, or what that process died of."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            signal.signal(
                signal.SIGALRM, signal.SIG_DFL
            )  # a test runner's would wait for a kernel's end
            signal.alarm(60)
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
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return said
