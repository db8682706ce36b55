"""How numbers rest in memory: ``get`` (to the number) and ``put`` (from it). The twin of ``csrc/formats.h``."""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes that parameters, gradients and states may have (a complex dtype is pairs of one of these)."""


def get(rest: Tensor, arithmetic: torch.dtype) -> Tensor:
    """The numbers of ``rest`` in the arithmetic's dtype, float32 or float64: a new tensor; complex ones as pairs."""
    if rest.is_complex():
        return torch.view_as_real(rest.to(arithmetic.to_complex(), copy=True).resolve_conj())
    return rest.to(arithmetic, copy=True).resolve_neg()


def put(x: Tensor, rest: Tensor) -> None:
    """Writes ``x`` into ``rest``, to nearest even; a double goes to 16 bits by way of float32, as in C++."""
    if x.dtype == torch.float64 and rest.element_size() < (8 if rest.is_complex() else 4):
        x = x.to(torch.float32)
    rest.copy_(torch.view_as_complex(x) if rest.is_complex() else x)
