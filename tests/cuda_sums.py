"""Sums that the CUDA kernels take on the CPU, and the oracle: the cases of ``test_cuda_sums_on_host.py``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int64
from pathlib import Path

import numpy as np
import torch
from cuda_library import Addends, Library, Memory, SumJob, numbers_of_nothing
from helpers import differing
from torch import Tensor

from adamfused import formats, norm

SUM_OF = {"squares": 0, "largest": 1}  # SumOf in csrc/sum.h
Size = tuple[int, torch.dtype, int]  # numbers, their dtype, elements past a multiple of 16 bytes


class Sums(Library):
    """The kernels of ``csrc/cuda/sum.cu``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.c.host_sums_of.restype = c_int64
        self.layout, numbers = self.facts((Addends, SumJob), 4)
        self.chunk, self.lanes, self.entries, self.threads = numbers


def sums_of(chunks: int) -> int:
    """How many sums there are in all, those of sums too."""
    return chunks if chunks <= 1 else chunks + sums_of(-(-chunks // norm.CHUNK))


class SumCase:
    """Tensors and the sums of their chunks in one piece of memory, of which only the sums may change.

    Args:
        sizes: of the tensors.
        special: numbers at places of the first tensor, from its end where a place is negative.
        scale: how large the numbers are, in powers of ten; the squares of a wider range cannot be summed exactly.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        special: dict[int, float] | None = None,
        scale: tuple[float, float] = (-4, 2),
        pages: str = "",
    ) -> None:
        self.sizes, self.memory = sizes, Memory(pages)
        self.places = [self.memory.place(*size) for size in sizes]
        chunks = [-(-n // norm.CHUNK) for n, _, _ in sizes]
        self.first_chunk = [sum(chunks[:t]) for t in range(len(chunks) + 1)]
        self.sums = self.memory.place(sums_of(sum(chunks)), torch.float64)
        self.start, self._expected = self.memory.rubbish(), dict[str, Tensor]()
        rng = np.random.default_rng(0)
        for place, (n, _, _) in zip(self.places, sizes, strict=True):
            numbers = rng.choice([-1.0, 1.0], n) * 10 ** rng.uniform(*scale, n)
            place.of(self.start).copy_(torch.from_numpy(numbers))
        for at, x in (special or {}).items():
            self.places[0].of(self.start)[at] = x

    def job(self, what: str, memory: Tensor) -> SumJob:
        base = memory.data_ptr()
        tensors = (Addends * len(self.sizes))()
        for tensor, place, (n, dtype, _) in zip(tensors, self.places, self.sizes, strict=True):
            tensor.data, tensor.format = base + place.begin, formats.FORMATS.index(dtype)
            tensor.numel = n
        first_chunk = (c_int64 * len(self.first_chunk))(*self.first_chunk)
        return SumJob(SUM_OF[what], tensors, len(tensors), first_chunk, base + self.sums.begin)

    def expected(self, what: str) -> Tensor:
        if what not in self._expected:
            grads = [place.of(self.start) for place in self.places]
            self._expected[what] = norm.reference_sum(grads, grads, what == "largest")
        return self._expected[what]

    def problems(self, sums: Sums, what: str) -> list[str]:
        """In what the kernels' sum differs from the oracle's, and what else they wrote: nothing, if all is well."""
        got = self.memory.copy_of(self.start)
        with self.memory.closed(got):
            if error := sums.run(self.job(what, got)):
                return [f"the launch failed: {error}"]
        found = []
        for total in self.sums.of(got)[-1:]:  # there is none of no numbers
            if differing(total, want := self.expected(what)):
                found.append(f"{total.item()!r} in place of {want.item()!r} for {self.sizes[:5]}")
        other = got != self.start
        other[self.sums.begin : self.sums.end] = False
        if n := int(other.sum()):
            found.append(f"{n} bytes have changed that are not of the sums")
        return found


DTYPES = formats.FORMATS
SEAMS = [0, 1, 31, 32, 33, 255, 256, 257, 4095, 4096, 4097, 3 * 4096 + 300, 9 * 4096 + 1]


@functools.cache
def seams(pages: str = "") -> SumCase:
    """Every size at which something changes, in every format, aligned or not, in one job."""
    return SumCase(
        [(n, dtype, i % 3) for i, n in enumerate(SEAMS) for dtype in DTYPES], pages=pages
    )


@functools.cache
def many(entries: int) -> SumCase:
    """Tensors for three launches; some are empty: the first, the last and those about a launch's limit."""
    n = 3 * entries + 3
    empty = {0, entries - 1, entries, entries + 1, 2 * entries + 1, n - 1}
    return SumCase(
        [
            (0 if i in empty else 1 + i * 997 % 9001, DTYPES[i % len(DTYPES)], i % 2)
            for i in range(n)
        ]
    )


def problems_of_a_huge_tensor(sums: Sums) -> list[str]:
    """Of more than 2^32 numbers, those of which only the last have memory: the last block of a launch takes the last
    eight chunks, and some before that are zeros."""
    n, last, dtype = 3 * 2**31 - 5, 8 * norm.CHUNK - 5, torch.bfloat16
    memory = numbers_of_nothing(2 * n).view(dtype)
    memory[-last:] = torch.linspace(1, 2, last)
    chunks = -(-n // norm.CHUNK)
    got = torch.full((sums_of(chunks),), -1.0, dtype=torch.float64)
    tensor = Addends(memory.data_ptr(), formats.FORMATS.index(dtype), n)
    first_chunk = (c_int64 * 2)(0, chunks)
    job = SumJob(SUM_OF["squares"], ctypes.pointer(tensor), 1, first_chunk, got.data_ptr())
    with sums.set(first_block=65535):
        if error := sums.run(job):
            return [error]
    of_chunks = [norm.reference_sum([x], [x], False) for x in memory[-last:].split(norm.CHUNK)]
    wrong = differing(got[chunks - 8 : chunks], torch.stack(of_chunks))
    wrong += int((got[: chunks - 8] > 0).sum())
    return [f"{wrong} sums wrong in a huge tensor"] if wrong else []
