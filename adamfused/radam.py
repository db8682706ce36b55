"""RAdam."""

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
class RAdam(FusedOptimizer):
    r"""RAdam, Adam with a rectified start, fused; a drop-in for :class:`torch.optim.RAdam`, which has no fused form.

    With gradient :math:`g`, :math:`t` counting the parameter's own steps, in the arithmetic of float32 (float64 for
    float64 parameters):

    .. math::
        g &\leftarrow \pm g + \lambda p \qquad (\text{sign by } \textit{maximize};\ \lambda p
            \text{ only if not decoupled}) \\
        m &\leftarrow m + (1-\beta_1)(g - m) \\
        v &\leftarrow v + (1-\beta_2)(g^2 - v) \\
        \rho_\infty &= \frac{2}{1-\beta_2} - 1, \qquad \rho_t = \rho_\infty - \frac{2t\beta_2^t}{1-\beta_2^t} \\
        x &= \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}}
            \sqrt{1-\beta_2^t} \; \frac{m}{\sqrt{v} + \epsilon} \qquad (\text{if } \rho_t > 5;
            \text{ else } x = m) \\
        p &\leftarrow p - \Bigl(\gamma\lambda p\,[\text{decoupled}] + \frac{\gamma}{1-\beta_1^t}\, x\Bigr)

    Liu et al. 2020 (arXiv:1908.03265), Algorithm 2, with the bound 5 and the place of :math:`\epsilon` that
    torch.optim has.

    Args:
        params: parameters, ``(name, parameter)`` pairs or groups of either, as in ``torch.optim``. Any shape, stride
            and floating or complex dtype; gradients may have any other floating dtype and stride.
        lr: learning rate :math:`\gamma`, a number or a one-element tensor (kept on the device with ``capturable``).
        betas: decay rates :math:`\beta_1, \beta_2` of the averages of the gradient and of its square, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, coupled (added to the gradient) unless ``decoupled_weight_decay``.
        decoupled_weight_decay: shrink the weights directly, as AdamW does.
        foreach: accepted for drop-in use and ignored.
        maximize: climb instead of descend.
        capturable: keep the step count on the parameter's device, so that CUDA graphs can capture the step.
        differentiable: must be ``False``.
        {extras}

    Raises:
        ValueError: for a hyper-parameter out of range, with torch.optim's words, and for a parameter that cannot have
            the formats of its group.

    Example:
        >>> import torch, adamfused
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = adamfused.RAdam(model.parameters(), lr=1e-3)
        >>> model(torch.ones(4, 10)).mean().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    _group_defaults: ClassVar[dict[str, Any]] = {
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "decoupled_weight_decay": False,
    }
    _known_states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
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
        check_not_negative(group, "weight_decay")

    def _plan(self, group: dict[str, Any]) -> Plan:
        hyper = [
            *map(as_number, group["betas"]),
            *numbers(group, "eps", "weight_decay", "decoupled_weight_decay", "maximize"),
        ]
        return Plan("radam", ("exp_avg", "exp_avg_sq"), hyper)
