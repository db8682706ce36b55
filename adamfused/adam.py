"""Adam and AdamW."""

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
class Adam(FusedOptimizer):
    r"""Adam, fused; a drop-in for :class:`torch.optim.Adam`.

    With gradient :math:`g`, :math:`t` counting the parameter's own steps, in the arithmetic of float32 (float64 for
    float64 parameters):

    .. math::
        g &\leftarrow \pm g + \lambda p \qquad (\text{sign by } \textit{maximize};\ \lambda p
            \text{ only if not decoupled}) \\
        m &\leftarrow m + (1-\beta_1)(g - m) \\
        v &\leftarrow v + (1-\beta_2)(g^2 - v) \\
        p &\leftarrow p - \Bigl(\gamma\lambda p\,[\text{decoupled}] +
            \frac{\gamma}{1-\beta_1^t} \cdot \frac{m}{\sqrt{v} / \sqrt{1-\beta_2^t} + \epsilon}\Bigr)

    These are Algorithm 1 of Kingma & Ba (2015, arXiv:1412.6980) and, decoupled, Algorithm 2 of Loshchilov & Hutter
    (2019, arXiv:1711.05101), written so that rounding does not drift: averages move by a rounded :math:`1-\beta`,
    not by a rounded :math:`\beta`.

    Args:
        params: parameters, ``(name, parameter)`` pairs or groups of either, as in ``torch.optim``. Any shape, stride
            and floating or complex dtype; gradients may have any other floating dtype and stride.
        lr: learning rate :math:`\gamma`, a number or a one-element tensor (kept on the device with ``capturable``).
        betas: decay rates :math:`\beta_1, \beta_2` of the averages of the gradient and of its square, in [0, 1).
        eps: :math:`\epsilon`, added to the denominator.
        weight_decay: :math:`\lambda`, coupled (added to the gradient) unless ``decoupled_weight_decay``.
        amsgrad: divide by the largest :math:`v` so far (Reddi et al. 2018, arXiv:1904.09237).
        foreach: accepted for drop-in use and ignored.
        maximize: climb instead of descend.
        capturable: keep the step count on the parameter's device, so that CUDA graphs can capture the step.
        differentiable: must be ``False``.
        fused: accepted for drop-in use and ignored: every step is fused.
        decoupled_weight_decay: shrink the weights directly, as AdamW does.
        bias_correction: ``False`` leaves out both :math:`1-\beta^t`.
        {extras}

    Raises:
        ValueError: for a hyper-parameter out of range, with torch.optim's words, and for a parameter that cannot have
            the formats of its group.

    Example:
        >>> import torch, adamfused
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = adamfused.Adam(model.parameters(), lr=1e-3)
        >>> model(torch.ones(4, 10)).mean().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    _group_defaults: ClassVar[dict[str, Any]] = {
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": False,
    }
    _known_states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _own_options: ClassVar[tuple[str, ...]] = ("bias_correction",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        bias_correction: bool = True,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": plain_betas(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(
            params,
            defaults,
            extras,
            bias_correction=(bias_correction, True),
        )

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
            float(group.get("bias_correction", True)),
        ]
        if group["amsgrad"]:
            return Plan("amsgrad", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), hyper)
        return Plan("adam", ("exp_avg", "exp_avg_sq"), hyper)


@with_extras
class AdamW(Adam):
    """AdamW, fused; a drop-in for :class:`torch.optim.AdamW`.

    :class:`Adam` with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101): the weights shrink by
    ``lr * weight_decay`` of themselves each step. Decay and update are added in float32 and rounded together, so that
    a small decay is not lost in bfloat16 parameters. Arguments and errors are those of :class:`Adam`.

    Example:
        >>> import torch, adamfused
        >>> model = torch.nn.Linear(10, 1).bfloat16()
        >>> optimizer = adamfused.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> model(torch.ones(4, 10).bfloat16()).mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg"].dtype
        torch.float32
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        bias_correction: bool = True,
        **extras: Unpack[Extras],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            bias_correction=bias_correction,
            **extras,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
