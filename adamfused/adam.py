"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from .base import EmaDecay, Options, Plan, as_number, check_lr
from .optimizer import FusedOptimizer
from .storage import StateDtype


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
        state_dtype: the dtype of the moments: ``None`` for at least float32 (torch.optim takes the parameter's dtype;
            with 16-bit parameters that loses small gradients), ``"param"`` for torch's choice, a floating dtype, or
            ``"int8"`` for codes of 8 bits with a scale for each 128 (float32 for complex parameters and for those with
            fewer than 4,096 elements).
        master_weights: of bfloat16 parameters, keep the bits that they round off: ``"split16"`` for the lower half of a
            float32 weight, with which they train as float32 parameters do, bit for bit; ``"split8"`` for 8 bits of it.
            ``"fp32"``, for float16 as well, keeps a whole float32 weight. It lies in ``state[p]["master"]``; see
            :func:`adamfused.fp32_weights`.
        stochastic_rounding: round 16-bit parameters without a master, and 16-bit moments, at random: up or down, each
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
            "betas": tuple(
                as_number(b) if isinstance(b, Tensor) and b.numel() == 1 else b for b in betas
            ),
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
            bias_correction=(bias_correction, True),
        )

    @staticmethod
    def _check_group(group: Mapping[str, Any]) -> None:
        check_lr(group["lr"])
        if not 0.0 <= group["eps"]:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        for i, beta in enumerate(group["betas"]):
            if isinstance(beta, Tensor) and beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not 0.0 <= group["weight_decay"]:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")

    def _plan(self, group: dict[str, Any]) -> Plan:
        beta1, beta2 = group["betas"]
        hyper = [
            as_number(beta1),
            as_number(beta2),
            as_number(group["eps"]),
            as_number(group["weight_decay"]),
            float(group["decoupled_weight_decay"]),
            float(group["maximize"]),
            float(group.get("bias_correction", True)),
        ]
        if group["amsgrad"]:
            return Plan("amsgrad", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), hyper)
        return Plan("adam", ("exp_avg", "exp_avg_sq"), hyper)


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
            state_dtype=state_dtype,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            max_grad_norm=max_grad_norm,
            norm_type=norm_type,
            error_if_nonfinite=error_if_nonfinite,
            ema_decay=ema_decay,
            ema_dtype=ema_dtype,
            copy_to=copy_to,
            fused_unscale=fused_unscale,
            backend=backend,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
