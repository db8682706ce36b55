"""Builds the one extension module, ``adamfused._C``; the metadata is in pyproject.toml.

Environment variables:
  ADAMFUSED_BUILD       auto (default): CPU kernels, and CUDA kernels where nvcc is found;
                        what cannot be built is left out, with one line that says why
                        cpu, cuda: without or with CUDA, and what cannot be built is an error
                        none: pure Python, for which no compiler and no torch are needed
  ADAMFUSED_CUDA_ARCHS  such as "8.0;9.0"; default: each of DEFAULT_ARCHS that nvcc knows
  ADAMFUSED_DEBUG       1: -O0 -g
  CUDA_HOME, CXX, MAX_JOBS  as in torch.utils.cpp_extension
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("ADAMFUSED_BUILD") or "auto"
ARCHS = re.findall(r"[^;, ]+", os.environ.get("ADAMFUSED_CUDA_ARCHS", ""))
DEFAULT_ARCHS = (
    "8.0",
    "9.0",
    "10.0",
    "12.0",
)  # code for one runs on all that have its first number, from it on
DEBUG = os.environ.get("ADAMFUSED_DEBUG", "0") not in ("", "0")
CXX = shlex.split(os.environ.get("CXX") or "c++")
NO_TORCH = """adamfused: torch cannot be imported in this build ({}).
The kernels are compiled against the torch you run, which pip hides from a build by default. Use
    pip install --no-build-isolation ...
