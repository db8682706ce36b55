"""``adamfused info``: what it says of this machine, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import adamfused
from adamfused import backend, machine
from adamfused.__main__ import main
from adamfused.info import DTYPES, OPTIMIZERS, info

pytestmark = pytest.mark.reference


def test_every_optimizer_and_dtype_is_stepped_on_every_device() -> None:
    found = adamfused.info()
    assert found.ok, [use for use in found.uses if use.test != "PASS"]
    devices = 1 + torch.cuda.device_count()
    assert len(found.uses) == devices * len(OPTIMIZERS) * len(DTYPES)
    on_cpu = {use.backend for use in found.uses if use.device == "cpu"}
    assert on_cpu == {"native" if backend.choose(None) != "reference" else "reference"}


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    make = adamfused.RMSprop

    def wrong(params, lr, **others):
        return make(
            params, lr=lr * (1 + 1e-6) if others["backend"] != "reference" else lr, **others
        )

    monkeypatch.setattr(adamfused, "RMSprop", wrong)
    monkeypatch.setenv("ADAMFUSED_BACKEND", "auto")
    if backend.choose(None) == "reference":
        pytest.skip("both sides are the reference")
    found = info()
    assert not found.ok
    failed = {(use.optimizer, use.dtype) for use in found.uses if use.test != "PASS"}
    assert {("RMSprop", "float32"), ("RMSprop", "float64")} <= failed
    assert {optimizer for optimizer, _ in failed} == {"RMSprop"}
    assert all("results differ" in use.test for use in found.uses if use.test != "PASS")


def test_the_reference_is_said_and_why(monkeypatch, capsys) -> None:
    monkeypatch.setenv("ADAMFUSED_BACKEND", "reference")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "reference" in out and "set here:    ADAMFUSED_BACKEND=reference" in out


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("ADAMFUSED_BACKEND", "natve", "must be one of auto, native, reference, got 'natve'"),
        ("ADAMFUSED_ISA", "sse9", "ADAMFUSED_ISA=sse9"),
    ],
)
def test_what_is_forced_and_cannot_be_had_is_exit_1(
    monkeypatch, capsys, name, value, message
) -> None:
    if name == "ADAMFUSED_ISA" and backend.NATIVE_ERROR:
        pytest.skip("without kernels there is no instruction set to choose")
    monkeypatch.setenv(name, value)
    assert main(["info"]) == 1
    assert message in capsys.readouterr().err
    assert main(["info", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert message in found["problem"] and not found["ok"]


def test_as_json_it_is_whole(capsys) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["facts"]["torch"] == torch.__version__
    assert found["isas"] == (dict(backend._C.isas()) if backend._C else {})
    assert {"device", "dtype", "optimizer", "backend", "reason", "test"} == set(found["uses"][0])


def test_it_is_installed_as_a_program_too() -> None:
    program = Path(sys.executable).with_name("adamfused")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"adamfused {adamfused.__version__}\n"


def others_running_and_with_two_more() -> tuple[float, float]:
    end = time.monotonic() + 1
    while time.monotonic() < end:  # this process's own past
        pass
    quiet = min(machine.others_running() for _ in range(3))
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(2)]
    try:
        time.sleep(0.5)
        return quiet, min(machine.others_running() for _ in range(3))
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_other_work_is_noticed_and_ones_own_past_is_not() -> None:
    # Other tests run meanwhile, and may end just then.
    for _ in range(5):
        quiet, busy = others_running_and_with_two_more()
        assert busy > 1.2
        if quiet < busy - 1:
            return
    pytest.fail(f"two more processes are not seen: {quiet} before, {busy} with them")
