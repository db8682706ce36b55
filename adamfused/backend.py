"""Which path moves the parameters, and why.

``ADAMFUSED_BACKEND`` is ``auto`` (the default: native where it can be had, else the reference), ``native`` or
``reference``; the optimizers' ``backend=`` argument means the same and wins. ``ADAMFUSED_ISA`` forces the CPU
kernels' instruction set: ``scalar``, ``avx2`` or ``avx512``. A forced choice that cannot be had is an error.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

CHOICES = ("auto", "native", "reference")
REBUILD = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps adamfused"

_C: ModuleType | None = None
NATIVE_ERROR: str | None = None
"""Why the native kernels are not loaded, in one line; ``None`` when they are."""


BUILT: dict[str, Any] = {}
"""What the build noted of itself: the torch, CUDA, architectures and instruction sets that it was made for."""


def _load() -> tuple[ModuleType | None, str | None]:
    facts_file = Path(__file__).with_name("_build.json")
    try:
        facts = json.loads(facts_file.read_text()) if facts_file.exists() else {}
    except (OSError, ValueError) as error:
        return None, f"{facts_file.name} cannot be read: {error}"
    BUILT.update(facts)
    if "error" in facts:
        return None, f"building them failed: {facts['error']}"
    built_for = facts.get("torch")
    if built_for is not None and _minor(built_for) != _minor(torch.__version__):
        return None, f"they were built for torch {built_for}, this is torch {torch.__version__}"
    try:
        from . import _C
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error):
            return None, "this is a pure-Python install (no compiled extension)"
        return None, f"the extension does not load: {error}"
    return _C, None


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


_C, NATIVE_ERROR = _load()
_warned: set[str] = set()
_isa_set: str | None = None


def native() -> ModuleType | None:
    """The extension with the instruction set of ``ADAMFUSED_ISA``, or ``None`` if it is not loaded.

    Raises:
        ValueError: if ``ADAMFUSED_ISA`` names one that does not exist or that this processor does not have.
    """
    global _isa_set
    if _C is None:
        return None
    wanted = os.environ.get("ADAMFUSED_ISA", "")
    if wanted and wanted != _isa_set:
        try:
            _C.set_isa(wanted)
        except RuntimeError as error:
            raise ValueError(f"ADAMFUSED_ISA={wanted}: {error}") from None
        _isa_set = wanted
    return _C


def choose(argument: str | None) -> str:
    """The choice in force, from the ``backend=`` argument or else ``ADAMFUSED_BACKEND``.

    Raises:
        ValueError: if it is none of ``auto``, ``native``, ``reference``.
        RuntimeError: if it is ``native`` and the extension is not loaded.
    """
    if argument is None:
        choice, said = os.environ.get("ADAMFUSED_BACKEND") or "auto", "ADAMFUSED_BACKEND"
    else:
        choice, said = argument, "backend"
    if choice not in CHOICES:
        raise ValueError(f"{said} must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "native" and _C is None:
        raise RuntimeError(
            f"{said}='native' was asked for, but the native kernels cannot be had: {NATIVE_ERROR}. "
            f"Rebuild with: {REBUILD}; or use {said}='auto'"
        )
    if choice == "auto" and _C is None:
        warn_once(f"the native kernels cannot be had: {NATIVE_ERROR}. Rebuild with: {REBUILD}")
        return "reference"
    return choice


def chosen(argument: str | None) -> tuple[str, ModuleType | None]:
    """The choice in force and, unless that is the reference, the extension."""
    choice = choose(argument)
    return choice, native() if choice != "reference" else None


def warn_once(reason: str) -> None:
    """Says, once per reason and process, that the slower path runs."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"adamfused uses its pure-Python path, which is exact but slow: {reason}",
            UserWarning,
            stacklevel=2,
        )


def why_not_native(device: torch.device) -> str | None:
    """Why the native kernels do not run on a device, or ``None`` if they do."""
    if _C is None:
        return NATIVE_ERROR
    if device.type == "cpu" or (device.type == "cuda" and _C.with_cuda):
        return None
    if device.type == "cuda":
        return "they were built without CUDA (set ADAMFUSED_BUILD=cuda when building)"
    return f"there are none for device type '{device.type}'"


def rule_number(native: ModuleType, name: str) -> int:
    """The number by which the extension knows a rule."""
    if not _rule_numbers:
        _rule_numbers.update({rule: i for i, rule in enumerate(native.rules())})
    return _rule_numbers[name]


_rule_numbers: dict[str, int] = {}
