"""Lion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from .base import as_number, check_betas, check_lr, check_not_negative, numbers, plain_betas
from .optimizer import FusedOptimizer
from .options import Extras, with_extras
from .plan import Plan


@with_extras
class Lion(FusedOptimizer):
    r"""Lion, fused: the sign of a momentum, with half of Adam's states. torch.optim has none.

    With gradient :math:`g`, in the arithmetic of float32 (float64 for float64 parameters):

    .. math::
        c &= m + (1-\beta_1)(\pm g - m) \qquad (\text{sign by } \textit{maximize}) \\
        m &\leftarrow m + (1-\beta_2)(\pm g - m) \\
        p &\leftarrow p - (\gamma\lambda p + \gamma \operatorname{sign}(c))

    Chen et al. 2023 (arXiv:2302.06675), Algorithm 2. Each weight moves by the learning rate up or down (by nothing
    where :math:`c = 0`), so the paper takes a learning rate 3 to 10 times smaller than AdamW's, and a weight decay as
    many times larger. Where :math:`c` is NaN, so is the weight then: torch.sign makes 0 of it.

    Args:
        params: parameters, ``(name, parameter)`` pairs or groups of either, as in ``torch.optim``. Any shape, stride
            and floating or complex dtype (of complex ones both parts have a sign); gradients may have any other
            floating dtype and stride.
        lr: learning rate :math:`\gamma`, a number or a one-element tensor (kept on the device with ``capturable``).
        betas: :math:`\beta_1`, by which the step is mixed, and :math:`\beta_2`, the decay rate of the momentum, in
            [0, 1).
        weight_decay: :math:`\lambda`, decoupled: the weights shrink by ``lr * weight_decay`` of themselves.
        maximize: climb instead of descend.
        foreach: accepted for drop-in use in the place of AdamW and ignored.
        capturable: keep the step count on the parameter's device, so that CUDA graphs can capture the step.
        fused: accepted for drop-in use in the place of AdamW and ignored: every step is fused.
        {extras}

    Raises:
        ValueError: for a hyper-parameter out of range, and for a parameter that cannot have the formats of its group.

    Example:
        >>> import torch, adamfused
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = adamfused.Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
        >>> model(torch.ones(4, 10)).mean().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'step']
    """

    _group_defaults: ClassVar[dict[str, Any]] = {
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "fused": None,
    }
    _known_states: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": plain_betas(betas),
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "fused": fused,
        }
        super().__init__(params, defaults, extras)

    @staticmethod
    def _check_group(group: Mapping[str, Any]) -> None:
        check_lr(group["lr"])
        check_betas(group["betas"])
        check_not_negative(group, "weight_decay")

    def _plan(self, group: dict[str, Any]) -> Plan:
        hyper = [*map(as_number, group["betas"]), *numbers(group, "weight_decay", "maximize")]
        return Plan("lion", ("exp_avg",), hyper)