in an environment that has torch, or, for the pure-Python version, ADAMFUSED_BUILD=none."""

# Contracted arithmetic would make results differ between instruction sets. -march=native is out:
# each file has its own instruction set, and one is chosen at run time. -g0: Python adds a -g.
CXX_FLAGS = ["-O0", "-g"] if DEBUG else ["-O3", "-g0", "-DNDEBUG"]
CXX_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
CXX_FLAGS += ["-fPIC", "-fvisibility=hidden", f"-I{CSRC}"]
NVCC_FLAGS = ["-O0", "-g"] if DEBUG else ["-O3", "-DNDEBUG"]
NVCC_FLAGS += [
    "-std=c++17",
    "-fmad=false",
    "-Xfatbin=-compress-all",  # each kernel has 32 KB of zeros, the place of its arguments
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
    f"-I{CSRC}",
]
ISAS = {"scalar": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = "-mavx2"
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"


class BuildError(Exception):
    """The message is one line, fit to be shown as the reason."""


def say(text):
    print(f"adamfused: {text}", file=sys.stderr, flush=True)


def run(*command):
    """The output of a compiler; if it fails, all of it is shown and one line is the reason."""
    try:
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error.strerror}") from None
    if done.returncode:
        print(*command, "\n" + done.stdout, file=sys.stderr, flush=True)
        lines = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
        raise BuildError(next((line for line in lines if "error" in line.lower()), lines[-1]))
    return done.stdout


def jobs():
    """MAX_JOBS, or as many as there are cores and 2 GB of free memory for each."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores, meminfo = os.cpu_count() or 1, Path("/proc/meminfo")
    free = re.search(r"MemAvailable:\s*(\d+)", meminfo.read_text()) if meminfo.exists() else None
    return max(1, min(cores, int(free[1]) // (2 << 20))) if free else cores


def compile_one(name, folder, command):
    """Compiles, unless the object is newer than all that made it and this command made it."""
    obj = str(Path(folder, name).with_suffix(".o"))
    command = [*command, "-MD", "-MF", f"{obj}.d", "-c", str(CSRC / name), "-o", obj]
    made_by = Path(f"{obj}.cmd")
    try:
        parts = Path(f"{obj}.d").read_text().replace("\\\n", " ").split(":", 1)[1].split()
        newest = max(os.path.getmtime(part) for part in parts)
        if made_by.read_text() == shlex.join(command) and newest < os.path.getmtime(obj):
            return obj
    except (OSError, IndexError):
        pass  # not made yet, or a part of it has gone
    made_by.parent.mkdir(parents=True, exist_ok=True)
    made_by.unlink(missing_ok=True)
    say(f"compiling csrc/{name}")
    print(run(*command), end="")
    made_by.write_text(shlex.join(command))
    return obj


def compile_all(folder, commands):
    with ThreadPoolExecutor(jobs()) as pool:
        tasks = [pool.submit(compile_one, name, folder, cmd) for name, cmd in commands.items()]
    return [task.result() for task in tasks]


def cuda_commands():
    """Commands by source, what to link, and facts. It makes no difference whether this torch has CUDA."""
    home, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    homes = [Path(home or "/usr/local/cuda")]
    if nvcc and not home:  # may be a script outside of the toolkit: then the check below fails
        homes.insert(0, Path(nvcc).resolve().parent.parent)
    found = [(h / "bin/nvcc", lib) for h in homes for lib in h.glob("lib*/libcudart_static.a")]
    found = [(str(nvcc), str(cudart)) for nvcc, cudart in found if nvcc.exists()]
    if not found:
        raise BuildError(f"no bin/nvcc with libcudart_static.a in {' or '.join(map(str, homes))}")
    nvcc, cudart = found[0]
    release = re.search(r"release (\d+\.\d+)", run(nvcc, "--version"))[1]
    known = {f"{n[:-1]}.{n[-1]}" for n in re.findall(r"sm_(\d+)\b", run(nvcc, "--list-gpu-code"))}
    archs = ARCHS or [arch for arch in DEFAULT_ARCHS if arch in known]
    if not known.issuperset(archs):
        raise BuildError(f"nvcc {release} knows no ADAMFUSED_CUDA_ARCHS={';'.join(archs)}")
    codes = sorted((arch.replace(".", "") for arch in archs), key=int)
    flags = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
    flags.append(f"-gencode=arch=compute_{codes[-1]},code=compute_{codes[-1]}")  # for later GPUs
    command = [nvcc, *NVCC_FLAGS, *flags, f"--threads={jobs()}"]
    names = sorted(f"cuda/{path.name}" for path in (CSRC / "cuda").glob("*.cu"))
    link = [cudart, "-ldl", "-lrt", "-lpthread"]
    return dict.fromkeys(names, command), link, {"cuda": release, "cuda_archs": archs}


class BuildPy(build_py):
    def run(self):
        # A wheel would ship, and an editable install load, what an earlier build left behind.
        shutil.rmtree(Path(self.build_lib, "adamfused"), ignore_errors=True)
        if MODE == "none" and self.editable_mode:
            remove_built(ROOT / "adamfused")
        super().run()


def remove_built(folder):
    for path in [*folder.glob("_C*.so"), *folder.glob("_build.json")]:
        path.unlink()


def with_kernels():
    """The arguments of setup() for the extension."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(NO_TORCH.format(error)) from None

    class BuildKernels(BuildExtension):
        """Has torch build binding.cpp, the only source that includes torch. The others each
        need flags of their own, which BuildExtension cannot give, and so come as objects."""

        def finalize_options(self):
            super().finalize_options()
            # Kept from one editable install to the next, and apart for each Python and torch.
            name = f"temp.{self.plat_name}-{sys.implementation.cache_tag}-torch{torch.__version__}"
            self.kept = str(ROOT / "build" / name)
            self.force = True  # linking is quick, and each object is checked

        def run(self):
            folders = [Path(self.build_lib, "adamfused"), *([ROOT / "adamfused"] * self.inplace)]
            self.facts = {"version": self.distribution.get_version(), "torch": torch.__version__}
            try:
                run(*CXX, "--version")
                if not Path(sysconfig.get_path("include"), "Python.h").exists():
                    raise BuildError("no Python.h (Debian, Ubuntu: apt install python3-dev)")
                super().run()
            except Exception as error:
                reason = (str(error).strip() or repr(error)).split("\n")[0]
                if MODE != "auto":
                    raise SystemExit(f"adamfused: ADAMFUSED_BUILD={MODE}: {reason}") from error
                say(f"no kernels, only pure Python: {reason}")
                self.facts["error"], self.extensions = reason, []
                for folder in folders:
                    remove_built(folder)
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "_build.json").write_text(json.dumps(self.facts) + "\n")

        def build_extension(self, ext):
            cuda = {"cuda": None, "cuda_archs": []}
            try:
                if MODE != "cpu":
                    return self.build_with(ext, *cuda_commands())
            except Exception as error:
                if MODE == "cuda":
                    raise
                cuda["cuda_error"] = f"{error}"
                say(f"no CUDA kernels: {error}")
            self.build_with(ext, {}, [], cuda)

        def build_with(self, ext, more, link, cuda):
            self.build_temp = f"{self.kept}-cuda" if cuda["cuda"] else f"{self.kept}-nocuda"
            cxx = [*CXX, *CXX_FLAGS, "-Wextra", "-std=c++17"]
            # Baseline code first: of an inline function that several files have, the linker
            # keeps the first, which must run on any CPU.
            commands = {"cpu/isa.cpp": cxx}
            commands |= {f"cpu/{isa}.cpp": [*cxx, *flags.split()] for isa, flags in ISAS.items()}
            ext.extra_objects = compile_all(self.kept, commands | more)
            ext.define_macros = [("ADAMFUSED_WITH_CUDA", None)] if cuda["cuda"] else []
            ext.extra_link_args = link
            super().build_extension(ext)
            self.facts |= {**cuda, "isas": list(ISAS), "debug": DEBUG}

    # at::parallel_for is serial without -fopenmp. The linker does not get it, because it is
    # torch's OpenMP runtime that must be used, and not a second one.
    flags = [*CXX_FLAGS, "-fopenmp"]
    kernels = CppExtension("adamfused._C", ["csrc/binding.cpp"], extra_compile_args=flags)
    return {"ext_modules": [kernels], "cmdclass": {"build_py": BuildPy, "build_ext": BuildKernels}}


if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit("adamfused: setuptools is too old: pip install 'setuptools>=77'")
if MODE not in MODES:
    raise SystemExit(f"adamfused: ADAMFUSED_BUILD={MODE!r} is not one of {', '.join(MODES)}")
torchless = MODE == "none" or {"egg_info", "sdist", "clean"} & set(sys.argv)
setuptools.setup(**({"cmdclass": {"build_py": BuildPy}} if torchless else with_kernels()))
