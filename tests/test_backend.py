"""Which path runs, and what is said when it is not the native one."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from helpers import threads

import adamfused
from adamfused import backend

PACKAGE = Path(adamfused.__file__).parent
STEP = """
import torch, adamfused
p = torch.ones(5, requires_grad=True); p.grad = torch.ones(5)
for _ in range(3): adamfused.AdamW([p]).step()
adamfused.RMSprop([p]).step()
print(p.detach().view(torch.int32).tolist())
"""


def run(code: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds adamfused in `path`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ADAMFUSED_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"PYTHONPATH": str(path)} | environment,
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def pure(tmp_path: Path) -> Path:
    """A folder with a copy of the package that has no extension."""
    ignore = shutil.ignore_patterns("_C*", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "adamfused", ignore=ignore)
    return tmp_path


@pytest.mark.reference
def test_without_an_extension_it_says_so_once_and_gives_the_same_bits(pure: Path) -> None:
    done = run(STEP, pure)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "adamfused uses" in line]
    assert len(said) == 1
    assert said[0].endswith(
        "UserWarning: adamfused uses its pure-Python path, which is exact but slow: the native kernels cannot be had: "
        "this is a pure-Python install (no compiled extension). Rebuild with: " + backend.REBUILD
    )
    here = run(STEP, PACKAGE.parent)
    assert here.stdout == done.stdout != ""


@pytest.mark.reference
def test_asked_for_it_says_nothing(pure: Path) -> None:
    done = run(STEP, pure, ADAMFUSED_BACKEND="reference")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.reference
@pytest.mark.parametrize(
    ("environment", "argument", "said"),
    [
        ({"ADAMFUSED_BACKEND": "native"}, "", "ADAMFUSED_BACKEND='native'"),
        ({}, "backend='native'", "backend='native'"),
    ],
)
def test_forced_native_that_cannot_be_had_is_an_error(
    pure: Path, environment, argument, said
) -> None:
    code = (
        f"import torch, adamfused\nadamfused.AdamW([torch.ones(1, requires_grad=True)], {argument})"
    )
    done = run(code, pure, **environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"RuntimeError: {said} was asked for, but the native kernels cannot be had: this is a pure-Python install (no "
        f"compiled extension). Rebuild with: {backend.REBUILD}; or use {said.split('=')[0]}='auto'"
    )


@pytest.mark.reference
def test_an_extension_built_for_another_torch_is_not_loaded(pure: Path) -> None:
    (pure / "adamfused" / "_C.py").write_text("raise SystemExit('must not be imported')")
    (pure / "adamfused" / "_build.json").write_text(json.dumps({"torch": "1.13.1+cpu"}))
    done = run(STEP, pure)
    assert done.returncode == 0
    assert f"they were built for torch 1.13.1+cpu, this is torch {torch.__version__}" in done.stderr
    (pure / "adamfused" / "_build.json").write_text(json.dumps({"torch": torch.__version__}))
    assert run(STEP, pure).stderr.strip() == "must not be imported"  # the check can fail


@pytest.mark.reference
def test_a_failed_build_and_a_broken_file_are_told(pure: Path) -> None:
    facts = pure / "adamfused" / "_build.json"
    facts.write_text(json.dumps({"error": "no compiler", "torch": torch.__version__}))
    assert "building them failed: no compiler" in run(STEP, pure).stderr
    facts.write_text("{")
    done = run(STEP, pure)
    assert done.returncode == 0 and "_build.json cannot be read" in done.stderr
    facts.unlink()
    (pure / "adamfused" / "_C.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    assert "the extension does not load: undefined symbol: _ZN3c10" in run(STEP, pure).stderr


@pytest.mark.native
def test_a_wrong_instruction_set_is_an_error_and_import_is_not() -> None:
    for wanted in ("mmx", "avx512"):
        if wanted == "avx512" and dict(backend._C.isas()).get("avx512"):
            continue
        done = run(
            "import adamfused; print('imported')\n" + STEP, PACKAGE.parent, ADAMFUSED_ISA=wanted
        )
        assert done.stdout == "imported\n"
        assert f"ValueError: ADAMFUSED_ISA={wanted}: " in done.stderr


@pytest.mark.reference
def test_a_wrong_choice_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="^backend must be one of auto, native, reference, got 'fast'$"
    ):
        adamfused.Adam([torch.ones(1, requires_grad=True)], backend="fast")


@pytest.mark.native
def test_the_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(adamfused.reference, "step", lambda *a, **k: calls.append(a))
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    monkeypatch.setenv("ADAMFUSED_BACKEND", "reference")
    adamfused.AdamW([p], backend="native").step()
    assert calls == []
    adamfused.AdamW([p]).step()
    assert len(calls) == 1


@pytest.mark.reference
def test_import_is_quick() -> None:
    """Under 0.3 s beyond `import torch`: the median of five, each in an interpreter of its own."""

    def seconds() -> float:
        code = "import time, torch; t = time.perf_counter(); import adamfused; print(time.perf_counter() - t)"
        return float(run(code, PACKAGE.parent).stdout)

    assert statistics.median(seconds() for _ in range(5)) < 0.3


@pytest.mark.native
@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    """Both ends of one huge tensor move, and every element between."""
    n = 2**31 + 17
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < 14e9:
        pytest.skip(f"needs 14 GB of free memory, this machine has {available / 1e9:.1f}")
    p = torch.zeros(n, dtype=torch.bfloat16).requires_grad_()
    p.grad = torch.zeros(n, dtype=torch.bfloat16)
    places = [0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, n - 1]
    p.grad[places] = torch.arange(1, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        p += 1
    optimizer = adamfused.RMSprop(
        [p], lr=0.5, eps=1.0, weight_decay=0.5, state_dtype="param", backend="native"
    )
    optimizer.step()
    few = torch.ones(8, dtype=torch.bfloat16).requires_grad_()
    few.grad = torch.arange(0, 8, dtype=torch.bfloat16)
    adamfused.RMSprop(
        [few], lr=0.5, eps=1.0, weight_decay=0.5, state_dtype="param", backend="reference"
    ).step()
    assert torch.equal(p.detach()[places], few.detach()[1:])
    moved = sum(
        int((part == few.detach()[0]).sum()) for part in p.detach().split(2**26)
    )  # a sum takes 8 n bytes
    assert moved == n - len(places)


def aliased(n: int) -> torch.Tensor:
    """A float32 tensor of n elements in 64 MB of memory, mapped again and again at addresses in a row."""
    each = 2**26
    count = -(-4 * n // each)
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    file = os.memfd_create("aliased")
    os.ftruncate(file, each)
    private, fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0x10  # Python's mmap has no MAP_FIXED
    start = libc.mmap(None, count * each, 0, private, -1, 0)  # addresses only
    for at in range(start, start + count * each, each):
        access = mmap.PROT_READ | mmap.PROT_WRITE
        assert libc.mmap(at, each, access, mmap.MAP_SHARED | fixed, file, 0) == at
    os.close(file)
    memory = (ctypes.c_float * n).from_address(start)
    weakref.finalize(memory, libc.munmap, start, count * each)
    return torch.frombuffer(memory, dtype=torch.float32)


@pytest.mark.native
@pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")
def test_more_than_2_to_the_31_elements_of_one_thread() -> None:
    """Each step halves a weight, and the weights of a place in the 64 MB are so many; none is left out."""
    n, place = 2**31 + 17, 2**24
    p, g, m, v = (aliased(n) for _ in range(4))
    p[:place] = 2.0**100
    p.requires_grad_().grad = g
    optimizer = adamfused.AdamW([p], lr=1.0, weight_decay=0.5, backend="native")
    optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": m, "exp_avg_sq": v}
    with threads(1):
        optimizer.step()
    times = 100 - torch.log2(p.detach()[:place])
    expected = torch.full((place,), float(n // place))
    expected[: n % place] += 1
    assert torch.equal(times, expected)
