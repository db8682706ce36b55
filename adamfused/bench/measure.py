"""From optimizers and cases to a report."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch.optim import Optimizer
from torch.utils.benchmark import set_torch_threads

from adamfused import machine, parity
from adamfused.bench import contender, turns
from adamfused.bench.case import Case, parse_cases
from adamfused.bench.contender import FEATURES, Contender
from adamfused.bench.result import NOISY, Report, Row
from adamfused.parity.run import dtype_of
from adamfused.spec import Spec, Unsupported, first_line, parse_list

TICKS = 20  # of progress, a case
SECONDS = 3.0  # of measuring, a case

Tell = Callable[[str, int], None]


def bench(
    optimizers: str | Iterable[Spec | str | Callable[..., Optimizer]],
    cases: str | Iterable[Case | str] = ("1e7",),
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    threads: int | None = None,
    features: Collection[str] = (),
    seconds: float = SECONDS,
    launches: bool = True,
    tell: Tell = lambda what, ticks: None,
) -> Report:
    """Measures one training step of each optimizer on each case, in turn.

    All optimizers of a case share its parameters and gradients; each has its own states. One that cannot be made, or
    whose step raises or exits, has a row that says so; so has a case that memory cannot hold.

    Args:
        optimizers: specs, their texts, or optimizer classes; or one text with commas between them. Ratios are to the
            first.
        cases: or their texts: ``1e7``, ``1000x16``, ``gpt2``; or one text with commas between them.
        device: of the parameters: cpu, cuda or cuda:N.
        dtype: of the parameters and gradients: float32, float64, bfloat16 or float16, of torch or as text.
        threads: on the CPU; ``None``: torch's number.
        features: of :data:`FEATURES`, timed with the step.
        seconds: of measuring a case, if that is enough for ``ROUNDS[0]`` rounds.
        launches: whether to count what a step starts on a GPU, when all is timed: a profiler that has counted slows
            down what comes later in the process.
        tell: called with what is being done, and how many of the ``TICKS`` of each case are done with it.

    Raises:
        ValueError: if an optimizer, a case, a feature or a dtype is unknown, there is none to measure, or no such
            device.

    Example:
        >>> from adamfused.bench import bench
        >>> report = bench(["adamfused:AdamW", "torch.optim:AdamW[fused=True]"], ["1e6"])
        >>> report.rows[1].ratio.mid  # doctest: +SKIP
        1.04
    """
    if isinstance(optimizers, str):
        optimizers = parse_list(optimizers)
    specs = _named_apart([Spec.of(what) for what in optimizers])
    listed = [*parse_cases(cases)] if isinstance(cases, str) else [_case(case) for case in cases]
    if not listed:
        raise ValueError("cases: got none, expected at least one, such as '1e7'")
    for feature in features:
        if feature not in FEATURES:
            raise ValueError(f"features: got {feature!r}, expected some of {', '.join(FEATURES)}")
    dtype, device = dtype_of(str(dtype)), _device(device)
    with set_torch_threads(threads or torch.get_num_threads()):
        load = round(machine.others_running(), 2)
        copy = turns.Copy(device)
        report = Report(
            machine.facts() | {"load": load, "packages": [spec.package for spec in specs]},
            str(device),
            str(dtype).removeprefix("torch."),
            list(features),
            copy.bytes,
            busy=load >= (os.cpu_count() or 1) / 4,
        )
        verdicts = {}
        for spec in specs:
            tell(f"parity of {spec}", 0)
            verdicts[spec.name] = _parity(spec, dtype, device)
        rows: list[Row] = []
        for case in listed:
            rows += _measure(case, specs, dtype, device, features, seconds, copy, tell)
        if launches and device.type == "cuda":
            rows = [
                row
                if row.problem
                else replace(row, launches=_launches(case, spec, dtype, device, features))
                for row, (case, spec) in zip(rows, product(listed, specs), strict=True)
            ]
        rows = [_judged(row, verdicts[row.optimizer]) for row in rows]
    report = replace(report, rows=rows)
    return replace(report, warnings=_warnings(report))


def _case(case: Case | str) -> Case:
    if isinstance(case, str):
        return Case.parse(case)
    if not isinstance(case, Case):
        raise ValueError(
            f"cases: got {type(case).__name__} {case!r}, expected a Case or a text such as '1e7', '1000x16' or 'gpt2'"
        )
    return case


def _device(name: str | torch.device) -> torch.device:
    """The device of that name, if steps can be timed on it and it is there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {str(name)!r}, expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= (there := torch.cuda.device_count()):
        raise ValueError(
            f"device: got {device}, but torch {torch.__version__} finds {there or 'no'} CUDA devices"
        )
    return device


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
    try:
        params = contender.parameters(case, dtype, device)
    except (Unsupported, RuntimeError) as error:
        tell(case.name, TICKS)
        problem = f"NOT SUPPORTED: {first_line(error)}"
        size = len(case.shapes), case.numel
        return [Row(spec.name, case.name, *size, problem) for spec in specs]
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
            if isinstance(its, BaseException):
                rows[name] = replace(
                    rows[name], problem=f"NOT SUPPORTED: {type(its).__name__}: {first_line(its)}"
                )
                continue
            rows[name] = rows[name].timed(its, first, copy.bytes)
            if device.type == "cuda":
                rows[name] = replace(rows[name], host=turns.host_seconds(ready[name].step))
    else:
        tell(case.name, TICKS)
    ready.clear()
    gc.collect()
    return list(rows.values())


def _launches(
    case: Case, spec: Spec, dtype: torch.dtype, device: torch.device, features: Collection[str]
) -> int | None:
    """Of a step of an optimizer that is made anew. None if that fails: what was timed before is not lost."""
    gc.collect()  # the one before
    try:
        params = contender.parameters(case, dtype, device)
        return contender.launches(contender.prepare(spec, params, features).step)
    except Unsupported:
        return None


def _parity(spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
    """ "" if it agrees with the oracle of its family, else why not; ``None`` without a family."""
    if spec.family is None:
        return None
    try:
        return parity.agrees(spec, dtype=dtype, device=str(device)) or ""
    except SystemExit as error:
        return f"SystemExit: {first_line(error)}"


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
    found = []
    if report.busy:
        found.append(
            f"other work kept the machine busy at the start, load {report.facts['load']:.1f} on {os.cpu_count()} "
            "cores: threads may have waited for it, so no verdict says slower or faster"
        )
    timed = [row for row in report.rows if row.turns]
    noisy = sum(row.noise > NOISY for row in timed)
    if noisy:
        found.append(
            f"the times of {noisy} of {len(timed)} rows spread by more than {NOISY:.0%} of their median (between "
            "quartiles); where threads wait for other work, --threads 1 is steadier"
        )
    return found
