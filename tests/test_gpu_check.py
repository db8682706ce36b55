"""``make gpu-check`` without a GPU: its stages run one after the other, whatever becomes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
gpu_check = pytest.importorskip("gpu_check", reason="needs the checkout")


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


def test_the_whole_takes_less_than_nine_minutes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    stages = gpu_check.stages(tmp_path)
    assert sum(stage.limit for stage in stages) < 9 * 60
    assert stages[0].env["ADAMFUSED_CUDA_ARCHS"] == "9.0"
    for stage in stages:  # what they name is there
        for word in stage.command:
            if word.endswith(".py"):
                assert (ROOT / word).is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu_check.py", "gpu.py"])
def test_without_a_gpu_it_says_so(tmp_path, script) -> None:
    command = [sys.executable, ROOT / "benchmarks" / script]
    command += [tmp_path] if script == "gpu_check.py" else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"torch {torch.__version__} finds no CUDA device" in done.stdout + done.stderr
