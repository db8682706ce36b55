"""What multiplies the gradients: unscaling and clipping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import backend
from .base import BaseOptimizer, check_is_ours
from .norm import check_norm, coefficient, total_norm


class Clipping(BaseOptimizer):
    """Unscales and clips inside of the step. Gradients are not rewritten."""

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients at the last step, before clipping and unscaled. 0-dim, float32 (float64 if the
        first parameter is), on the parameters' device. ``None`` before the first step and without
        ``max_grad_norm``."""
        return self._results.get("grad_norm")

    @property
    def max_grad_norm(self) -> float | None:
        """The norm above which gradients are clipped; may be set at any time."""
        return self._options.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        checked = check_norm(value, self._options.norm_type)
        self._options = self._options._replace(max_grad_norm=checked)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``torch.amp.GradScaler`` leaves unscaling to the step."""
        return self._options.fused_unscale

    def compute_grad_norm(self) -> Tensor:
        """The norm of all gradients as they are now, of ``norm_type``: a 0-dim tensor as in :attr:`grad_norm`.

        Of gradients that a ``GradScaler`` has not unscaled yet, it is that of the scaled ones. Sharded gradients
        (DTensor) count whole; every rank has to call this.

        Example:
            >>> import torch, adamfused
            >>> weight = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = adamfused.AdamW([weight])
            >>> weight.grad = torch.tensor([3.0, 4.0])
            >>> optimizer.compute_grad_norm()
            tensor(5.)
        """
        return self._norm(self.param_groups, backend.chosen(self._options.backend)[1]).to(
            self._norm_dtype()
        )

    def _norm(self, groups: Sequence[dict[str, Any]], native: Any) -> Tensor:
        params = [p for group in groups for p in group["params"]]
        return total_norm(params, self._options.norm_type, native, self._place)

    def _norm_dtype(self) -> torch.dtype:
        first = next((p for _, _, p in self._each()), None)
        is_double = isinstance(first, Tensor) and first.dtype in (torch.float64, torch.complex128)
        return torch.float64 if is_double else torch.float32

    def _gradient_factor(
        self, groups: Sequence[dict[str, Any]], native: Any, grad_norm: Tensor | None
    ) -> Tensor | None:
        """What gradients are multiplied by, float64 and 0-dim; None for 1."""
        scale = getattr(self, "grad_scale", None)  # set by GradScaler
        max_norm = self._options.max_grad_norm
        if max_norm is None:
            return None if scale is None else 1.0 / scale.double().reshape(())
        if grad_norm is None:
            total = self._norm(groups, native)
        else:
            total = check_given(grad_norm)
        if scale is None:
            factor = coefficient(total, max_norm)
        else:
            unscale = 1.0 / scale.double().reshape(()).to(total.device)
            total = total * unscale
            factor = coefficient(total, max_norm) * unscale
        self._results["grad_norm"] = total.to(self._norm_dtype())
        if self._options.error_if_nonfinite and not bool(total.isfinite()):
            found_inf = getattr(self, "found_inf", None)
            if found_inf is None or not bool(found_inf):
                raise RuntimeError(
                    f"The total norm of order {self._options.norm_type} for gradients is non-finite "
                    f"({float(total)}), so it cannot be clipped; look for the cause, or use error_if_nonfinite=False"
                )
        return factor

    def _found_inf(self, groups: Sequence[dict[str, Any]]) -> Tensor | Literal[True] | None:
        """Whether a GradScaler found an overflow: known here, or (capturable) only by a tensor on the device."""
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):
            return True if found_inf else None
        on_device = found_inf.device.type != "cpu" and all(
            group.get("capturable", False) and all(p.device.type != "cpu" for p in group["params"])
            for group in groups
        )
        return found_inf.float().reshape(()) if on_device else (True if found_inf else None)


def check_given(grad_norm: Any) -> Tensor:
    """The norm that was given to a step, float64 and 0-dim; that of a DTensor is the norm of the whole."""
    whole = getattr(grad_norm, "full_tensor", None)
    total = torch.as_tensor(whole() if whole is not None else grad_norm).detach()
    if total.numel() != 1:
        raise ValueError(
            f"grad_norm has shape {tuple(total.shape)}; expected one number, as from adamfused.grad_norm"
        )
    return total.double().reshape(())


def grad_norm(optimizers: Iterable[Clipping]) -> Tensor:
    """The norm of the gradients of all parameters of several optimizers: a 0-dim float64 tensor.

    For several optimizers that clip by one norm: each takes it as ``step(grad_norm=...)``, and together they move as
    one optimizer with all parameters would, bit for bit. Of gradients that a ``GradScaler`` has not unscaled yet, it is
    that of the scaled ones, and so is what ``step`` takes. A parameter that several have counts once.

    Raises:
        TypeError: if one of them is not of adamfused.
        ValueError: if there is no optimizer, or if they have different ``norm_type``.

    Example:
        >>> import torch, adamfused
        >>> embedding, matrix = torch.nn.Embedding(3, 1), torch.nn.Linear(1, 1)
        >>> optimizers = [
        ...     adamfused.AdamW(embedding.parameters(), max_grad_norm=1.0),
        ...     adamfused.RMSprop(matrix.parameters(), max_grad_norm=1.0),
        ... ]
        >>> matrix(embedding(torch.tensor([2]))).sum().backward()
        >>> norm = adamfused.grad_norm(optimizers)
        >>> for optimizer in optimizers:
        ...     optimizer.step(grad_norm=norm)
    """
    every = list(optimizers)
    for i, optimizer in enumerate(every):
        check_is_ours(f"grad_norm: optimizers[{i}]", optimizer)
    kinds = {optimizer._options.norm_type for optimizer in every}
    if len(kinds) != 1:
        raise ValueError(
            f"grad_norm() got {len(every)} optimizers with norm_type {sorted(kinds)}; expected at least one, and the "
            "same norm_type in all"
        )
    _, native = backend.chosen(every[0]._options.backend)
    place_of = {id(p): optimizer._place for optimizer in every for _, _, p in optimizer._each()}
    params = {id(p): p for optimizer in every for _, _, p in optimizer._each()}
    return total_norm(list(params.values()), kinds.pop(), native, lambda p: place_of[id(p)](p))
