"""Builds, tests and measures on this machine's GPU, in one call that installs nothing.

    python benchmarks/gpu_check.py FOLDER

Needs a torch with CUDA, nvcc, ninja and pytest. Each stage is shown as it runs; one that fails does not stop the next.
FOLDER gets gpu-check.log (all that was printed), gpu-check.json (a line per stage) and gpu.json (all that was
measured). The last thing printed is a table of the stages. Exits with 1 if one failed.
"""

from __future__ import annotations

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
    command = ["timeout", "--kill-after=5", str(stage.limit), *stage.command]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | stage.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            say(line)
    code = process.returncode
    verdict = "passed" if code == 0 else "timed out" if code == 124 else f"failed ({code})"
    return Outcome(stage.name, verdict, time.monotonic() - begin)


def run_all(stages: Sequence[Stage], folder: Path) -> int:
    """Runs the stages in turn, writes the logs and prints the table. 1 if one failed."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "gpu-check.log", "w") as log:
        outcomes = [run(stage, log) for stage in stages]
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
    build = {"ADAMFUSED_BUILD": "cuda", "ADAMFUSED_CUDA_ARCHS": f"{major}.{minor}"}
    python, tests = (
        sys.executable,
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"],
    )
    small = "flipped or misaligned or layouts or self_test or the_norm_is or options_in_one_pass"
    all_stages = [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 140, build),
        Stage("tests", [python, *tests], 150),
    ]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        if tool == "initcheck":  # torch leaves memory unset that its copies then read
            sanitizer += ["--kernel-name", "kernel_substring=step_kernel"]
        all_stages.append(Stage(tool, [*sanitizer, python, *tests, "-k", small], 25))
    result = str(folder.resolve() / "gpu.json")
    all_stages.append(
        Stage("measure", [python, "benchmarks/gpu.py", "--json", result, "--no-fail"], 140)
    )
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
