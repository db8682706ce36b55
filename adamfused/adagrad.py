"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from .base import check_lr, check_not_negative, numbers
from .optimizer import FusedOptimizer
from .options import Extras, with_extras
from .plan import Plan
from .shards import local
from .storage import STEP


@with_extras
class Adagrad(FusedOptimizer):
    r"""Adagrad, fused; a drop-in for :class:`torch.optim.Adagrad` with dense gradients.

    With gradient :math:`g`, :math:`t` counting the parameter's own steps, in the arithmetic of float32 (float64 for
    float64 parameters):

    .. math::
        g &\leftarrow \pm g + \lambda p \qquad (\text{sign by } \textit{maximize}) \\
        s &\leftarrow s + g^2 \\
        p &\leftarrow p - \frac{\gamma}{1 + (t-1)\eta} \cdot \frac{g}{\sqrt{s} + \epsilon}

    Duchi, Hazan & Singer 2011, Journal of Machine Learning Research 12. Torch makes the states with the optimizer,
    here they are made by the first step, or by :meth:`share_memory`.

    A sum that only grows stands still when it is rounded to nearest and 2^8 (bfloat16) or 2^11 (float16) times what is
    added; with such a ``state_dtype``, set ``stochastic_rounding``, with which it grows as it should on average.
    ``"int8"`` always rounds so.

    Args:
        params: parameters, ``(name, parameter)`` pairs or groups of either, as in ``torch.optim``. Any shape, stride
            and floating or complex dtype; gradients may have any other floating dtype and stride.
        lr: learning rate :math:`\gamma`, a number or a one-element tensor (kept on the device with ``capturable``).
        lr_decay: :math:`\eta`.
        weight_decay: :math:`\lambda`, coupled: added to the gradient.
        initial_accumulator_value: what the sums :math:`s` begin with.
        eps: :math:`\epsilon`, added to the denominator.
        foreach: accepted for drop-in use and ignored.
        maximize: climb instead of descend.
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
        >>> optimizer = adamfused.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.1)
        >>> model(torch.ones(4, 10)).mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.bias]["sum"]
        tensor([1.1000])
    """

    _group_defaults: ClassVar[dict[str, Any]] = {
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": None,
    }
    _known_states: ClassVar[tuple[str, ...]] = ("sum",)
    _own_options: ClassVar[tuple[str, ...]] = ("capturable",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **extras: Unpack[Extras],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, extras, capturable=(capturable, False))

    @staticmethod
    def _check_group(group: Mapping[str, Any]) -> None:
        check_lr(group["lr"])
        check_not_negative(group, "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    def _plan(self, group: dict[str, Any]) -> Plan:
        hyper = numbers(group, "lr_decay", "eps", "weight_decay", "maximize")
        return Plan("adagrad", ("sum",), hyper)

    def _begins_with(self, group: Mapping[str, Any], key: str) -> float:
        return float(group["initial_accumulator_value"]) if key == "sum" else 0.0

    def share_memory(self) -> None:
        """Puts the states into memory that processes share, as ``torch.optim.Adagrad`` does, for several that train
        one model without locks. Makes those that the first step would make. Each process counts its own steps."""
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state.get(p):
                    self.state[p] = self._new_state(p, group, self._full_plan(group))
                for key, state in self.state[p].items():
                    if key != STEP:
                        local(state).share_memory_()
