"""NAdam."""

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
class NAdam(FusedOptimizer):
    r"""NAdam, Adam with Nesterov's momentum, fused; a drop-in for :class:`torch.optim.NAdam`, which has no fused form.

    With gradient :math:`g`, :math:`t` counting the parameter's own steps, in the arithmetic of float32 (float64 for
    float64 parameters):

    .. math::
        g &\leftarrow \pm g + \lambda p \qquad (\text{sign by } \textit{maximize};\ \lambda p
            \text{ only if not decoupled}) \\
        m &\leftarrow m + (1-\beta_1)(g - m) \\
        v &\leftarrow v + (1-\beta_2)(g^2 - v) \\
        \mu_t &= \beta_1 \bigl(1 - \tfrac12\, 0.96^{\,t\psi}\bigr), \qquad \Pi_t = \Pi_{t-1}\, \mu_t \\
        p &\leftarrow p - \Bigl(\gamma\lambda p\,[\text{decoupled}] +
            \frac{\gamma \frac{1-\mu_t}{1-\Pi_t}\, g + \gamma \frac{\mu_{t+1}}{1-\Pi_t\mu_{t+1}}\, m}
                 {\sqrt{v} / \sqrt{1-\beta_2^t} + \epsilon}\Bigr)

    Dozat 2016, "Incorporating Nesterov momentum into Adam", ICLR workshop, with torch.optim's schedule of
    :math:`\mu`. The product :math:`\Pi` lies in ``state[p]["mu_product"]``.

    Args:
        params: parameters, ``(name, parameter)`` pairs or groups of either, as in ``torch.optim``. Any shape, stride
            and floating or complex dtype; gradients may have any other floating dtype and stride.
        lr: learning rate :math:`\gamma`, a number or a one-element tensor (kept on the device with ``capturable``).
        betas: decay rates :math:`\beta_1, \beta_2` of the averages of the gradient and of its square, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, coupled (added to the gradient) unless ``decoupled_weight_decay``.
        momentum_decay: :math:`\psi`.
        decoupled_weight_decay: shrink the weights directly, as AdamW does.
        foreach: accepted for drop-in use and ignored.
        maximize: climb instead of descend.
        capturable: keep the step count and the product on the parameter's device, so that CUDA graphs can capture the
            step.
        differentiable: must be ``False``.
        {extras}

    Raises:
        ValueError: for a hyper-parameter out of range, with torch.optim's words, and for a parameter that cannot have
            the formats of its group.

    Example:
        >>> import torch, adamfused
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = adamfused.NAdam(model.parameters(), lr=1e-3)
        >>> model(torch.ones(4, 10)).mean().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'mu_product', 'step']
    """

    _group_defaults: ClassVar[dict[str, Any]] = {
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "decoupled_weight_decay": False,
    }
    _known_states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    _carried: ClassVar[str | None] = "mu_product"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": plain_betas(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, extras)

    @staticmethod
    def _check_group(group: Mapping[str, Any]) -> None:
        check_lr(group["lr"])
        check_not_negative(group, "eps")
        check_betas(group["betas"])
        check_not_negative(group, "weight_decay", "momentum_decay")

    def _plan(self, group: dict[str, Any]) -> Plan:
        hyper = [
            *map(as_number, group["betas"]),
            *numbers(group, "eps", "weight_decay", "decoupled_weight_decay", "maximize"),
            0.96 ** as_number(group["momentum_decay"]),
        ]
        return Plan("nadam", ("exp_avg", "exp_avg_sq"), hyper, self._carried)
