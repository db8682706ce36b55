"""The options that every optimizer here has and torch's have not, said once for every signature and docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from typing_extensions import TypedDict

from .norm import check_norm
from .storage import StateDtype, check_state_dtype

EmaDecay = float | Callable[[float], float] | None


class Extras(TypedDict, total=False):
    """The options by name and type. What they mean is said in :data:`EXTRAS`."""

    state_dtype: StateDtype
    master_weights: str | None
    stochastic_rounding: bool
    seed: int
    max_grad_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    ema_decay: EmaDecay
    ema_dtype: StateDtype
    copy_to: Iterable[Tensor] | None
    fused_unscale: bool
    backend: str | None


DEFAULTS: dict[str, Any] = {
    "state_dtype": None,
    "master_weights": None,
    "stochastic_rounding": False,
    "seed": 0,
    "max_grad_norm": None,
    "norm_type": 2.0,
    "error_if_nonfinite": False,
    "ema_decay": None,
    "ema_dtype": None,
    "copy_to": None,
    "fused_unscale": True,
    "backend": None,
}
"""By name: what an option is where it is not given."""

GROUP_EXTRAS = ("state_dtype", "master_weights", "stochastic_rounding", "seed")
"""Those that a parameter group may have for itself."""

EXTRAS = """\
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
"""

Class = TypeVar("Class", bound=type)


def with_extras(cls: Class) -> Class:
    """Puts the options where ``help()`` and ``inspect.signature()`` look: in place of ``**extras`` in the signature of
    a class, and of ``{extras}`` in its docstring."""
    init: Any = cls.__init__  # type: ignore[misc]
    own = list(inspect.signature(init).parameters.values())
    assert own[-1].name == "extras"
    hints = {
        name: getattr(hint, "__forward_arg__", hint)
        for name, hint in Extras.__annotations__.items()
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    extras = [
        inspect.Parameter(name, kind, default=value, annotation=hints[name])
        for name, value in DEFAULTS.items()
    ]
    init.__signature__ = inspect.Signature([*own[:-1], *extras])
    if cls.__doc__:
        text = EXTRAS.rstrip().replace("\n", "\n        ")
        cls.__doc__ = cls.__doc__.replace("{extras}", text)
    return cls


class Options(NamedTuple):
    """What is set for an optimizer as a whole. Groups and checkpoints do not have it."""

    backend: str | None
    max_grad_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    ema_decay: EmaDecay
    ema_dtype: StateDtype
    fused_unscale: bool

    @classmethod
    def of(cls, extras: dict[str, Any]) -> Options:
        """Those among ``extras``, with plain numbers. Raises ValueError if one is out of range."""
        options = cls(*(extras[name] for name in cls._fields))
        max_norm = check_norm(options.max_grad_norm, options.norm_type)
        options = options._replace(max_grad_norm=max_norm, norm_type=float(options.norm_type))
        if options.error_if_nonfinite and options.max_grad_norm is None:
            raise ValueError(
                "error_if_nonfinite=True without max_grad_norm; expected both; max_grad_norm=float('inf') clips nothing"
            )
        check_state_dtype(options.ema_dtype, "ema_dtype")
        if options.ema_decay is None or callable(options.ema_decay):
            return options
        return options._replace(ema_decay=check_ema_decay(options.ema_decay))


def check_ema_decay(decay: Any) -> float:
    try:
        valid = bool(0.0 <= decay <= 1.0)
    except (TypeError, ValueError, RuntimeError):  # also of more than one number
        valid = False
    if not valid:
        raise ValueError(f"Invalid ema_decay value: {decay!r}; expected a number from 0 to 1")
    return float(decay)
