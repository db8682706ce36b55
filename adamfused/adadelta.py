"""Adadelta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from .base import check_lr, check_not_negative, numbers
from .optimizer import FusedOptimizer
from .options import Extras, with_extras
from .plan import Plan


@with_extras
class Adadelta(FusedOptimizer):
    r"""Adadelta, fused; a drop-in for :class:`torch.optim.Adadelta`, which has no fused form.

    With gradient :math:`g`, in the arithmetic of float32 (float64 for float64 parameters):

    .. math::
        g &\leftarrow \pm g + \lambda p \qquad (\text{sign by } \textit{maximize}) \\
        v &\leftarrow v + (1-\rho)(g^2 - v) \\
        d &= \frac{\sqrt{u + \epsilon}}{\sqrt{v + \epsilon}} \, g \\
        u &\leftarrow u + (1-\rho)(d^2 - u) \\
        p &\leftarrow p - \gamma d

    Zeiler 2012 (arXiv:1212.5701), Algorithm 1, which has :math:`\gamma = 1`.

    Args:
        params: parameters, ``(name, parameter)`` pairs or groups of either, as in ``torch.optim``. Any shape, stride
            and floating or complex dtype; gradients may have any other floating dtype and stride.
        lr: :math:`\gamma`, a number or a one-element tensor (kept on the device with ``capturable``).
        rho: decay rate of the averages of the squared gradient and of the squared step, in [0, 1].
        eps: :math:`\epsilon`, added under both roots.
        weight_decay: :math:`\lambda`, coupled: added to the gradient.
        foreach: accepted for drop-in use and ignored.
        capturable: keep the step count on the parameter's device, so that CUDA graphs can capture the step.
        maximize: climb instead of descend.
        differentiable: must be ``False``.
        {extras}

    Raises:
        ValueError: for a hyper-parameter out of range, with torch.optim's words, and for a parameter that cannot have
            the formats of its group.

    Example:
        >>> import torch, adamfused
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = adamfused.Adadelta(model.parameters())
        >>> model(torch.ones(4, 10)).mean().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['acc_delta', 'square_avg', 'step']
    """

    _group_defaults: ClassVar[dict[str, Any]] = {
        "foreach": None,
        "maximize": False,
        "differentiable": False,
        "capturable": False,
    }
    _known_states: ClassVar[tuple[str, ...]] = ("square_avg", "acc_delta")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, extras)

    @staticmethod
    def _check_group(group: Mapping[str, Any]) -> None:
        check_lr(group["lr"])
        if not 0.0 <= group["rho"] <= 1.0:
            raise ValueError(f"Invalid rho value: {group['rho']}")
        check_not_negative(group, "eps", "weight_decay")

    def _plan(self, group: dict[str, Any]) -> Plan:
        hyper = numbers(group, "rho", "eps", "weight_decay", "maximize")
        return Plan("adadelta", ("square_avg", "acc_delta"), hyper)
