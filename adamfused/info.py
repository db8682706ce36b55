"""``python -m adamfused info``: what is installed, what will run where, and whether it gives the right bits."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch

import adamfused

from . import backend, machine
from .report import Column, Table, show

HELP = "say what is installed, which backend runs where and why, and test one step of each"
VARIABLES = ("ADAMFUSED_BACKEND", "ADAMFUSED_ISA", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
OPTIMIZERS = tuple(name for name in adamfused.__all__ if isinstance(getattr(adamfused, name), type))
DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.complex64, torch.complex128),
)


@dataclass(frozen=True)
class Use:
    """What moves the parameters of one device and dtype in one optimizer.

    Attributes:
        device, dtype, optimizer: which.
        backend: ``"native"`` or ``"reference"``.
        reason: why it is not the native one; empty if it is.
        test: ``"PASS"`` if one step gave the reference's bits, else ``"FAIL ..."`` with what went wrong.
    """

    device: str
    dtype: str
    optimizer: str
    backend: str
    reason: str
    test: str


@dataclass
class Info:
    """What :func:`info` found.

    Attributes:
        facts: machine and versions, see :func:`adamfused.machine.facts`.
        built: what the extension was built for, as the build noted it; empty for pure Python.
        isas: every instruction set that was compiled, by name, and whether this processor has it.
        variables: the environment variables that are set, of those that matter here.
        uses: what moves what.
        problem: why a backend or instruction set that was forced cannot be had; empty if all is well.
    """

    facts: dict[str, Any]
    built: dict[str, Any]
    isas: dict[str, bool]
    variables: dict[str, str]
    uses: list[Use] = field(default_factory=list)
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Nothing that was forced is missing, and every test passed."""
        return not self.problem and all(use.test == "PASS" for use in self.uses)


def info() -> Info:
    """Looks at the installation and makes one step of every optimizer, device and dtype.

    Example:
        >>> import adamfused
        >>> adamfused.info().ok
        True
    """
    problem = ""
    try:
        backend.choose(None)
        backend.native()
    except (RuntimeError, ValueError) as error:
        problem = str(error)
    found = Info(
        {} if problem else machine.facts(),
        backend.BUILT,
        dict(backend._C.isas()) if backend._C else {},
        {name: os.environ[name] for name in VARIABLES if name in os.environ},
        problem=problem,
    )
    if not problem:
        found.uses = list(_uses())
    return found


def _uses() -> Iterator[Use]:
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    forced = backend.choose(None) == "reference"
    for device in devices:
        why = backend.why_not_native(torch.device(device))
        reason = why or ("ADAMFUSED_BACKEND=reference" if forced else "")
        for optimizer in OPTIMIZERS:
            for dtype in DTYPES:
                name = "reference" if reason else "native"
                test = _one_step(optimizer, device, dtype, name)
                kind = str(dtype).removeprefix("torch.")
                yield Use(device, kind, optimizer, name, reason, test)


def _one_step(optimizer: str, device: str, dtype: torch.dtype, chosen: str) -> str:
    """Whether a step has the reference's bits. 1,025 elements: whole tiles and a tail.

    With a large learning rate, because Adadelta's first step would not move a bfloat16."""
    start, grad = (torch.sin(k * torch.arange(1.0, 1026.0)).to(dtype) for k in (1, 2))
    results = []
    try:
        for place, name in ((device, chosen), ("cpu", "reference")):
            p = start.clone().to(place).requires_grad_()
            p.grad = grad.to(place)
            getattr(adamfused, optimizer)([p], lr=10.0, weight_decay=0.01, backend=name).step()
            results.append(p.detach().cpu())
    except Exception as error:
        return f"FAIL {type(error).__name__}: {error}"
    wrong = int((results[0] != results[1]).sum())
    if wrong:
        return f"FAIL {wrong:,} of {len(start):,} results differ"
    return "PASS" if (results[1] != start).all() else "FAIL not all parameters moved"


# ---- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 if a forced backend cannot be had or a test failed."""
    found = info()
    if args.json:
        print(json.dumps(asdict(found) | {"ok": found.ok}, indent=1))
        return 0 if found.ok else 1
    for name, text in lines(found).items():
        print(f"{name + ':':<13}{text}")
    print()
    if found.problem:
        print(f"error: {found.problem}", file=sys.stderr)
    else:
        show(table(found))
    return 0 if found.ok else 1


def lines(found: Info) -> dict[str, str]:
    """The part above the table: a line each."""
    built, facts = found.built, found.facts
    chosen = facts.get("isa", "")
    isas = [
        name + (" (chosen)" if name == chosen else "" if here else " (not on this processor)")
        for name, here in found.isas.items()
    ]
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ", without CUDA"
    kernels = f"none: {backend.NATIVE_ERROR}" if backend.NATIVE_ERROR else "yes"
    if built and not backend.NATIVE_ERROR:
        kernels = f"for torch {built.get('torch')}, " + (
            f"CUDA {built['cuda']} for {', '.join(built['cuda_archs'])}"
            if built.get("cuda")
            else "without CUDA"
        )
    set_here = ", ".join(f"{k}={v}" for k, v in found.variables.items())
    return {
        "adamfused": adamfused.__version__,
        "torch": torch.__version__ + cuda,
        "kernels": kernels,
        "CPU": f"{machine.cpu_model()}, {torch.get_num_threads()} threads",
        "CPU kernels": ", ".join(isas) or "none",
        "GPUs": ", ".join(machine.gpus()) or "none that torch sees",
        "set here": set_here or "none of " + ", ".join(VARIABLES),
    }


def table(found: Info) -> Table:
    """A row for each device and optimizer whose dtypes fare alike."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for use in found.uses:
        key = (use.device, use.optimizer, use.backend, use.test, use.reason)
        rows.setdefault(key, []).append(use.dtype)
    columns = [
        Column(name, left=True)
        for name in (
            "device",
            "optimizer",
            "dtypes",
            "backend",
            "same bits as the reference",
            "why",
        )
    ]
    cells = [[d, o, ", ".join(dtypes), b, t, why] for (d, o, b, t, why), dtypes in rows.items()]
    return Table("What moves the parameters", columns, cells)


class _Callable(ModuleType):
    """So that ``adamfused.info()`` runs :func:`info`."""

    __call__ = staticmethod(info)


sys.modules[__name__].__class__ = _Callable
