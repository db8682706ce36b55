"""Builds, tests and measures on this machine's GPU, in one call that installs nothing.

    python benchmarks/gpu_check.py FOLDER

Needs a torch with CUDA, nvcc, ninja and pytest, and pytest-xdist to be in time. Each stage is shown as it runs; one
that fails does not stop the next, but for the build. FOLDER gets gpu-check.log (all that was printed), gpu-check.json
(a line per stage) and gpu.json (all that was measured). The last thing printed is a table of the stages. Exits with 1
if one failed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent


class Stage(NamedTuple):
    """One command, and the seconds it may take."""

    name: str
    command: Sequence[str]
    limit: float
    env: Mapping[str, str] = {}


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
    command = ["timeout", "--signal=INT", "--kill-after=10", str(stage.limit), *stage.command]
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
        for line in process.stdout:
            say(line)
    code = process.returncode
    verdict = "passed" if code == 0 else "timed out" if code in (124, 137) else f"failed ({code})"
    return Outcome(stage.name, verdict, time.monotonic() - begin)


def run_all(stages: Sequence[Stage], folder: Path) -> int:
    """Runs the stages in turn, writes the logs and prints the table. 1 if one failed. Without a build none is run."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    with open(folder / "gpu-check.log", "w") as log:
        for stage in stages:
            unbuilt = any(each.name == "build" and not each.passed for each in outcomes)
            outcomes.append(
                Outcome(stage.name, "not run (no build)", 0.0) if unbuilt else run(stage, log)
            )
    lines = [outcome._asdict() | {"passed": outcome.passed} for outcome in outcomes]
    (folder / "gpu-check.json").write_text(json.dumps(lines, indent=1) + "\n")
    print()
    for outcome in outcomes:
        print(f"{outcome.name:<24}{outcome.verdict:<32}{outcome.seconds:6.0f} s")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def stages(folder: Path) -> list[Stage]:
    """What there is to do, for the GPU of this machine: nine minutes at the most."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    cores = os.cpu_count() or 1
    build = {
        "ADAMFUSED_BUILD": "cuda",
        "ADAMFUSED_CUDA_ARCHS": f"{major}.{minor}",
        "MAX_JOBS": str(cores),
    }
    python, one_thread = sys.executable, {"OMP_NUM_THREADS": "1"}
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "tests/test_gpu.py"]
    many = ["-rfE", "--durations=15"]
    if importlib.util.find_spec("xdist"):  # one process would take the processor ten minutes
        many += ["-n", str(min(12, cores)), "--dist", "worksteal"]
    small = "flipped or misaligned or layouts or self_test or the_norm_is or options_in_one_pass"
    result = str(folder.resolve() / "gpu.json")
    measure = [python, "benchmarks/gpu.py", "--json", result, "--no-fail"]
    all_stages = [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 180, build),
        Stage("tests", [python, *tests, *many], 140, one_thread),
        Stage("measure", measure, 110),
    ]
    # Of our kernels alone. Not initcheck: it would not see that torch's kernels have written what ours read.
    for tool, limit in (("memcheck", 45), ("racecheck", 30), ("synccheck", 30)):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        sanitizer += ["--print-limit", "20", "--kernel-name", "kernel_substring=adamfused"]
        # torch's cache lies behind and before a tensor, where a bad access would not be noticed.
        cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        command = [*sanitizer, python, *tests, "-k", small]
        all_stages.append(Stage(tool, command, limit, one_thread | cache))
    return all_stages


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    import torch

    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device: nothing to check")
        return 1
    folder = Path(sys.argv[1])
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    return run_all(stages(folder), folder)


if __name__ == "__main__":
    sys.exit(main())
