"""How much memory a call needs beyond what it leaves behind."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise LookupError(f"/proc/self/status has no {field}")


def peak_bytes(call: Callable[[], object]) -> int:
    """By how much the process's resident memory rises above its start, at the most, during a call.

    Linux keeps the peak (VmHWM) and sets it back when 5 is written to clear_refs. What malloc has
    kept of earlier calls is given back first; else the call could use it again without a rise.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)
