"""SGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from .base import check_lr, check_not_negative, numbers
from .optimizer import FusedOptimizer
from .options import Extras, with_extras
from .plan import Plan
from .storage import EMA, STEP


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and not value)


@with_extras
class SGD(FusedOptimizer):
    r"""Stochastic gradient descent, with momentum or without, fused; a drop-in for :class:`torch.optim.SGD`.

    With gradient :math:`g`, in the arithmetic of float32 (float64 for float64 parameters):

    .. math::
        g &\leftarrow \pm g + \lambda p \qquad (\text{sign by } \textit{maximize}) \\
        b &\leftarrow \mu b + (1-\tau) g \qquad (b = g \text{ in the first step}) \\
        x &= g \quad (\text{without momentum}), \qquad x = b \quad (\text{with momentum}), \qquad
            x = g + \mu b \quad (\textit{nesterov}) \\
        p &\leftarrow p - \gamma x

    Robbins & Monro 1951; momentum: Polyak 1964, in the form of Sutskever et al. 2013, where the learning rate is
    outside of the sum. :math:`\mu b` is told as :math:`b - (1-\mu) b`, whose small number keeps its digits.

    ``state[p]`` has a ``step`` count, which torch's has not: random rounding and averages of the weights depend on it.
    ``state_dict(format="torch")`` leaves it out, and checkpoints of torch.optim.SGD load without.

    Args:
        params: parameters, ``(name, parameter)`` pairs or groups of either, as in ``torch.optim``. Any shape, stride
            and floating or complex dtype; gradients may have any other floating dtype and stride.
        lr: learning rate :math:`\gamma`, a number or a one-element tensor (kept on the device with ``capturable``).
        momentum: :math:`\mu`; 0 keeps no buffer.
        dampening: :math:`\tau`.
        weight_decay: :math:`\lambda`, coupled: added to the gradient.
        nesterov: look ahead by the momentum; needs momentum and no dampening.
        maximize: climb instead of descend.
        foreach: accepted for drop-in use and ignored.
        differentiable: must be ``False``.
        fused: accepted for drop-in use and ignored: every step is fused.
        capturable: keep the step count on the parameter's device, so that CUDA graphs can capture the step.
        {extras}

    Raises:
        ValueError: for a hyper-parameter out of range, with torch.optim's words, and for a parameter that cannot have
            the formats of its group.

    Example:
        >>> import torch, adamfused
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = adamfused.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        >>> model(torch.ones(4, 10)).mean().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer', 'step']
    """

    _group_defaults: ClassVar[dict[str, Any]] = {
        "nesterov": False,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": False,
    }
    _known_states: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    _late_states: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    _torch_lacks: ClassVar[tuple[str, ...]] = (STEP,)
    _own_options: ClassVar[tuple[str, ...]] = ("capturable",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        self._check_group(defaults)
        if nesterov and (momentum <= 0 or dampening != 0):  # a group may be without momentum
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        super().__init__(params, defaults, extras, capturable=(capturable, False))

    @staticmethod
    def _check_group(group: Mapping[str, Any]) -> None:
        check_lr(group["lr"])
        check_not_negative(group, "momentum", "weight_decay")

    def _plan(self, group: dict[str, Any]) -> Plan:
        hyper = numbers(group, "weight_decay", "momentum", "dampening", "nesterov", "maximize")
        if group["momentum"] != 0:
            return Plan("sgd_momentum", ("momentum_buffer",), hyper)
        return Plan("sgd", (), hyper)

    def _completed(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A parameter that has a buffer has made a step. Flattened checkpoints have ``{}`` for what torch's lack."""
        entry = {key: value for key, value in entry.items() if not _is_nothing(value)}
        count = torch.tensor(
            float("momentum_buffer" in entry), dtype=torch.float32, device=torch.device("cpu")
        )
        return {STEP: count, **entry}

    def _begin_late(self, p: Tensor, group: dict[str, Any], plan: Plan) -> bool:
        state, dampened = self.state[p], group["dampening"] != 0
        late = "momentum_buffer" in plan.keys and state.get("momentum_buffer") is None
        if late and dampened and EMA in state:
            raise ValueError(
                f"{self._place(p)}: momentum={group['momentum']} after steps without, with dampening="
                f"{group['dampening']} and ema_decay: the count would begin anew, and the average with it; expected "
                "momentum from the first step on, or dampening=0"
            )
        begun = super()._begin_late(p, group, plan)
        if begun and dampened:  # only a first step is not dampened
            state[STEP].zero_()
        return begun
