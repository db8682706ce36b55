"""One step in torch operations: the oracle that the kernels are compared with bit for bit, and the fallback.

The twin of ``csrc/cpu/drive.h`` and ``csrc/cuda/step.cuh``: get, apply the rule, put. Runs on any device; reads step
counts that lie on a device, so it cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import formats
from .rules import RULES, round_to


def step(
    rule: str,
    hyper: Sequence[float],
    lr: float,
    param: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    count: Tensor,
) -> None:
    """Moves one parameter and its states in place and advances ``count`` by one.

    Args:
        rule: a name in :data:`adamfused.rules.RULES`.
        hyper: the rule's numbers, in the order of its ``Hyper`` struct in ``csrc/rules.h``.
        lr: the learning rate.
        param: the parameter, of any shape and any dtype in :data:`adamfused.formats.FORMATS`, or complex.
        grad: its gradient, of the same shape; any of those dtypes; not written.
        states: as many tensors of the parameter's shape as the rule has states.
        count: the steps made so far, one number.
    """
    after = count + 1
    arithmetic = torch.float64 if param.dtype.to_real() == torch.float64 else torch.float32
    move = RULES[rule](hyper, lr, float(after), round_to(arithmetic))
    numbers = [formats.get(x, arithmetic) for x in (param, grad, *states)]
    for x, rest in zip(move(*numbers), (param, *states), strict=True):
        formats.put(x, rest)
    count.copy_(after)
