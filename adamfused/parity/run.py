"""Runs cases: in this process, or each in a child, where a crash or a hang is a result and not the end."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..spec import Spec, Unsupported, first_line
from . import accuracy, hostile  # noqa: F401  (they register their cases)
from .lab import CASES, Case, Lab
from .walk import NEAREST, Fail, Found

PASS, FAIL, REFUSED = "PASS", "FAIL", "NOT SUPPORTED"
SETS = ("quick", "full", "hostile")
ENOUGH = 50_000  # 16-bit results, for a share of 99.9 % to mean something


@dataclass
class Result:
    """What one case said of one optimizer.

    Attributes:
        case: its name.
        verdict: ``"PASS"``, ``"FAIL"`` or ``"NOT SUPPORTED"`` (it refused cleanly).
        detail: why, in one line; empty for a plain PASS.
        about: what was tested.
        ratio: the largest error of any element of any part in any step, over what rounding allows; ``None`` if nothing
            was compared.
        nearest: the share of results (of parameters) that are the correctly rounded ones; against another optimizer,
            the share of equal bits.
        ulps: how many results lie within each of ``ULP_EDGES`` units in the last place, and above.
        curve: by step count, the root mean square error of the parameters over the way they went, and that of the
            second moments, relative (``None`` where they cannot be read).
        seconds: how long it took.
    """

    case: str
    verdict: str
    detail: str = ""
    about: str = ""
    ratio: float | None = None
    nearest: float | None = None
    ulps: list[int] = field(default_factory=list)
    curve: dict[int, tuple[float, float | None]] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        """The inverse of :func:`dataclasses.asdict` after JSON, which has made the steps of the curve text."""
        made = cls(**values)
        made.curve = {int(t): (p, v) for t, (p, v) in made.curve.items()}
        return made


@dataclass(frozen=True)
class Request:
    """Everything that a child needs to know, as JSON takes it."""

    candidate: str
    family: str
    case: str
    dtype: str = "float32"
    device: str = "cpu"
    twin: str | None = None
    same_bits: bool = False
    long: int = 10_000


def dtype_of(name: str) -> torch.dtype:
    """The dtype that torch calls so.

    Raises:
        ValueError: if it is no floating dtype that parameters have.
    """
    found = getattr(torch, name.removeprefix("torch."), None)
    if found not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, float64, bfloat16 or float16; got {name!r}")
    assert isinstance(found, torch.dtype)
    return found


def check_device(name: str) -> None:
    """Raises ValueError if torch has no such device here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be had: {first_line(error)}") from None


def choose(cases: str, family: str, dtype: torch.dtype) -> list[Case]:
    """The cases of a set, or of a comma-separated list of names, for a family and a dtype.

    Raises:
        ValueError: for a name that is neither a set nor a case.
    """
    chosen: list[Case] = []
    for name in map(str.strip, cases.split(",")):
        some = [c for c in CASES.values() if name in c.sets or name == c.name]
        if not some:
            raise ValueError(
                f"no set or case is called {name!r}; sets: {', '.join(SETS)}; cases: {', '.join(CASES)}"
            )
        chosen += [c for c in some if c not in chosen]
    return [c for c in chosen if family in c.families and dtype in c.dtypes]


def run_case(case: Case, lab: Lab) -> Result:
    """Runs a case in this process."""
    begin = time.perf_counter()
    verdict, detail = PASS, ""
    try:
        case.run(lab)
        detail = _too_far(lab.found, lab.twin is not None)
        verdict = FAIL if detail else PASS
    except Unsupported as refusal:
        detail = _too_far(lab.found, lab.twin is not None)
        verdict, detail = (FAIL, detail) if detail else (REFUSED, str(refusal))
    except Fail as failure:
        verdict, detail = FAIL, str(failure)
    except (Exception, SystemExit) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        verdict = FAIL
        detail = f"{type(error).__name__}: {first_line(error)} ({os.path.basename(at.filename)}:{at.lineno})"
    found = lab.found
    if verdict == PASS and found.free:
        detail = f"{found.free}: after the first step compared with a free run"
    return Result(
        case.name,
        verdict,
        detail,
        case.about,
        (found.ratio if math.isfinite(found.ratio) else 1e300) if found.count else None,
        found.nearest / found.count if found.count else None,
        found.ulps if found.count else [],
        lab.curve,
        time.perf_counter() - begin,
    )


