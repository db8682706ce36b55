"""Numerical parity of any optimizer with float64, with the reference, or with another optimizer.

    python -m adamfused parity --candidate torch.optim:AdamW[fused=True] --cases full

Every step is compared element by element, from the same state, with the rule in float64, and with a bound on what
rounding can do (:mod:`adamfused.parity.exact`); free runs are compared with limits on drift. ``adamfused.parity(...)``
does the same from Python, and :func:`assert_parity` in a test suite.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from .. import machine
from ..spec import FAMILIES, Spec
from .agree import agrees
from .run import (
    FAIL,
    PASS,
    REFUSED,
    Request,
    Result,
    Server,
    check_device,
    choose,
    dtype_of,
    lab_for,
    run_case,
)

__all__ = ["Report", "Result", "agrees", "assert_parity", "parity"]


@dataclass
class Report:
    """What all cases said of one optimizer.

    Attributes:
        candidate, family, against, dtype, device, cases, steps, same_bits: what was run.
        results: one per case.
        facts: machine and versions, see :func:`adamfused.machine.facts`.
    """

    candidate: str
    family: str
    against: str
    dtype: str
    device: str
    cases: str
    steps: int = 10_000
    same_bits: bool = False
    results: list[Result] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """No case failed, and one at least passed in which numbers were compared."""
        compared = [
            r for r in self.results if r.verdict == PASS and (r.ratio is not None or r.curve)
        ]
        return not self.failures and bool(compared)

    @property
    def failures(self) -> list[Result]:
        """The results that failed."""
        return [r for r in self.results if r.verdict == FAIL]

    def summary(self) -> str:
        """One line: how many passed, failed and were refused."""
        verdicts = [r.verdict for r in self.results]
        return ", ".join(f"{verdicts.count(v)} {v}" for v in (PASS, FAIL, REFUSED))

    def to_json(self) -> dict[str, Any]:
        """All of it, as :mod:`json` takes it."""
        return asdict(self) | {"passed": self.passed}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Report:
        """The inverse of :meth:`to_json`."""
        kept = {k: v for k, v in values.items() if k not in ("results", "passed")}
        return cls(**kept, results=[Result.from_json(r) for r in values["results"]])


def parity(
    candidate: Spec | str | Callable[..., Optimizer],
    *,
    against: Spec | str | Callable[..., Optimizer] = "float64",
    family: str | None = None,
    cases: str = "quick",
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
    steps: int = 10_000,
    same_bits: bool = False,
    seconds: float = 120.0,
    isolated: bool | None = None,
    stop_early: bool = False,
    progress: Callable[[Result], None] | None = None,
) -> Report:
    """Tests an optimizer.

    Args:
        candidate: ``"module:Class[option=value]"``, an optimizer class, or a function that makes one from parameters.
        against: ``"float64"`` (the exact rule), ``"reference"`` (adamfused's pure-Python path, in the same dtype) or
            another optimizer, written as the candidate is.
        family: its rule, one of :data:`adamfused.spec.FAMILIES`, where the class's name does not tell.
        cases: ``"quick"``, ``"full"``, ``"hostile"``, or names of cases with commas between.
        dtype: of the parameters.
        device: of the parameters.
        steps: the length of the longest free run.
        same_bits: with ``against`` an optimizer: every bit of the parameters must be equal.
        seconds: how long one case may take in a child process.
        isolated: whether each case runs in a child process of its own, so that a crash or a hang is a result. ``None``
            for yes where the candidate is a text, which another process can import.
        stop_early: stop at the first failure.
        progress: called with each result.

    Returns:
        A :class:`Report`; ``report.passed`` tells whether all is well.

    Raises:
        ValueError: for an argument that is none of the above, or an optimizer of unknown family.

    Example:
        >>> import adamfused
        >>> report = adamfused.parity("torch.optim:AdamW", cases="defaults", isolated=False)
        >>> report.passed, report.results[0].verdict
        (True, 'PASS')
    """
    spec = Spec.of(candidate, family=family)
    kind = spec.family
    if kind is None:
        raise ValueError(
            f"the rule of {spec} is not known from its name; say family= (--family), one of {', '.join(FAMILIES)}"
        )
    twin = None
    if against == "reference":
        twin = Spec.parse(f'adamfused:{kind}[backend="reference"]')
    elif against != "float64":
        twin = Spec.of(against, family=kind)
    if same_bits and twin is None:
        raise ValueError(
            "same_bits compares with an optimizer; give against='reference' or module:Class"
        )
    by_text = isinstance(candidate, str) and isinstance(against, str)
    if isolated and not by_text:
        raise ValueError(
            "only an optimizer given as module:Class can run in another process; use isolated=False"
        )
    number = dtype_of(str(dtype))
    check_device(device)
    if steps < 1 or seconds <= 0:
        raise ValueError(f"steps and seconds must be above 0; got {steps} and {seconds}")
    chosen = choose(cases, kind, number)
    name = str(number).removeprefix("torch.")
    facts = machine.facts() | {"package": spec.package}
    report = Report(
        str(spec), kind, str(twin or "float64"), name, device, cases, steps, same_bits, facts=facts
    )

    def run_all(run: Callable[[Request], Result]) -> None:
        for case in chosen:
            twin_name = twin.name if twin else None
            request = Request(
                spec.name, kind or "", case.name, name, device, twin_name, same_bits, steps
            )
            report.results.append(run(request))
            if progress:
                progress(report.results[-1])
            if stop_early and report.failures:
                break

    if by_text and isolated is not False:
        with Server(seconds) as server:
            run_all(server.run)
    else:
        by_name = {c.name: c for c in chosen}
        run_all(lambda request: run_case(by_name[request.case], lab_for(request, spec, twin)))
    return report


def assert_parity(
    candidate: Spec | str | Callable[..., Optimizer],
    *,
    expected_failures: Collection[str] = (),
    **arguments: Any,
) -> Report:
    """Fails a test unless an optimizer passes.

    Args:
        candidate: as in :func:`parity`.
        expected_failures: names of cases that are known to fail. One that does not is an error too.
        arguments: as in :func:`parity`.

    Returns:
        The report.

    Raises:
        AssertionError: with a line for each case that failed.

    Example:
        >>> from adamfused.parity import assert_parity
        >>> assert_parity(torch.optim.Adam, cases="defaults,nan").summary()
        '2 PASS, 0 FAIL, 0 NOT SUPPORTED'
    """
    if isinstance(expected_failures, str):
        raise ValueError(f"expected_failures must be a list of names; got {expected_failures!r}")
    report = parity(candidate, **arguments)
    wrong = [f"{r.case}: {r.detail}" for r in report.failures if r.case not in expected_failures]
    failed = {r.case for r in report.failures}
    wrong += [
        f"{name}: expected to fail, and did not" for name in expected_failures if name not in failed
    ]
    if wrong or not (report.passed or failed):
        lines = "\n".join(wrong or [f"no case passed: {report.summary()}"])
        raise AssertionError(f"{report.candidate} against {report.against}:\n{lines}")
    return report


class _Callable(ModuleType):
    """So that ``adamfused.parity(...)`` runs :func:`parity`."""

    __call__ = staticmethod(parity)


sys.modules[__name__].__class__ = _Callable
