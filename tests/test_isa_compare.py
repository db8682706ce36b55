"""The kernels of every instruction set leave the same bits as the scalar ones, bit for bit and without torch: a C++
program compares those that this processor has. ``tests/emulated/run.sh --bochs`` runs it on an emulated processor that
has AVX-512, which takes too long to be part of the suite."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "tests" / "emulated" / "run.sh"

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++ to build the comparison with"
)


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The program, and what it printed when it was built and made every comparison."""
    folder = tmp_path_factory.mktemp("compare_isas")
    env = {**os.environ, "BUILD": str(folder), "CXX": "g++"}
    done = subprocess.run(["bash", RUN], env=env, capture_output=True, text=True, check=False)
    assert (folder / "compare_isas").exists(), done.stdout + done.stderr
    return folder / "compare_isas", done


def rows(output: str) -> dict[str, tuple[int, int, str]]:
    """Of each instruction set: the number of comparisons, of differences, and the digest of all results."""
    found = re.findall(r"^(\w+): (\d+) comparisons, (\d+) differences, digest (\w+)$", output, re.M)
    return {
        isa: (int(compared), int(different), digest) for isa, compared, different, digest in found
    }


def test_every_instruction_set_leaves_the_same_bits(built):
    _, done = built
    found = rows(done.stdout)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scalar" in found
    assert {compared > 1_000_000 for compared, _, _ in found.values()} == {True}
    assert {different for _, different, _ in found.values()} == {0}
    assert len({digest for _, _, digest in found.values()}) == 1


def test_another_compiler_makes_the_same_bits(built, tmp_path):
    names = ["clang++", *(f"clang++-{version}" for version in range(25, 12, -1))]
    clang = next((name for name in names if shutil.which(name)), None)
    if clang is None:
        pytest.skip("no clang++")
    env = {**os.environ, "BUILD": str(tmp_path), "CXX": clang}
    done = subprocess.run(["bash", RUN], env=env, capture_output=True, text=True, check=False)
    assert rows(done.stdout) == rows(built[1].stdout), done.stdout + done.stderr


def test_it_compares_what_the_extension_would_run(built):
    """An instruction set that torch finds here is among those that were compared."""
    capability = pytest.importorskip("torch").backends.cpu.get_cpu_capability()
    found = rows(built[1].stdout)
    if capability in ("AVX2", "AVX512"):
        assert capability.lower() in found


def test_one_flipped_bit_is_found(built):
    program, done = built
    if len(rows(done.stdout)) == 1:
        pytest.skip("this processor has none but the scalar kernels")
    broken = subprocess.run(
        [program, "--every=100", "--break"], capture_output=True, text=True, check=False
    )
    found = rows(broken.stdout)
    assert broken.returncode == 1
    assert found["scalar"][1] == 0
    assert all(different > 0 for isa, (_, different, _) in found.items() if isa != "scalar"), (
        broken.stdout
    )
    assert "sgd_momentum, step 1" in broken.stdout


def test_an_instruction_set_that_does_not_run_is_an_error(built):
    done = subprocess.run(
        [built[0], "--every=100", "scalar", "avx99"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "avx99: does not run here" in done.stdout
    assert "scalar: does not run here" not in done.stdout


def test_the_flags_are_those_of_the_extension():
    """With other flags it would compare other code than what ships."""
    script = RUN.read_text()
    theirs = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target).split("[")[0] in ("CXX_FLAGS", "ISAS"):
                parts = [
                    part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)
                ]
                theirs |= {flag for part in parts for flag in str(part).split() if flag[0] == "-"}
    assert theirs >= {"-O3", "-ffp-contract=off", "-mavx2", "-mavx512f"}
    assert theirs - {"-O0", "-g", "-I"} <= set(re.findall(r'[^\s"]+', script))
