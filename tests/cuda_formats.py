"""The formats of ``csrc/formats.h``, as the tests of the CUDA kernels name them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from helpers import differing
from torch import Tensor

from adamfused import formats


class Format(NamedTuple):
    """The dtypes of what rests and of what lies beside it."""

    name: str
    rest: torch.dtype
    beside: torch.dtype | None = None

    def __repr__(self) -> str:
        return self.name

    @property
    def number(self) -> int:
        return FORMATS.index(self)

    @property
    def coded(self) -> bool:
        return self.rest in formats.CODES

    @property
    def by_chance(self) -> bool:
        """Whether random numbers decide how it is rounded."""
        return self.coded or "AtRandom" in self.name

    def numel_beside(self, numel: int) -> int:
        return -(-numel // formats.BLOCK) if self.coded else numel

    def fill(self, x: Tensor, rest: Tensor, beside: Tensor | None) -> None:
        """With numbers. Some of those that have a float beside have parted with it since."""
        formats.put(x, rest, beside, formats.Random(0, 0) if self.coded else None)
        if self in (MASTER_BF16, MASTER_F16):
            rest[::7] *= 2


F32, F64 = Format("F32", torch.float32), Format("F64", torch.float64)
BF16, F16 = Format("BF16", torch.bfloat16), Format("F16", torch.float16)
BF16_AT_RANDOM = Format("BF16AtRandom", torch.bfloat16)
F16_AT_RANDOM = Format("F16AtRandom", torch.float16)
SPLIT16 = Format("Split16", torch.bfloat16, torch.int16)
SPLIT8 = Format("Split8", torch.bfloat16, torch.int8)
MASTER_BF16 = Format("MasterBF16", torch.bfloat16, torch.float32)
MASTER_F16 = Format("MasterF16", torch.float16, torch.float32)
CODE = Format("SignedCode", torch.int8, torch.float32)
UNSIGNED = Format("UnsignedCode", torch.uint8, torch.float32)

NUMBERS = [F32, F64, BF16, F16]
AT_RANDOM = [BF16_AT_RANDOM, F16_AT_RANDOM]
JOINED = [SPLIT16, SPLIT8, MASTER_BF16, MASTER_F16]
FORMATS = [*NUMBERS, *AT_RANDOM, *JOINED, CODE, UNSIGNED]
"""In the order of ``FormatId``."""


def wrong_numbers(a: Tensor, b: Tensor) -> int:
    """How many differ in their bits. Whatever its payload, a NaN is a NaN."""
    return differing(a, b) if a.is_floating_point() else int((a != b).sum())
