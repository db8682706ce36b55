"""One step in torch operations: the oracle that the kernels are compared with bit for bit, and the fallback.

The twin of ``csrc/cpu/drive.h`` and ``csrc/cuda/step.cuh``: get, apply the rule, put. Runs on any device; reads step
counts that lie on a device, so it cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import formats
from .rules import RULES, Averaged, Now, round_to


def step(
    rule: str,
    hyper: Sequence[float],
    now: Now,
    param: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    copy: Tensor | None = None,
) -> None:
    """Moves one parameter and its states in place.

    Args:
        rule: a name in :data:`adamfused.rules.RULES`.
        hyper: the rule's numbers, in the order of its ``Hyper`` struct in ``csrc/rules.h``.
        now: the learning rate, the count of the step that is made, and what else the step knows.
        param: the parameter, of any shape and any dtype in :data:`adamfused.formats.FORMATS`, or complex.
        grad: its gradient, of the same shape; any of those dtypes; not written.
        states: as many tensors of the parameter's shape as the rule has states, and one more for an average of the
            weights.
        copy: receives the new parameter, rounded to its own dtype.
    """
    arithmetic = torch.float64 if param.dtype.to_real() == torch.float64 else torch.float32
    r = round_to(arithmetic)
    plain = RULES[rule](hyper, now, r)
    move = plain if len(states) == plain.states else Averaged(rule, hyper, now, r)
    numbers = [formats.get(x, arithmetic) for x in (param, grad, *states)]
    moved = move(*numbers)
    for x, rest in zip(moved, (param, *states), strict=True):
        formats.put(x, rest)
    if copy is not None:
        formats.put(moved[0], copy)
