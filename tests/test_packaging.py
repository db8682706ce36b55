"""What is built, what is shipped, and what is said when it cannot be."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import adamfused

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parent.parent
CLEAN_ENV = {name: value for name, value in os.environ.items() if not name.startswith("ADAMFUSED_")}
HOOK = """
import sys
from setuptools import build_meta
print("made:", getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def python(*arguments, cwd, **env):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**CLEAN_ENV, **env},
        text=True,
        capture_output=True,
    )


def build(tree, folder, hook="build_wheel", **env):
    """The path of what a hook of the build backend makes: what pip calls, without pip's isolation."""
    done = python("-c", HOOK, hook, folder, cwd=tree, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.rsplit("made: ", 1)[1].strip()


def build_error(tree, folder, hook="build_wheel", **env):
    done = python("-c", HOOK, hook, folder, cwd=tree, **env)
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


def names_in(wheel):
    return zipfile.ZipFile(wheel).namelist()


def facts_in(wheel):
    return json.loads(zipfile.ZipFile(wheel).read("adamfused/_build.json"))


@pytest.fixture
def tree(tmp_path):
    """A copy of the source tree in which an earlier build in place has left its results."""
    copy = tmp_path / "tree"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    (copy / "adamfused" / "_C.so").write_text("left over")
    (copy / "adamfused" / "_build.json").write_text("left over")
    return copy


@pytest.fixture
def no_torch(tmp_path):
    """A PYTHONPATH on which torch cannot be imported, as in an isolated build."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "torch.py").write_text("raise ImportError('no torch here')")
    return str(tmp_path / "hidden")


def test_pure_wheel_has_nothing_compiled(tree, tmp_path, no_torch):
    wheel = build(tree, tmp_path, ADAMFUSED_BUILD="none", PYTHONPATH=no_torch)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = names_in(wheel)
    assert {"adamfused/__init__.py", "adamfused/py.typed"} <= set(names)
    assert not [name for name in names if name.endswith((".so", "_build.json"))]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"adamfused"}


def test_pure_editable_install_removes_what_was_compiled(tree, tmp_path):
    build(tree, tmp_path, "build_editable", ADAMFUSED_BUILD="none")
    assert not (tree / "adamfused" / "_C.so").exists()
    assert not (tree / "adamfused" / "_build.json").exists()


def test_sdist_needs_no_torch_and_has_what_a_build_needs(tree, tmp_path, no_torch):
    sdist = build(tree, tmp_path, "build_sdist", PYTHONPATH=no_torch)
    names = {name.split("/", 1)[-1] for name in tarfile.open(sdist).getnames()}
    sources = {str(f.relative_to(tree)) for f in (tree / "csrc").rglob("*.*")}
    assert sources | {"setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", "_build.json"))]


@pytest.mark.parametrize("hook", ["prepare_metadata_for_build_wheel", "build_wheel"])
def test_without_torch_it_says_what_to_do(tree, tmp_path, no_torch, hook):
    error = build_error(tree, tmp_path, hook, PYTHONPATH=no_torch)
    assert "no torch here" in error
    assert "pip install --no-build-isolation" in error
    assert "ADAMFUSED_BUILD=none" in error


def test_unknown_mode(tree, tmp_path):
    error = build_error(tree, tmp_path, ADAMFUSED_BUILD="fast")
    assert error == "adamfused: ADAMFUSED_BUILD='fast' is not one of auto, cpu, cuda, none\n"


def test_cuda_is_demanded_but_not_there(tree, tmp_path):
    missing = str(tmp_path / "missing")
    error = build_error(tree, tmp_path, ADAMFUSED_BUILD="cuda", CUDA_HOME=missing)
    assert (
        f"adamfused: ADAMFUSED_BUILD=cuda: no bin/nvcc with libcudart_static.a in {missing}"
        in error
    )


def test_without_a_compiler(tree, tmp_path):
    missing = str(tmp_path / "missing-c++")
    reason = f"cannot run {missing}: No such file or directory"
    assert f"ADAMFUSED_BUILD=cpu: {reason}" in build_error(
        tree, tmp_path, ADAMFUSED_BUILD="cpu", CXX=missing
    )
    wheel = build(tree, tmp_path, CXX=missing)
    assert facts_in(wheel) == {
        "version": adamfused.__version__,
        "torch": torch.__version__,
        "error": reason,
    }
    assert not [name for name in names_in(wheel) if name.endswith(".so")]


# ---- with the kernels


@pytest.fixture(scope="module")
def native_wheel(tmp_path_factory):
    """Built in the source tree, where setup.py keeps the objects for the next time."""
    if shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0]) is None:
        pytest.skip("no C++ compiler")
    return build(ROOT, tmp_path_factory.mktemp("wheel"), ADAMFUSED_BUILD="cpu")


@pytest.fixture
def installed(native_wheel, tmp_path):
    target = tmp_path / "site"
    done = python(
        *("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"),
        *("--target", target, native_wheel),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return target


def a_step(target):
    """The facts of a step in a process of its own, and what that process wrote to stderr."""
    code = """
import json, adamfused, torch
from adamfused import backend
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
optimizer = adamfused.AdamW([param], lr=0.1)
for _ in range(2):
    optimizer.step()
print(json.dumps([adamfused.__file__, backend.NATIVE_ERROR, param.tolist()]))
"""
    done = python("-c", code, cwd=target, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    file, error, param = json.loads(done.stdout)
    assert file == str(target / "adamfused" / "__init__.py")
    return error, param, done.stderr


@pytest.mark.slow
def test_native_wheel_has_the_extension_and_its_facts(native_wheel):
    names = names_in(native_wheel)
    assert len([name for name in names if name.startswith("adamfused/_C.")]) == 1
    assert "adamfused/py.typed" in names
    facts = facts_in(native_wheel)
    isas = facts.pop("isas")
    assert isas == ["scalar", "avx2", "avx512"] or isas == ["scalar"]
    assert facts == {
        "version": adamfused.__version__,
        "torch": torch.__version__,
        "cuda": None,
        "cuda_archs": [],
        "debug": False,
    }


@pytest.mark.slow
def test_native_wheel_works_where_it_is_installed(installed):
    error, param, stderr = a_step(installed)
    assert error is None
    assert stderr == ""
    assert param == pytest.approx([0.798101] * 3, abs=1e-6)


@pytest.mark.slow
def test_another_torch_means_one_warning_and_pure_python(installed):
    native = a_step(installed)[1]
    file = installed / "adamfused" / "_build.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "torch": "0.0.1"}))
    error, param, stderr = a_step(installed)
    assert error == f"they were built for torch 0.0.1, this is torch {torch.__version__}"
    assert stderr.count(error) == 1
    assert param == native
