"""What a case works with: parameters and gradients made from a seed, walks, and the registry of cases."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..spec import Spec, Unsupported
from .exact import FAMILIES, Hyper
from .walk import Fail, Found, Walk

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Lab:
    """One case's bench: an optimizer, where and in what dtype it runs, and what has been found.

    Args:
        spec: the optimizer to test.
        family: its rule.
        dtype: of the parameters, unless a case is about dtypes.
        device: of the parameters.
        twin: another optimizer to compare with, instead of float64.
        same_bits: whether the twin's bits must be met.
        long: how many steps the longest free run has.
    """

    spec: Spec
    family: str
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    twin: Spec | None = None
    same_bits: bool = False
    long: int = 10_000
    found: Found = field(default_factory=Found)
    curve: dict[int, tuple[float, float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reseed()

    def reseed(self) -> None:
        """Starts the random numbers from their beginning."""
        self.rng = np.random.default_rng(0)

    # ---- hyper-parameters ------------------------------------------------------------------------

    def hyper(self, **wanted: Any) -> Hyper:
        """The candidate's own defaults, decay where it takes it, then ``wanted``, then what its spec fixes.

        Raises:
            Unsupported: if the candidate does not take something wanted.
        """
        names = FAMILIES[self.family].fields
        values: dict[str, Any] = {"lr": FAMILIES[self.family].lr}
        for name in names:
            default = getattr(self.spec.arguments.get(name), "default", inspect.Parameter.empty)
            if isinstance(default, (int, float, tuple)):
                values.setdefault(name, default)
        values["weight_decay"] = 0.1 if self.spec.takes("weight_decay") else 0.0
        for name, value in wanted.items():
            if name in names and not self.spec.takes(name) and value != getattr(Hyper(), name):
                raise Unsupported(f"it takes no {name}")
            if name in self.spec.options and self.spec.options[name] != value:
                raise Unsupported(f"its spec fixes {name}")
            values[name] = value
        values |= {k: v for k, v in self.spec.options.items() if k in names}
        return Hyper(**{k: v for k, v in values.items() if k in names})

    # ---- tensors ---------------------------------------------------------------------------------

    def weights(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed numbers, as a leaf that wants a gradient."""
        return self.leaf(self.normal(shape, dtype or self.dtype))

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Normally distributed numbers, complex ones for a complex dtype."""
        x = torch.from_numpy(self.rng.standard_normal((*shape, 2)))
        x = torch.view_as_complex(x) if dtype.is_complex else x[..., 0].clone()
        return x.to(device=self.device, dtype=dtype)

    @staticmethod
    def leaf(t: Tensor) -> Tensor:
        """A leaf with the memory of ``t``, its strides too."""
        return t.detach().requires_grad_()

    def gradient(
        self, p: Tensor, low: float = -9, high: float = 3, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Of the shape of ``p``, contiguous, of either sign, 10^low to 10^high evenly in the logarithm."""
        shape, dtype = tuple(p.shape), dtype or p.dtype
        if dtype.is_complex:
            x = torch.from_numpy(self._wild((*shape, 2), low, high))
            return torch.view_as_complex(x).to(device=self.device, dtype=dtype)
        return torch.from_numpy(self._wild(shape, low, high)).to(device=self.device, dtype=dtype)

    def _wild(self, shape: tuple[int, ...], low: float, high: float) -> Any:
        sizes = 10 ** self.rng.uniform(low, high, shape)
        return np.asarray(self.rng.choice([-1.0, 1.0], shape) * sizes)

    # ---- runs ------------------------------------------------------------------------------------

    def walk(self, *groups: tuple[Sequence[Tensor], Hyper]) -> Walk:
        """A walk of the candidate over (parameters, hyper-parameters) of each group."""
        return Walk(self.spec, self.family, groups, self.found, self.twin, self.same_bits)

    def run(
        self, params: Sequence[Tensor], steps: int = 10, hyper: Hyper | None = None,
        gradient: Callable[[Tensor], Tensor] | None = None,
    ) -> Walk:  # fmt: skip
        """Walks over one group of parameters with gradients of every size."""
        walk = self.walk((params, hyper or self.hyper()))
        for _ in range(steps):
            walk.step([(gradient or self.gradient)(p) for p in params])
        return walk


@dataclass(frozen=True)
class Case:
    """One thing that is tested."""

    name: str
    about: str
    run: Callable[[Lab], None]
    sets: tuple[str, ...]
    families: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


CASES: dict[str, Case] = {}


def case(
    *sets: str,
    families: tuple[str, ...] = tuple(FAMILIES),
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> Callable[[Callable[[Lab], None]], Callable[[Lab], None]]:
    """Registers a function as a case of some sets. Its name and docstring are the case's."""

    def register(function: Callable[[Lab], None]) -> Callable[[Lab], None]:
        name = function.__name__
        CASES[name] = Case(name, inspect.getdoc(function) or "", function, sets, families, dtypes)
        return function

    return register


def need(condition: bool, what: str) -> None:
    """Raises :class:`Fail` unless a condition holds."""
    if not condition:
        raise Fail(what)
