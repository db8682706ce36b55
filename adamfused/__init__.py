"""Fused Adam, AdamW, RMSprop, SGD, Adagrad, Adadelta, NAdam, RAdam and Lion for PyTorch: the same bits on every CPU,
thread count and GPU as the pure-Python oracle, at the memory bandwidth."""

import importlib
from typing import Any

from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .backward import step_in_backward
from .clip import grad_norm
from .lion import Lion
from .master import fp32_weights, load_fp32_weights
from .nadam import NAdam
from .radam import RAdam
from .rmsprop import RMSprop
from .sgd import SGD

__version__ = "0.1.0"
__all__ = [
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "SGD",
    "fp32_weights",
    "grad_norm",
    "load_fp32_weights",
    "step_in_backward",
]


def __getattr__(name: str) -> Any:
    """The tools are imported when they are first used: training scripts need not wait for them."""
    if name in ("bench", "info", "parity"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
