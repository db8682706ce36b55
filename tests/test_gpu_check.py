"""``make gpu-check`` without a GPU: its stages run one after the other, whatever becomes of them."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adamfused.bench import Interval, Report, Row

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu_check = pytest.importorskip("gpu_check", reason="needs the checkout")
gpu = pytest.importorskip("gpu", reason="needs the checkout")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_stage_that_fails_is_shown_and_does_not_stop_the_next(tmp_path, capfd) -> None:
    stages = [
        gpu_check.Stage("good", python("print('hello')"), 60),
        gpu_check.Stage("bad", python("import sys; print('oh'); sys.exit(3)"), 60),
        gpu_check.Stage("slow", python("import time; time.sleep(60)"), 0.5),
        gpu_check.Stage("absent", ["no-such-program"], 60),
        gpu_check.Stage(
            "last", python("import os; print(os.environ['WORD'])"), 60, {"WORD": "bye"}
        ),
    ]
    assert gpu_check.run_all(stages, tmp_path / "out") == 1
    said = capfd.readouterr().out
    assert "hello" in said and "oh" in said and "bye" in said
    assert (tmp_path / "out" / "gpu-check.log").read_text() in said
    lines = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert [(line["name"], line["verdict"]) for line in lines] == [
        ("good", "passed"),
        ("bad", "failed (3)"),
        ("slow", "timed out"),
        ("absent", "not run (no no-such-program)"),
        ("last", "passed"),
    ]
    table = said.splitlines()[-5:]
    assert [line.split()[0] for line in table] == ["good", "bad", "slow", "absent", "last"]


def test_without_a_build_nothing_else_is_run(tmp_path, capfd) -> None:
    stages = [gpu_check.Stage("build", python("import sys; sys.exit(1)"), 60)]
    stages.append(gpu_check.Stage("tests", python("print('hello')"), 60))
    assert gpu_check.run_all(stages, tmp_path) == 1
    lines = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [line["verdict"] for line in lines] == ["failed (1)", "not run (no build)"]
    assert "hello" not in capfd.readouterr().out


def test_stages_import_the_package_of_this_tree_though_nothing_is_installed(tmp_path) -> None:
    """-S: without what is installed, an editable install too; a script's own folder is what Python puts first."""
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib.util\nprint(importlib.util.find_spec('adamfused').origin)\n"
    )
    stages = [gpu_check.Stage("there", [sys.executable, "-S", str(script)], 60)]
    assert gpu_check.run_all(stages, tmp_path / "out") == 0
    log = (tmp_path / "out" / "gpu-check.log").read_text()
    assert str(ROOT / "adamfused" / "__init__.py") in log


def test_a_stage_that_is_out_of_time_is_interrupted(tmp_path) -> None:
    """pytest then says what has failed so far."""
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('so far'); raise"
    assert gpu_check.run_all([gpu_check.Stage("slow", python(code), 2)], tmp_path) == 1
    assert "so far" in (tmp_path / "gpu-check.log").read_text()


def test_all_passed_is_success(tmp_path) -> None:
    assert gpu_check.run_all([gpu_check.Stage("good", python(""), 60)], tmp_path) == 0


def test_each_stage_gets_what_is_left_and_keeps_some_back(tmp_path, monkeypatch) -> None:
    """And what the one before has not used."""
    monkeypatch.setattr(gpu_check, "WHOLE", 100)
    monkeypatch.setattr(gpu_check, "KEPT", 10)
    now, limits = [1000.0], []

    def run(stage, log):
        limits.append(stage.limit)
        now[0] += 12 if stage.name == "quick" else stage.limit
        return gpu_check.Outcome(stage.name, "passed", 0.0)

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    names = ["own", "quick", "long", "last"]
    stages = [gpu_check.Stage(n, [], 40 if n == "own" else 1000) for n in names]
    gpu_check.run_all(stages, tmp_path, begin=999.0)
    # 99 and 30 to keep; 59 and 20; 47 and 10; and the 10
    assert limits == [40, 39, 37, 10]


def test_a_stage_for_which_no_time_is_left_is_not_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "WHOLE", 1)
    monkeypatch.setattr(gpu_check, "KEPT", 0)
    stages = [gpu_check.Stage("slow", python("import time; time.sleep(60)"), 60)]
    stages.append(gpu_check.Stage("late", python("print('hello')"), 60))
    assert gpu_check.run_all(stages, tmp_path) == 1
    lines = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [line["verdict"] for line in lines] == ["timed out", "not run (no time left)"]


