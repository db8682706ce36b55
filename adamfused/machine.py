"""What a figure holds for: the machine and the software that it was measured with."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
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


def others_running(seconds: float = 0.3) -> float:
    """How many threads of other work want a processor, on average over a moment; 0 where nothing tells.

    Not the load average, which still has what this process did a minute ago.
    """
    counts = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
        try:
            running = Path("/proc/loadavg").read_text().split()[3]
        except (OSError, IndexError):
            return 0.0
        counts.append(int(running.partition("/")[0]) - 1)  # less this one
    return max(0.0, sum(counts) / len(counts))


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
