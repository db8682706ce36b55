"""Builds, tests and measures on this machine's GPU, in one call that installs nothing.

    python benchmarks/gpu_check.py FOLDER

Needs a torch with CUDA, nvcc, ninja and pytest; pytest-xdist to be in time, and pytest-timeout to be in time where a
test hangs. Each stage is shown as it runs; one that fails does not stop the next, but for the build. FOLDER gets
gpu-check.log (all that was printed), gpu-check.json (a line per stage) and gpu.json (all that was measured), each as
soon as it is known. The last thing printed is a table of the stages. Exits with 1 if one failed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent

WHOLE = 515.0  # seconds for all stages; to end the last may take 20 more: under nine minutes
KEPT = 15.0  # of them, kept back for each stage that is still to come

# Drivers from before 2024 crash where a kernel in a graph has more than 4 KB of arguments, as ours have.
PROBE = """
import torch, adamfused
p = torch.nn.Parameter(torch.ones(1000, device="cuda"))
p.grad = torch.ones_like(p)
optimizer = adamfused.AdamW([p], lr=0.1, weight_decay=0, capturable=True, backend="native")
warm = torch.cuda.Stream()
warm.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(warm):
    optimizer.step()
torch.cuda.current_stream().wait_stream(warm)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    optimizer.step()
graph.replay()
assert optimizer.state[p]["step"] == 2 and bool(((p - 0.8).abs() < 1e-3).all()), p
"""


class Stage(NamedTuple):
    """One command, the seconds it may take, and patterns of what it prints if it has done its work."""

    name: str
    command: Sequence[str]
    limit: float
    env: Mapping[str, str] = {}
    prints: Sequence[str] = ()


class Outcome(NamedTuple):
    """How a stage ended: "passed", "failed (code)", "timed out" or "not run (why)"."""

    name: str
    verdict: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def run(stage: Stage, log: TextIO) -> Outcome:
    """Runs a stage, showing and logging what it prints."""

    def say(text: str) -> None:
        log.write(text)
        log.flush()
        print(text, end="", flush=True)

    say(f"\n=== {stage.name}: {' '.join(stage.command)}\n")
    begin = time.monotonic()
    if shutil.which(stage.command[0]) is None:
        say(f"{stage.command[0]} is not on this machine\n")
        return Outcome(stage.name, f"not run (no {stage.command[0]})", 0.0)
    # Interrupted, so that pytest still says what failed.
    command = ["timeout", "--signal=INT", "--kill-after=20", str(stage.limit), *stage.command]
    path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)} | stage.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        missing = set(stage.prints)
        for line in process.stdout:
            say(line)
            missing -= {pattern for pattern in missing if re.search(pattern, line)}
    code, seconds = process.returncode, time.monotonic() - begin
    verdict = "passed"
    if code:
        # The code does not tell: where it has to kill, timeout kills itself too.
        verdict = "timed out" if seconds > stage.limit else f"failed ({code})"
    elif missing:
        verdict = f"failed (printed no {' and no '.join(sorted(missing))})"
    return Outcome(stage.name, verdict, seconds)


def run_all(stages: Sequence[Stage], folder: Path, begin: float | None = None) -> int:
    """Runs the stages in turn, writes the logs and prints the table. 1 if one failed. Without a build none is run.

    ``begin`` is when time began to count, by ``time.monotonic()``; None: now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = (time.monotonic() if begin is None else begin) + WHOLE
    outcomes: list[Outcome] = []
    with open(folder / "gpu-check.log", "w") as log:
        for to_come, stage in zip(reversed(range(len(stages))), stages, strict=True):
            left = end - time.monotonic() - to_come * KEPT
            if any(each.name == "build" and not each.passed for each in outcomes):
                outcomes.append(Outcome(stage.name, "not run (no build)", 0.0))
            elif left <= 0:
                outcomes.append(Outcome(stage.name, "not run (no time left)", 0.0))
            else:
                outcomes.append(run(stage._replace(limit=min(stage.limit, left)), log))
            # After each stage: nothing is lost if the next one is the last that this process sees.
            lines = [outcome._asdict() | {"passed": outcome.passed} for outcome in outcomes]
            (folder / "gpu-check.json").write_text(json.dumps(lines, indent=1) + "\n")
    print()
    for outcome in outcomes:
        print(f"{outcome.name:<24}{outcome.verdict:<32}{outcome.seconds:6.0f} s")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def stages(folder: Path) -> list[Stage]:
    """What there is to do, for the GPU of this machine."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    cores = os.cpu_count() or 1
    build = {
        "ADAMFUSED_BUILD": "cuda",
        "ADAMFUSED_CUDA_ARCHS": f"{major}.{minor}",
        "MAX_JOBS": str(cores),
    }
    # Tests that find no GPU are then no success.
    python, env = sys.executable, {"OMP_NUM_THREADS": "1", "ADAMFUSED_NEED_GPU": "1"}
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "tests/test_gpu.py"]
    some_passed = r"\d passed"  # pytest never says 0
    many = ["-rfE", "--durations=15"]
    if importlib.util.find_spec("xdist"):  # one process would take the processor ten minutes
        many += ["-n", str(min(12, cores)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):  # by a thread: a signal waits for the device too
        many += ["--timeout", "60", "--timeout-method", "thread"]
    small = "flipped or misaligned or layouts or self_test or the_norm_is or options_in_one_pass"
    few = "flipped or options_in_one_pass and capturable"  # has all that is shared or synchronised
    result = str(folder.resolve() / "gpu.json")
    measure = [python, "benchmarks/gpu.py", "--json", result, "--no-fail"]
    all_stages = [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 180, build),
        Stage("graph probe", [python, "-c", PROBE], 40),
        Stage("tests", [python, *tests, *many], 140, env, [some_passed]),
        Stage("measure", measure, 110),
    ]
    # Of our kernels alone. Not initcheck: it would not see that torch's kernels have written what ours read.
    for tool, which, limit, summary in (
        ("memcheck", small, 180, "ERROR SUMMARY: 0 errors"),
        ("racecheck", few, 90, "RACECHECK SUMMARY: 0 hazards"),
        ("synccheck", few, 90, "ERROR SUMMARY: 0 errors"),
    ):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        sanitizer += ["--print-limit", "20", "--kernel-name", "kernel_substring=adamfused"]
        # torch asks the driver for what it may not have, and each such call would count as an error.
        sanitizer += ["--report-api-errors", "no"]
        # torch's cache lies behind and before a tensor, where a bad access would not be noticed.
        cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        command = [*sanitizer, python, *tests, "-k", which]
        all_stages.append(Stage(tool, command, limit, env | cache, [some_passed, summary]))
    return all_stages


def main() -> int:
    begin = time.monotonic()
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    import torch

    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device: nothing to check")
        return 1
    folder = Path(sys.argv[1])
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    return run_all(stages(folder), folder, begin)


if __name__ == "__main__":
    sys.exit(main())
