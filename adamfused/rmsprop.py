"""RMSprop."""

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
class RMSprop(FusedOptimizer):
    r"""RMSprop, fused; a drop-in for :class:`torch.optim.RMSprop`, which has no fused form.

    With gradient :math:`g`, in the arithmetic of float32 (float64 for float64 parameters):

    .. math::
        g &\leftarrow \pm g + \lambda p \qquad (\text{sign by } \textit{maximize}) \\
        v &\leftarrow v + (1-\alpha)(g^2 - v) \\
        a &\leftarrow a + (1-\alpha)(g - a) \qquad (\text{only if centered}) \\
        x &= g \,/\, (\sqrt{\max(v - a^2, 0)} + \epsilon) \\
        b &\leftarrow \mu b + x \qquad (\text{only with momentum; then } x = b) \\
        p &\leftarrow p - \gamma x

    Tieleman & Hinton 2012, lecture 6.5; centered: Graves 2013 (arXiv:1308.0850). Where ``v - a^2`` is negative by
    rounding, as with gradients that hardly change, torch.optim takes its root and gets NaN; here it counts as 0.

    Args:
        params: parameters, ``(name, parameter)`` pairs or groups of either, as in ``torch.optim``. Any shape, stride
            and floating or complex dtype; gradients may have any other floating dtype and stride.
        lr: learning rate :math:`\gamma`, a number or a one-element tensor (kept on the device with ``capturable``).
        alpha: decay rate of the average of the squared gradient.
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, coupled: added to the gradient.
        momentum: :math:`\mu`; 0 keeps no buffer.
        centered: divide by the spread of the gradient instead of its size.
        capturable: keep the step count on the parameter's device, so that CUDA graphs can capture the step.
        foreach: accepted for drop-in use and ignored.
        maximize: climb instead of descend.
        differentiable: must be ``False``.
        {extras}

    Raises:
        ValueError: for a hyper-parameter out of range, with torch.optim's words, and for a parameter that cannot have
            the formats of its group.

    Example:
        >>> import torch, adamfused
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = adamfused.RMSprop(model.parameters(), lr=1e-2, momentum=0.9, centered=True)
        >>> model(torch.ones(4, 10)).mean().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['grad_avg', 'momentum_buffer', 'square_avg', 'step']
    """

    _group_defaults: ClassVar[dict[str, Any]] = {
        "momentum": 0,
        "centered": False,
        "capturable": False,
        "foreach": None,
        "maximize": False,
        "differentiable": False,
    }
    _known_states: ClassVar[tuple[str, ...]] = ("square_avg", "momentum_buffer", "grad_avg")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, extras)

    @staticmethod
    def _check_group(group: Mapping[str, Any]) -> None:
        check_lr(group["lr"])
        check_not_negative(group, "eps", "momentum", "weight_decay", "alpha")

    def _plan(self, group: dict[str, Any]) -> Plan:
        hyper = numbers(group, "alpha", "eps", "weight_decay", "momentum", "maximize")
        rule, keys = "rmsprop", ["square_avg"]
        if group["centered"]:
            rule += "_centered"
        if group["momentum"] > 0:
            rule += "_momentum"
            keys.append("momentum_buffer")
        if group["centered"]:
            keys.append("grad_avg")
        return Plan(rule, tuple(keys), hyper)
