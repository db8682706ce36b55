"""One step in torch operations: the oracle that the kernels are compared with bit for bit, and the fallback.

The twin of ``csrc/cpu/drive.h`` and ``csrc/cuda/step.cuh``: get, apply the rule, put. Runs on any device; reads step
counts that lie on a device, so it cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import formats
from .formats import Random
from .rules import RULES, Averaged, Now, round_to


def step(
    rule: str,
    hyper: Sequence[float],
    now: Now,
    param: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    copy: Tensor | None = None,
    *,
    master: Tensor | None = None,
    scales: Sequence[Tensor | None] = (),
    random: Random | None = None,
    stochastic: bool = False,
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
        copy: receives the new parameter, rounded to nearest in its own dtype.
        master: what lies beside a 16-bit parameter, if it has a master weight.
        scales: what lies beside each state, or nothing; those of states in codes of 8 bits.
        random: the random numbers of this parameter and step, for such codes and for ``stochastic``.
        stochastic: round 16-bit parameters without a master, and 16-bit states, at random.
    """
    arithmetic = torch.float64 if param.dtype.to_real() == torch.float64 else torch.float32
    r = round_to(arithmetic)
    plain = RULES[rule](hyper, now, r)
    move = plain if len(states) == plain.states else Averaged(rule, hyper, now, r)
    rests = (param, *states)
    besides = (master, *(scales or (None,) * len(states)))
    parameter, *others = (
        formats.get(rest, arithmetic, beside) for rest, beside in zip(rests, besides, strict=True)
    )
    moved = move(parameter, formats.get(grad, arithmetic), *others)
    slots = (0, *range(2, 2 + len(states)))
    for x, rest, beside, slot in zip(moved, rests, besides, slots, strict=True):
        at_random = random is not None and (stochastic or rest.dtype in formats.CODES)
        formats.put(x, rest, beside, random.of(slot) if random and at_random else None)
    if copy is not None:
        formats.put(moved[0], copy)