def _too_far(found: Found, against_twin: bool) -> str:
    """What is wrong with the numbers, or nothing."""
    if found.ratio > 1:
        much = (
            f"{found.ratio:.3g} times what rounding allows"
            if math.isfinite(found.ratio)
            else "wrong"
        )
        return f"{much}: {found.worst}"
    for name, (good, total) in found.shares.items():
        least = NEAREST[getattr(torch, name.removeprefix("torch."))]
        if total >= ENOUGH and good < least * total and not against_twin:
            share = f"{100 * good / total:.2f} % of {name.removeprefix('torch.')} results"
            return f"{share} are the nearest to the exact one; expected {100 * least} %"
    return ""


def lab_for(request: Request, candidate: Spec | None = None, twin: Spec | None = None) -> Lab:
    """The bench that a request describes."""
    spec = candidate or Spec.parse(request.candidate)
    if twin is None and request.twin is not None:
        twin = Spec.parse(request.twin)
    return Lab(
        spec,
        request.family,
        dtype_of(request.dtype),
        request.device,
        twin,
        request.same_bits,
        request.long,
    )


# ---- children ------------------------------------------------------------------------------------


class Server:
    """A process that has imported torch and the candidate, and forks a child for each case.

    Forking is quick, and safe there, because that process has started no threads and no GPU.
    """

    def __init__(self, seconds: float) -> None:
        """``seconds`` is how long a case may take."""
        self.seconds = seconds
        self._start()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "adamfused.parity.run", str(self.seconds)]
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Threads that sleep while they wait: on a busy machine those that spin take minutes for seconds' work.
            start_new_session=True,  # so that close() ends the children too
            env={"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
            | os.environ
            | {"PYTHONPATH": path},
        )

    def run(self, request: Request) -> Result:
        """The result of one case."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(asdict(request)) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return Result.from_json(json.loads(answer))
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["it said nothing"]
        self.close()
        self._start()
        return Result(
            request.case, FAIL, f"importing it ended the process (exit {code}): {lines[-1]}"
        )

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Server:
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the process."""
        self.close()


def serve(seconds: float) -> None:
    """Answers requests, a line of JSON each, from standard input on standard output."""
    importlib.import_module(
        "torch._dynamo"
    )  # a first step would import it, in each child anew, for a second or two
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a candidate prints is no answer
    imported: dict[str, Spec] = {}
    for line in sys.stdin:
        request = Request(**json.loads(line))
        for text in (request.candidate, request.twin):
            if text is not None and text not in imported:
                imported[text] = Spec.parse(text)
        twin = imported[request.twin] if request.twin is not None else None
        result = _in_a_child(request, imported[request.candidate], twin, seconds)
        answers.write(json.dumps(asdict(result), allow_nan=False) + "\n")
        answers.flush()


def _in_a_child(request: Request, candidate: Spec, twin: Spec | None, seconds: float) -> Result:
    case = CASES[request.case]
    reading, writing = os.pipe()
    with tempfile.TemporaryFile("w+") as errors:
        begin, asker = time.perf_counter(), os.getppid()
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(errors.fileno(), 2)
                os.dup2(errors.fileno(), 1)
                result = run_case(case, lab_for(request, candidate, twin))
                with os.fdopen(writing, "w") as pipe:
                    pipe.write(json.dumps(asdict(result), allow_nan=False))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(writing)
        answer, end = b"", begin + seconds
        while True:
            ready, _, _ = select.select([reading], [], [], 0.5)
            if not ready:
                if time.perf_counter() < end and os.getppid() == asker:
                    continue
                os.kill(pid, signal.SIGKILL)  # it hangs, or nobody waits for its answer any more
                break
            if not (some := os.read(reading, 65536)):
                break
            answer += some
        os.close(reading)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        took = time.perf_counter() - begin
        if answer and status == 0:
            return Result.from_json(json.loads(answer))
        errors.seek(0)
        said = (
            [line for line in errors.read().splitlines() if line.strip()] or ["it said nothing"]
        )[-1]
    if took >= seconds:
        detail = f"it hung: no answer in {seconds:g} s"
    elif status < 0:
        detail = f"it crashed with {signal.Signals(-status).name}: {said}"
    else:
        detail = f"it ended the process (exit {status}): {said}"
    return Result(case.name, FAIL, detail, case.about, seconds=took)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