def test_a_process_that_dies_is_not_out_of_time(tmp_path) -> None:
    """Killed it has one code with one that timeout has killed, and that is told by the clock."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    gpu_check.run_all([gpu_check.Stage("graph probe", python(code), 60)], tmp_path)
    (line,) = json.loads((tmp_path / "gpu-check.json").read_text())
    assert line["verdict"].startswith("failed (")


def test_what_is_known_is_written_after_each_stage(tmp_path) -> None:
    """A stage sees the outcomes of those before it."""
    code = f"print('so far', open({str(tmp_path / 'gpu-check.json')!r}).read())"
    stages = [gpu_check.Stage("first", python(""), 60), gpu_check.Stage("last", python(code), 60)]
    assert gpu_check.run_all(stages, tmp_path) == 0
    log = (tmp_path / "gpu-check.log").read_text()
    (before,) = json.loads(log[log.rindex("so far") + len("so far") :])
    assert before["name"] == "first" and before["passed"]


@pytest.mark.parametrize(
    "said, verdict",
    [
        ("3 passed, 2 skipped|= ERROR SUMMARY: 0 errors", "passed"),
        ("5 skipped|= ERROR SUMMARY: 0 errors", r"failed (printed no \d passed)"),
        ("3 passed", "failed (printed no ERROR SUMMARY: 0 errors)"),
        ("3 passed|= ERROR SUMMARY: 10 errors", "failed (printed no ERROR SUMMARY: 0 errors)"),
    ],
)
def test_a_stage_passes_only_if_it_says_what_it_has_done(tmp_path, said, verdict) -> None:
    code = f"print({said!r}.replace('|', chr(10)))"
    prints = [r"\d passed", "ERROR SUMMARY: 0 errors"]
    gpu_check.run_all([gpu_check.Stage("memcheck", python(code), 60, {}, prints)], tmp_path)
    (line,) = json.loads((tmp_path / "gpu-check.json").read_text())
    assert line["verdict"] == verdict


def test_the_stages_are_in_time_and_what_they_name_is_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    stages = {stage.name: stage for stage in gpu_check.stages(tmp_path)}
    assert [*stages][:3] == ["build", "graph probe", "tests"]
    assert stages["build"].env["ADAMFUSED_CUDA_ARCHS"] == "9.0"
    # Even if the first four take all that they may, the others have what is kept back; 20 to end the last.
    first = sum(stages[name].limit for name in ("build", "graph probe", "tests", "measure"))
    assert first <= gpu_check.WHOLE - 3 * gpu_check.KEPT
    assert gpu_check.WHOLE + 20 < 9 * 60
    tests = (ROOT / "tests" / "test_gpu.py").read_text()
    for name, stage in stages.items():
        for word in stage.command:
            if word.endswith(".py"):
                assert (ROOT / word).is_file()
        if "tests/test_gpu.py" in stage.command:
            assert stage.env["ADAMFUSED_NEED_GPU"] == "1" and stage.prints
        if stage.command[0] == "compute-sanitizer":
            assert "--report-api-errors no" in " ".join(stage.command)
            for word in re.findall(r"\w+", stage.command[-1]):
                assert word in ("or", "and") or word in tests, f"{name}: {word}"
    compile(gpu_check.PROBE, "probe", "exec")


# ---- the tests on the GPU ------------------------------------------------------------------------

SHIM = """
import pytest, torch
torch.cuda.is_available = lambda: True
torch.cuda.synchronize = lambda: None
from test_gpu import ends_the_process_after_a_fault

def test_before(): pass
def test_faulty(monkeypatch, request):
    def fail(): raise RuntimeError("CUDA error: an illegal memory access\\nmore")
    if FAULT:
        torch.cuda.synchronize = fail
