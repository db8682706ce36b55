"""What can be seen of the CUDA kernels without a GPU: they compile for every architecture without spills, move 16
bytes at a time, and the extension says cleanly that there is no device."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
KERNELS = {"step.cu": 13 * 6, "averaged.cu": 13 * 6, "sum.cu": 3}
"""Of each file: rules of six kinds, without an average and with one; sums of squares and of numbers, the largest."""
ARCHITECTURES = ("80", "90", "100", "120")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


NVCC = find_nvcc()
FATBINARY = str(Path(NVCC or "nvcc").resolve().with_name("fatbinary"))
needs_nvcc = pytest.mark.skipif(
    NVCC is None, reason="no nvcc on this machine: the CUDA kernels are not compiled"
)
needs_source = pytest.mark.skipif(not CSRC.exists(), reason="run outside of a source checkout")
FLAGS = ["-O3", "-std=c++17", "-fmad=false", f"-I{CSRC}"]


def nvcc(*arguments: str) -> str:
    assert NVCC is not None
    done = subprocess.run([NVCC, *FLAGS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def kernels_with_spills(ptxas: str) -> list[str]:
    """The kernels that ptxas -v says use local memory. Its lines come in pairs: the kernel, then its numbers."""
    found, kernel = [], "?"
    for line in ptxas.splitlines():
        if match := re.search(
            r"(?:Compiling entry function|Function properties for) '?([\w$]+)", line
        ):
            kernel = match[1]
        if match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            if match.groups() != ("0", "0", "0"):
                found.append(f"{kernel}: {line.strip()}")
    return found


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each file of kernels as PTX of the lowest architecture, which all others can assemble."""
    if NVCC is None:
        pytest.skip("no nvcc on this machine: the CUDA kernels are not compiled")
    folder = tmp_path_factory.mktemp("ptx")
    made = {name: folder / f"{name}.ptx" for name in KERNELS}
    lowest = f"-gencode=arch=compute_{ARCHITECTURES[0]},code=compute_{ARCHITECTURES[0]}"

    def compile_one(name: str) -> None:
        nvcc(lowest, "-ptx", str(CSRC / "cuda" / name), "-o", str(made[name]))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, made))
    return made


class Assembled(NamedTuple):
    """What ptxas made of all files for an architecture: what it said of each, its processor time, and the object's
    bytes: compressed, as setup.py asks for."""

    said: dict[str, str]
    seconds: float
    size: int


@pytest.fixture(scope="module")
def assembled(ptx: dict[str, Path]) -> dict[str, Future[Assembled]]:
    """Of every architecture that this nvcc knows, two at a time."""

    def assemble(architecture: str) -> Assembled:
        said, size, seconds = {}, 0, 0.0
        for name, file in ptx.items():
            cubin, object_file = (
                file.with_suffix(f".{architecture}.{kind}") for kind in ("cubin", "o")
            )
            began = time.monotonic()
            said[name] = nvcc(
                f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", str(file), "-o", str(cubin)
            )
            seconds += time.monotonic() - began
            image = f"--image3=kind=elf,sm={architecture},file={cubin}"
            made = [FATBINARY, f"--create={object_file}", "--compress-all", image]
            subprocess.run(made, check=True, capture_output=True)
            size += object_file.stat().st_size
        return Assembled(said, seconds, size)

    known = nvcc("--list-gpu-code")
    with ThreadPoolExecutor(2) as pool:
        return {a: pool.submit(assemble, a) for a in ARCHITECTURES if f"sm_{a}" in known}


@needs_nvcc
@needs_source
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_on_any_architecture(
    assembled: dict[str, Future[Assembled]], architecture: str
) -> None:
    if architecture not in assembled:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    made = assembled[architecture].result()
    for name, said in made.said.items():
        compiled = re.findall(r"Compiling entry function '\w+?(step|sum)_kernel", said)
        assert len(compiled) == KERNELS[name]
        assert kernels_with_spills(said) == []
    assert "-Xfatbin=-compress-all" in (CSRC.parent / "setup.py").read_text()
    print(f"sm_{architecture}: {made.size:,} bytes, {made.seconds:.0f} s")
    assert made.size < 8e6
    assert made.seconds < 300  # a sixth of it on an idle machine; as long again for the PTX


