"""The average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .base import BaseOptimizer
from .options import check_ema_decay
from .storage import EMA, MASTER, state_dtype_for, weight


class Averaging(BaseOptimizer):
    """Keeps a running average of the weights in ``state[p]["ema"]``."""

    _swapped = False  # averaged weights are in the place of the trained ones
    _averages_begun = False  # every parameter that has a state has an average

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._averages_begun = False

    def _ema_decay_at(self, t: float) -> float:
        decay = self._options.ema_decay
        if callable(decay):
            return check_ema_decay(decay(t))
        return 0.0 if decay is None else float(decay)

    def _new_average(self, p: Tensor, master: Tensor | None = None) -> Tensor:
        dtype = state_dtype_for(p, self._options.ema_dtype, EMA)
        average = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
        return average.copy_(weight(p, master))

    def _begin_averages(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of parameters whose states come from where there was no average, it begins with the weights as they are.
        Returns their states."""
        begun: list[dict[str, Any]] = []
        if self._options.ema_decay is None or self._averages_begun:
            return begun
        for group in groups:
            for p in group["params"]:
                state = self.state.get(p)
                if state and EMA not in state:
                    with torch.no_grad():
                        state[EMA] = self._new_average(p, state.get(MASTER))
                    begun.append(state)
        return begun

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Puts the averaged weights in the place of the trained ones, and the trained ones back at the end.

        They are put back also when the body raises. A parameter without an average (one that had no gradient yet)
        stays as it is. Takes as much more memory as the parameters while it lasts.

        Raises:
            RuntimeError: without ``ema_decay``, inside of itself, and for a ``step()`` inside of it.

        Example:
            >>> import torch, adamfused
            >>> weight = torch.nn.Parameter(torch.zeros(1))
            >>> optimizer = adamfused.AdamW([weight], lr=1.0, ema_decay=0.5, weight_decay=0)
            >>> for _ in range(2):
            ...     weight.grad = torch.ones(1)
            ...     optimizer.step()
            >>> with optimizer.swap_ema():
            ...     print(weight.item())
            -1.5
            >>> weight.item()
            -2.0
        """
        if self._options.ema_decay is None or self._swapped:
            problem = "is not for use inside of itself" if self._swapped else "needs ema_decay"
            raise RuntimeError(f"{type(self).__name__}.swap_ema() {problem}")
        averages = {
            p: self.state[p][EMA] for _, _, p in self._each() if EMA in self.state.get(p, ())
        }
        trained = {p: p.detach().clone() for p in averages}
        self._swapped = True
        try:
            with torch.no_grad():
                for p, average in averages.items():
                    p.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for p, before in trained.items():
                    p.copy_(before)
            self._swapped = False

    def ema_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """``model.state_dict()`` with the averages in the place of the parameters that this optimizer has.

        The averages keep their dtype, float32 or wider by default; what has no average is as it is in the model. As in
        ``model.state_dict()`` they are the tensors themselves, which the next step overwrites.

        Raises:
            RuntimeError: without ``ema_decay``.
            ValueError: if none of the model's parameters is this optimizer's.
        """
        if self._options.ema_decay is None:
            raise RuntimeError(f"{type(self).__name__}.ema_state_dict() needs ema_decay")
        ours = {id(p) for _, _, p in self._each()}
        named = list(model.named_parameters(remove_duplicate=False))
        if named and not any(id(p) in ours for _, p in named):
            raise ValueError(
                f"none of the {len(named)} parameters of the model is one of this optimizer; expected the model that "
                "it trains"
            )
        result: dict[str, Any] = model.state_dict()
        for name, p in named:
            if EMA in self.state.get(p, ()) and name in result:
                result[name] = self.state[p][EMA].detach()
        return result