def test_after(): pass
"""


@pytest.mark.parametrize("fault", [True, False])
def test_a_fault_of_the_device_ends_its_process_only(tmp_path, fault) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "test_shim.py").write_text(SHIM.replace("FAULT", str(fault)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "1"]
    command += ["--dist", "worksteal", "-rfE", "test_shim.py"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert (done.returncode != 0) is fault, said
    assert ("test_faulty left a fault: CUDA error: an illegal memory access" in said) is fault, said
    assert ("crashed while running 'test_shim.py::test_faulty'" in said) is fault, said
    assert ("1 failed, 3 passed" if fault else "3 passed") in said, said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("needed", [True, False])
def test_where_a_gpu_is_needed_tests_without_one_fail(needed) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "self_test"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "ADAMFUSED_NEED_GPU": str(int(needed))}
    done = subprocess.run(
        [*command, "tests/test_gpu.py"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) is needed, done.stdout
    assert ("finds no CUDA device" in done.stdout) is needed, done.stdout


# ---- what is measured ----------------------------------------------------------------------------

NO_ROOM = "NOT SUPPORTED: parameters and gradients take 32.0 GB, and 8.0 GB are free"
OUT_OF_MEMORY = "NOT SUPPORTED: OutOfMemoryError: CUDA out of memory."
FAULT = "NOT SUPPORTED: AcceleratorError: CUDA error: an illegal memory access was encountered"


@pytest.fixture
def measured(monkeypatch) -> Callable[..., int]:
    """What gpu.py returns on a GPU on which these optimizers have this problem; else all take the same time, or ours
    ten times as long."""

    def run(problem: str = "", of: str = "nobody", slow: bool = False, no_fail: bool = True) -> int:
        interval = Interval(0.1, 0.1, 0.1) if slow else Interval(4.0, 4.0, 4.0)

        def bench(optimizers, cases, **_) -> Report:
            rows = [
                Row(name, case.name, len(case.shapes), case.numel, problem)
                if re.match(of, name)
                else Row(name, case.name, 1, 1, time=interval, ratio=interval, share=interval)
                for case in cases
                for name in optimizers
            ]
            return Report({}, "cuda", "float32", [], 1, rows)

        monkeypatch.setattr(gpu, "bench", bench)
        monkeypatch.setattr(gpu, "optional", lambda package: True)  # apex
        return gpu.judge(gpu.parts(0.1), argparse.Namespace(json=None, no_fail=no_fail))

    return run


@pytest.mark.parametrize("no_fail", [True, False])
def test_a_target_that_is_missed_may_be_forgiven(measured, capsys, no_fail) -> None:
    assert measured(no_fail=no_fail) == 0
    assert measured(slow=True, no_fail=no_fail) == (0 if no_fail else 1)
    assert "10 of 10 targets met" in (said := capsys.readouterr().out)
    assert "0 of 10 targets met" in said.splitlines()


@pytest.mark.parametrize("problem", [FAULT, OUT_OF_MEMORY, "INVALID: 3 of 1000 differ"])
def test_an_optimizer_of_ours_that_fails_is_not_forgiven(measured, capsys, problem) -> None:
    """Another one is, if some are measured."""
    assert measured(problem, "apex") == 0
    assert f"SKIP  GPT-2 XL, float32, {gpu.APEX}: {problem}" in capsys.readouterr().out
    for ours in (gpu.NATIVE, gpu.CAPTURABLE):
        assert measured(problem, re.escape(ours)) == 1
        assert f"FAIL  {ours}, GPT-2 XL: {problem}" in capsys.readouterr().out


def test_what_memory_has_no_room_for_is_skipped_but_something_has_to_be_measured(
    measured, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(gpu, "count_launches", lambda: ("launches", [], None))
    assert measured(NO_ROOM, "") == 1
    said = capsys.readouterr().out
    assert f"SKIP  llama_8b: {NO_ROOM}" in said and "FAIL" not in said
    assert "0 of 0 targets met" in said


def test_a_profiler_counts_after_all_is_timed(monkeypatch) -> None:
    counted = []

    def bench(optimizers, cases, launches=True, **_) -> Report:
        counted.append(launches)
        return Report({}, "cuda", "float32", [], 1, [Row(o, "", 1, 1, "no") for o in optimizers])

    monkeypatch.setattr(gpu, "bench", bench)
    assert len(list(gpu.parts(0.1))) == 9
    assert counted == 8 * [False] + [True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu_check.py", "gpu.py"])
def test_without_a_gpu_it_says_so(tmp_path, script) -> None:
    command = [sys.executable, ROOT / "benchmarks" / script]
    command += [tmp_path] if script == "gpu_check.py" else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"torch {torch.__version__} finds no CUDA device" in done.stdout + done.stderr
