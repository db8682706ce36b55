"""A brief look at whether an optimizer does what its family's rule says, for those who measure something else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.optim import Optimizer

from ..spec import Spec, Unsupported, first_line
from . import arithmetic, exact
from .lab import Lab
from .walk import numbers

SIZES = (1, 17, 1025, 300_007)
FIRST = 0.03  # how far the first step of an element may be off, of its length: no optimizer has rounded states yet
FEW = 1e-4  # of a tensor's elements, whose gradient and decay cancel, may be farther off in 16 bits
LATER = 0.1  # and after three, root mean square over a tensor: moments of 8 bits stay below, a wrong rule does not


def agrees(
    candidate: Spec | str | Callable[..., Optimizer],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> str | None:
    """Whether an optimizer moves parameters as its family's rule does, to within a coarse limit.

    That is not parity: moments of 16 and 8 bits pass, as they should where speed is compared. What passes computes
    the right thing for every element; how exactly, :func:`adamfused.parity.parity` tells.

    Args:
        candidate: as in :func:`adamfused.parity.parity`; of a known family.
        dtype: of the parameters.
        device: of the parameters.

    Returns:
        ``None`` if it does, or one line that says what is wrong.

    Raises:
        ValueError: if its family is not known.
    """
    spec = Spec.of(candidate)
    if spec.family is None:
        raise ValueError(f"the rule of {spec} is not known from its name; give family=")
    lab = Lab(spec, spec.family, dtype, device)
    try:
        return _look(lab)
    except Unsupported as refusal:
        return str(refusal)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {first_line(error)}"


def _look(lab: Lab) -> str | None:
    hyper = lab.hyper()
    params = [lab.weights(n) for n in SIZES]
    optimizer = lab.spec.make(params, **hyper.arguments(lab.family, lab.spec))
    start = [numbers(p) for p in params]
    wanted = [exact.start(lab.family, hyper, x) for x in start]
    for t in range(1, 4):
        for p, parts in zip(params, wanted, strict=True):
            p.grad = lab.gradient(
                p, -4, -2
            )  # far above eps, which some add and some take as a floor
            parts |= exact.step(lab.family, hyper, t, numbers(p.grad), parts)
        optimizer.step()
        for p, x, parts in zip(params, start, wanted, strict=True):
            way, error = parts["param"] - x, numbers(p) - parts["param"]
            size = np.maximum(np.abs(x), np.abs(parts["param"]))
            ulp = arithmetic.spacing(size, lab.dtype)
            near = FIRST * np.abs(way) + 2 * t * ulp
            count = int((~(np.abs(error) <= near)).sum())
            if t == 1 and count > len(x) * FEW:
                return f"{count:,} of {len(x):,} elements are moved wrongly in the first step"
            far = np.sqrt(np.mean(np.maximum(np.abs(error) - 2 * t * ulp, 0) ** 2))
            if not far <= LATER * np.sqrt(np.mean(way**2)):
                return f"{len(x):,} elements are moved wrongly in step {t}"
    return None
