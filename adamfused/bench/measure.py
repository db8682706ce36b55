"""From optimizers and cases to a report."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch.optim import Optimizer
from torch.utils.benchmark import set_torch_threads

from adamfused import machine, parity
from adamfused.bench import contender, turns
from adamfused.bench.case import Case
from adamfused.bench.contender import FEATURES, Contender
from adamfused.bench.result import NOISY, Report, Row
from adamfused.spec import Spec, Unsupported, first_line

TICKS = 20  # of progress, a case
SECONDS = 3.0  # of measuring, a case

Tell = Callable[[str, int], None]


def bench(
    optimizers: Iterable[Spec | str | Callable[..., Optimizer]],
    cases: Iterable[Case | str] = ("1e7",),
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    features: Collection[str] = (),
    seconds: float = SECONDS,
    tell: Tell = lambda what, ticks: None,
) -> Report:
    """Measures one training step of each optimizer on each case, in turn.

    All optimizers of a case share its parameters and gradients; each has its own states. One that cannot be made, or
    whose step raises, has a row that says so.

    Args:
        optimizers: specs, their texts, or optimizer classes. Ratios are to the first.
        cases: or their texts: ``1e7``, ``1000x16``, ``gpt2``.
        device: of the parameters.
        dtype: of the parameters and gradients.
        threads: on the CPU; ``None``: torch's number.
        features: of :data:`FEATURES`, timed with the step.
        seconds: of measuring a case, if that is enough for ``ROUNDS[0]`` rounds.
        tell: called with what is being done, and how many of the ``TICKS`` of each case are done with it.

    Raises:
        ValueError: if an optimizer, a case or a feature is unknown, or there is no such device.

    Example:
        >>> from adamfused.bench import bench
        >>> report = bench(["adamfused:AdamW", "torch.optim:AdamW[fused=True]"], ["1e6"])
        >>> report.rows[1].ratio.mid  # doctest: +SKIP
        1.04
    """
    specs = _named_apart([Spec.of(what) for what in optimizers])
    listed = [case if isinstance(case, Case) else Case.parse(case) for case in cases]
    for feature in features:
        if feature not in FEATURES:
            raise ValueError(f"features: got {feature!r}, expected some of {', '.join(FEATURES)}")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: got {device}, but torch {torch.__version__} finds no CUDA device"
        )
    with set_torch_threads(threads or torch.get_num_threads()):
        load = round(os.getloadavg()[0], 2)
        copy = turns.Copy(device)
        report = Report(
            machine.facts() | {"load": load, "packages": [spec.package for spec in specs]},
            str(device),
            str(dtype).removeprefix("torch."),
            list(features),
            copy.bytes,
        )
        verdicts = {}
        for spec in specs:
            tell(f"parity of {spec}", 0)
            verdicts[spec.name] = _parity(spec, dtype, device)
        rows: list[Row] = []
        for case in listed:
            rows += _measure(case, specs, dtype, device, features, seconds, copy, tell)
        rows = [_judged(row, verdicts[row.optimizer]) for row in rows]
    report = replace(report, rows=rows)
    return replace(report, warnings=_warnings(report))


def _measure(
    case: Case,
    specs: Sequence[Spec],
    dtype: torch.dtype,
    device: torch.device,
    features: Collection[str],
    seconds: float,
    copy: turns.Copy,
    tell: Tell,
) -> list[Row]:
    """The rows of one case. Its parameters and states are freed at the end."""
    params = contender.parameters(case, dtype, device)
    rows: dict[str, Row] = {}
    ready: dict[str, Contender] = {}
    for spec in specs:
        tell(f"{case.name}: first steps of {spec}", 0)
        row = Row(spec.name, case.name, len(params), case.numel)
        try:
            ready[spec.name] = made = contender.prepare(spec, params, features)
            row = replace(row, step_bytes=made.step_bytes, state_bytes=made.state_bytes)
        except Unsupported as error:
            row = replace(row, problem=f"NOT SUPPORTED: {error}")
        rows[spec.name] = row
    if ready:
        least = min(made.step_bytes for made in ready.values())
        in_cache = turns.stays_in_cache(least, device)
        pass_over = [p.detach().clone() for p in params] if in_cache else []

        def tick(done: int, rounds: int) -> None:
            ticks = TICKS * done // rounds - TICKS * (done - 1) // rounds
            tell(f"{case.name}: round {done} of {rounds}", ticks)

        taken = turns.take_turns(
            [made.step for made in ready.values()],
            copy,
            (lambda: torch._foreach_neg_(pass_over)) if in_cache else None,
            seconds,
            device,
            warm=in_cache,
            tell=tick,
        )
        of = {name: its for name, its in zip(ready, taken, strict=True) if isinstance(its, list)}
        first = of.get(specs[0].name, [])
        for name, its in zip(ready, taken, strict=True):
            if isinstance(its, Exception):
                rows[name] = replace(
                    rows[name], problem=f"NOT SUPPORTED: {type(its).__name__}: {first_line(its)}"
                )
                continue
            rows[name] = rows[name].timed(its, first, copy.bytes)
            if device.type == "cuda":
                step = ready[name].step
                host, launched = turns.host_seconds(step), contender.launches(step)
                rows[name] = replace(rows[name], host=host, launches=launched)
    else:
        tell(case.name, TICKS)
    ready.clear()
    gc.collect()
    return list(rows.values())


def _parity(spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
    """ "" if it agrees with the oracle of its family, else why not; ``None`` without a family."""
    if spec.family is None:
        return None
    return parity.agrees(spec, dtype=dtype, device=str(device)) or ""


def _judged(row: Row, verdict: str | None) -> Row:
    """The row with the verdict of the parity check."""
    if verdict and not row.problem:
        row = replace(row, problem=f"INVALID: {verdict}")
    return replace(row, checked=verdict is not None)


def _named_apart(specs: Sequence[Spec]) -> list[Spec]:
    """The specs, one that stands twice with a number after its name."""
    seen: dict[str, int] = {}
    apart = []
    for spec in specs:
        seen[spec.name] = n = seen.get(spec.name, 0) + 1
        apart.append(spec if n == 1 else replace(spec, name=f"{spec.name} ({n})"))
    if not apart:
        raise ValueError("optimizers: got none, expected at least one")
    return apart


def _warnings(report: Report) -> list[str]:
    cores, load = os.cpu_count() or 1, report.facts["load"]
    found = []
    if load > cores / 2:
        found.append(
            f"other work kept the machine busy at the start, load {load:.1f} on {cores} cores"
        )
    timed = [row for row in report.rows if row.turns]
    noisy = sum(row.noise > NOISY for row in timed)
    if noisy:
        found.append(
            f"the times of {noisy} of {len(timed)} rows spread by more than {NOISY:.0%} of their median (between "
            "quartiles); where threads wait for other work, --threads 1 is steadier"
        )
    return found
