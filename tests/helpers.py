"""What several test files need: comparing bits, gradients of every kind, and pairs of optimizers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

import adamfused
from adamfused.parity.walk import give_gradient

EVERY_OPTIMIZER = [
    c for c in vars(adamfused).values() if isinstance(c, type) and issubclass(c, Optimizer)
]
OF_TORCH = [c for c in EVERY_OPTIMIZER if hasattr(torch.optim, c.__name__)]
REAL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: Tensor) -> Tensor:
    """The bit patterns of ``t`` as integers, one per real number: shape ``[n]``, or ``[2 n]`` for complex.

    Every NaN gets one pattern: its place must agree, its payload is the processor's own affair.
    """
    t = t.detach().resolve_conj().contiguous()
    if t.is_complex():
        t = torch.view_as_real(t)
    t = t.reshape(-1)
    as_integers = t.view(_INTEGER_OF_SIZE[t.element_size()])
    return torch.where(t.isnan(), torch.full_like(as_integers, -1), as_integers)


def differing(a: Tensor, b: Tensor) -> int:
    """How many real numbers of ``a`` and ``b`` differ in their bits."""
    return int((bits(a) != bits(b)).sum())


def assert_same_bits(a: Tensor, b: Tensor, what: str = "tensors") -> None:
    """``a`` and ``b`` have one dtype, one shape and the same bits; the sign of zero counts."""
    assert a.dtype == b.dtype, f"{what}: {a.dtype} against {b.dtype}"
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} against {tuple(b.shape)}"
    if count := differing(a, b):
        at = int((bits(a) != bits(b)).nonzero()[0])
        x, y = (torch.view_as_real(t.detach()) if t.is_complex() else t.detach() for t in (a, b))
        x, y = x.reshape(-1), y.reshape(-1)
        raise AssertionError(
            f"{what}: {count} of {x.numel()} differ in bits, first at {at}: "
            f"{x[at].item()!r} against {y[at].item()!r}"
        )


def tensors_of(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and state of an optimizer, with a name, in a fixed order."""
    for j, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            yield f"parameter {i} of group {j}, {tuple(p.shape)} {p.dtype}", p
            for key in sorted(optimizer.state.get(p, {})):
                yield f"'{key}' of parameter {i} of group {j}", optimizer.state[p][key]


def assert_same_result(a: Optimizer, b: Optimizer) -> None:
    """Two optimizers hold the same bits, in every parameter and every state."""
    pairs = zip(tensors_of(a), tensors_of(b), strict=True)
    for (name, x), (other_name, y) in pairs:
        assert name == other_name
        assert_same_bits(x, y, name)


def digest(tensors: Iterable[Tensor]) -> str:
    """One hash of all the bits."""
    whole = hashlib.sha256()
    for t in tensors:
        whole.update(bits(t).numpy().tobytes())
    return whole.hexdigest()


def wild(rng: np.random.Generator, n: int, dtype: torch.dtype, specials: float = 0.0) -> Tensor:
    """``n`` numbers of either sign from 1e-9 to 1e3, evenly spread in their logarithm.

    A share ``specials`` of them are zeros of either sign, infinities, NaN, subnormals and the
    largest floats.
    """
    if dtype.is_complex:
        pairs = wild(rng, 2 * n, torch.float64, specials).reshape(n, 2)
        return torch.view_as_complex(pairs).to(dtype)
    x = rng.choice([-1.0, 1.0], n) * 10.0 ** rng.uniform(-9, 3, n)
    chosen = rng.random(n) < specials
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -3e-45, 3e-8, 3.4e38, -1e-310, 1e-20]
    x[chosen] = rng.choice(odd, int(chosen.sum()))
    return torch.from_numpy(x).to(dtype)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Runs its body with ``n`` of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wild_run(
    make: Callable[..., Optimizer],
    kwargs: dict[str, Any],
    dtypes: Sequence[torch.dtype],
    sizes: Sequence[int],
    steps: int = 20,
    grad_dtype: torch.dtype | None = None,
    specials: float = 0.02,
    n_threads: int = 1,
) -> tuple[Optimizer, Optimizer]:
    """Steps the native kernels and the reference from the same data with the same wild gradients.

    There is one group, with a parameter of every size in every dtype. Every third parameter has no
    gradient at every third step. The gradients of every fifth step hold special values.

    Args:
        make: the optimizer's class.
        kwargs: its arguments.
        dtypes: of the parameters.
        sizes: of the parameters, in elements.
        steps: how often to step.
        grad_dtype: of the gradients; ``None`` for each parameter's own.
        specials: their share, see :func:`wild`.
        n_threads: for the native kernels; the reference always has one.
    """
    rng = np.random.default_rng(0)
    shapes = [(n, dtype) for dtype in dtypes for n in sizes]
    data = [wild(rng, n, dtype) for n, dtype in shapes]
    params = {b: [torch.nn.Parameter(t.clone()) for t in data] for b in ("native", "reference")}
    optimizers = {b: make(params[b], backend=b, **kwargs) for b in params}
    for t in range(steps):
        share = specials if t % 5 == 4 else 0.0
        grads = [wild(rng, n, grad_dtype or dtype, share) for n, dtype in shapes]
        for b, optimizer in optimizers.items():
            for i, (p, g) in enumerate(zip(params[b], grads, strict=True)):
                give_gradient(p, None if i % 3 == 0 and t % 3 == 1 else g.clone())
            with threads(n_threads if b == "native" else 1):
                optimizer.step()
    return optimizers["native"], optimizers["reference"]
