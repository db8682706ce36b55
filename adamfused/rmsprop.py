"""RMSprop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from .base import EmaDecay, Options, Plan, as_number, check_lr
from .optimizer import FusedOptimizer
from .storage import StateDtype


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
        state_dtype: the dtype of the states: ``None`` for at least float32 (torch.optim takes the parameter's dtype;
            with 16-bit parameters that loses small gradients), ``"param"`` for torch's choice, a floating dtype, or
            ``"int8"`` for codes of 8 bits with a scale for each 128 (float32 for complex parameters and for those with
            fewer than 4,096 elements).
        master_weights: of bfloat16 parameters, keep the bits that they round off: ``"split16"`` for the lower half of a
            float32 weight, with which they train as float32 parameters do, bit for bit; ``"split8"`` for 8 bits of it.
            ``"fp32"``, for float16 as well, keeps a whole float32 weight. It lies in ``state[p]["master"]``; see
            :func:`adamfused.fp32_weights`.
        stochastic_rounding: round 16-bit parameters without a master, and 16-bit states, at random: up or down, each
            as often as it is near.
        seed: of these random numbers and of those by which codes are rounded, from 0 to 2^64 - 1. They depend on it,
            on the parameter's place in the optimizer, on its step count and on an element's place, and on nothing else.
        max_grad_norm: clip by the global norm: gradients are multiplied, inside of the update, by what
            :func:`torch.nn.utils.clip_grad_norm_` would multiply them by. They are not rewritten. The norm is left in
            :attr:`grad_norm`.
        norm_type: 2.0, or ``float("inf")`` for the largest magnitude.
        error_if_nonfinite: raise, before anything moves, if the norm is infinite or NaN.
        ema_decay: keep an average of the weights, ``e = d * e + (1 - d) * p`` with ``d = ema_decay``, updated in the
            same pass from the new weights before they are rounded to the parameter's dtype; its first value is the
            first new weights. A number in [0, 1], or a function of the parameter's step count. It lies in
            ``state[p]["ema"]``; see :meth:`swap_ema` and :meth:`ema_state_dict`.
        ema_dtype: the dtype of the average: ``None`` for at least float32, ``"param"``, or a floating dtype.
        copy_to: as many tensors as parameters, in their order, of the same shapes and devices and any floating dtype
            (also in pinned memory): each receives the new weights, rounded once to its dtype, in the same pass.
        fused_unscale: leave unscaling by ``torch.amp.GradScaler`` to the step, which does not rewrite gradients and,
            if ``capturable``, does not wait for the device; ``False`` lets the scaler do it, as frameworks need that
            clip between the two.
        backend: ``"auto"``, ``"native"`` or ``"reference"``; ``None`` for what ``ADAMFUSED_BACKEND`` says.

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
        *,
        state_dtype: StateDtype = None,
        master_weights: str | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        ema_decay: EmaDecay = None,
        ema_dtype: StateDtype = None,
        copy_to: Iterable[Tensor] | None = None,
        fused_unscale: bool = True,
        backend: str | None = None,
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
        super().__init__(
            params,
            defaults,
            options=Options(
                backend=backend,
                max_grad_norm=max_grad_norm,
                norm_type=norm_type,
                error_if_nonfinite=error_if_nonfinite,
                ema_decay=ema_decay,
                ema_dtype=ema_dtype,
                fused_unscale=fused_unscale,
            ),
            copy_to=copy_to,
            state_dtype=(state_dtype, None),
            master_weights=(master_weights, None),
            stochastic_rounding=(stochastic_rounding, False),
            seed=(seed, 0),
        )

    @staticmethod
    def _check_group(group: Mapping[str, Any]) -> None:
        check_lr(group["lr"])
        if not 0.0 <= group["eps"]:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        if not 0.0 <= group["momentum"]:
            raise ValueError(f"Invalid momentum value: {group['momentum']}")
        if not 0.0 <= group["weight_decay"]:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
        if not 0.0 <= group["alpha"]:
            raise ValueError(f"Invalid alpha value: {group['alpha']}")

    def _plan(self, group: dict[str, Any]) -> Plan:
        hyper = [
            as_number(group["alpha"]),
            as_number(group["eps"]),
            as_number(group["weight_decay"]),
            as_number(group["momentum"]),
            float(group["maximize"]),
        ]
        rule, keys = "rmsprop", ["square_avg"]
        if group["centered"]:
            rule += "_centered"
        if group["momentum"] > 0:
            rule += "_momentum"
            keys.append("momentum_buffer")
        if group["centered"]:
            keys.append("grad_avg")
        return Plan(rule, tuple(keys), hyper)
