"""What a figure holds for: the machine and the software that it was measured with."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import adamfused
from adamfused import backend


def cpu_model() -> str:
    """The processor's own name for itself, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpus() -> list[str]:
    """The names of the CUDA devices that torch sees."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def facts() -> dict[str, Any]:
    """Everything that makes a figure repeatable, as JSON takes it: date (UTC), command, machine and versions."""
    native = backend.native()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu": cpu_model(),
        "gpus": gpus(),
        "isa": native.isa() if native is not None else f"none: {backend.NATIVE_ERROR}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "adamfused": adamfused.__version__,
    }
