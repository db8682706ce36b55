"""Fused Adam, AdamW and RMSprop for PyTorch: the same bits on every CPU, thread count and GPU as the pure-Python
oracle, at the memory bandwidth."""

from .adam import Adam, AdamW
from .rmsprop import RMSprop

__version__ = "0.1.0"
__all__ = ["Adam", "AdamW", "RMSprop"]