def test_the_search_for_spills_can_find_one() -> None:
    lines = (
        "ptxas info    : Compiling entry function 'good' for 'sm_90'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Compiling entry function 'bad' for 'sm_90'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n"
    )
    assert [found.split(":")[0] for found in kernels_with_spills(lines)] == ["bad"]


def accesses(body: str, kinds: str) -> tuple[int, int]:
    """The loads and stores of global memory in a kernel's PTX that are of one of the kinds."""
    kinds = rf"\.global(?:\.\w+)*\.(?:{kinds})"
    return len(re.findall(rf"\bld{kinds}", body)), len(re.findall(rf"\bst{kinds}", body))


OF_16_BYTES, OF_8_BYTES = r"v4\.[bfsu]32|v2\.[bfsu]64", r"v2\.[bfsu]32"


@needs_nvcc
@needs_source
def test_the_aligned_path_moves_16_bytes_at_a_time(ptx: dict[str, Path]) -> None:
    """A kernel that takes E elements a thread has one 16-byte access a part for the formats of 16/E bytes, and one for
    each 16 bytes of those of up to the arithmetic's; codes of 8 bits it moves 8 at a time."""
    states = {"RMSprop": 1, "RMSpropMomentum": 2, "RMSpropCentered": 2}
    states |= {"RMSpropCenteredMomentum": 3, "Adam": 2, "AmsGrad": 3, "NAdam": 2, "RAdam": 2}
    states |= {"SGD": 0, "SGDMomentum": 1, "Adagrad": 1, "Adadelta": 2, "Lion": 1}
    # bytes of f32 (two 16-byte accesses for E = 8), of 16-bit formats; f32; f64
    accesses_a_part = {("f", 8): 2 + 1, ("f", 4): 1, ("d", 4): 2}
    rule_of = r"\w*step_kernelINS0_(?:8(Averaged)INS0_)?\d+([A-Za-z]+?)[IE][fd]EE([fd])Li(\d)ELb(\d)ELb\dEE"
    seen = 0
    text = ptx["step.cu"].read_text() + ptx["averaged.cu"].read_text()
    for entry in re.split(r"\.entry\s+", text)[1:]:
        match = re.match(rule_of, entry)
        if match is None:
            continue
        averaged, rule, arithmetic, width, stored = match.groups()
        each = accesses_a_part[arithmetic, int(width)]
        parts = 1 + states[rule] + (averaged is not None)  # that are written; a copy besides
        parts += stored == "1" and arithmetic == "f"  # what lies beside the parameter
        loads, stores = accesses(entry, OF_16_BYTES)
        assert loads >= each * (parts + 1), (match.groups(), loads)
        assert stores >= each * (parts + 1), (match.groups(), stores)
        if stored == "1" and arithmetic == "f":
            assert min(accesses(entry, OF_8_BYTES)) >= states[rule] + 1, match.groups()
        seen += 1
    assert seen == KERNELS["step.cu"] + KERNELS["averaged.cu"]
    control = "ld.global.v4.u16 st.global.f32 ld.param.v4.f32 ld.global.v2.u32"
    assert accesses(control, OF_16_BYTES) == (0, 0)  # the count can fail


@pytest.mark.native
def test_the_extension_says_cleanly_whether_there_is_a_device() -> None:
    import torch

    from adamfused import backend

    native = backend.native()
    assert native is not None
    if not native.with_cuda:
        assert "without CUDA" in str(backend.why_not_native(torch.device("cuda")))
    elif torch.cuda.is_available():
        assert native.cuda_status() is None
        assert native.cuda_self_test() is None
    else:
        assert native.cuda_status()  # a sentence of the driver's, not a crash
        assert (
            native.cuda_self_test() == native.cuda_status()
        )  # a launch is refused with the same one
