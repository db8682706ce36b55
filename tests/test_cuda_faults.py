"""Faults seeded in the CUDA kernels: what ``test_cuda_on_host.py`` would not let pass."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cuda_library import (
    BF16,
    CSRC,
    FEW_BLOCKS,
    NEEDED,
    Kernels,
    build,
    in_child,
    many,
    problems_of_a_huge_tensor,
    seams,
)

pytestmark = NEEDED


FAULTS = {
    "the body runs over the end": (
        "step.cuh",
        "entry.aligned ? n / E * E : 0",
        "entry.aligned ? (n + E - 1) / E * E : 0",
    ),
    "the tail begins too early": (
        "step.cuh",
        "int i = body + int(threadIdx.x); i < n",
        "int i = int(threadIdx.x); i < n",
    ),
    "the tail leaves some out": ("step.cuh", "i < n; i += kThreads)", "i < n; i += kThreads * E)"),
    "the body leaves some out": (
        "step.cuh",
        "i < body; i += kThreads * E)",
        "i < body; i += 2 * kThreads * E)",
    ),
    "aligned accesses to all": ("step.cuh", "entry.aligned ? n / E * E : 0", "n / E * E"),
    "the body reads ahead": (
        "step.cuh",
        "T x[kSlots][E];",
        "T x[kSlots][E]; load(entry.format[kGrad], entry.data[kGrad], start + i + E, packed[kGrad]);",
    ),
    "the gradient is written": ("step.cuh", "if (k != kGrad) store<", "store<"),
    "a state stays": ("step.cuh", "if (k != kGrad) put_one<", "if (k < kState + 1) put_one<"),
    "the tensor before": (
        "step.cuh",
        "if (job.first_tile[middle] <= tile)",
        "if (job.first_tile[middle] < tile)",
    ),
    "never the last tensor": (
        "step.cuh",
        "high = job.count;",
        "high = job.count > 1 ? job.count - 1 : 1;",
    ),
    "tiles counted from the launch's first": (
        "step.cuh",
        "int64_t(tile - job.first_tile[s]) *",
        "int64_t(tile) *",
    ),
    "an offset in 32 bits": (
        "step.cuh",
        "const int64_t start = int64_t(tile - job.first_tile[s]) *",
        "const int start = int(tile - job.first_tile[s]) *",
    ),
    "one tile a block": ("step.cuh", "tile += gridDim.x", "tile += job.first_tile[job.count]"),
    "no barrier before the rule is made": (
        "step.cuh",
        "__syncthreads();  // the tile before",
        "// the tile before",
    ),
    "no barrier after the rule is made": (
        "step.cuh",
        "entry.step);\n      __syncthreads();",
        "entry.step);",
    ),
    "a barrier for some": (
        "step.cuh",
        "if (entry.step != nullptr) {",
        "if (entry.step != nullptr && threadIdx.x < 32) {",
    ),
    "counts stay": ("step.cuh", "*job.entry[s].step += 1.0f", "*job.entry[s].step += 0.0f"),
    "one count stays": ("step.cuh", "s < job.count && job.entry", "s < job.count - 1 && job.entry"),
    "counts on the device past the first block stay": (
        "step.cuh",
        "int(blockIdx.x * blockDim.x +",
        "int(",
    ),
    "a double learning rate read as float": ("step.cuh", "recipe.lr_is_double ?", "false ?"),
    "a place is kept for the next launch": (
        "step.cu",
        "for (int32_t i : used) place[size_t(i)] = -1;",
        "",
    ),
    "a recipe's place is kept": (
        "step.cu",
        "for (int32_t i : recipe_used) recipe_place[size_t(i)] = -1;",
        "",
    ),
    "rules and recipes share places": ("step.cu", "(on_device ? recipe_place : place)", "(place)"),
    "the last tensor says whether counts move": (
        "step.cu",
        "advance |= on_device",
        "advance = on_device",
    ),
    "an empty tensor's count stays": (
        "step.cu",
        "span.numel == 0 && span.step == nullptr",
        "span.numel == 0",
    ),
    "whole tiles only": (
        "step.cu",
        "(span.numel + tile_size - 1) / tile_size",
        "span.numel / tile_size",
    ),
    "tiles of twice the size": (
        "step.cu",
        "int64_t(kThreads) * E * kRounds",
        "int64_t(kThreads) * E * kRounds * 2",
    ),
    "the first tensor's alignment": (
        "step.cu",
        "entry.aligned = span.aligned",
        "entry.aligned = job.spans[0].aligned",
    ),
}


Trial = tuple[dict[str, int], Callable[[Kernels], list[str]]]


def trials(kernels: Kernels) -> list[Trial]:
    """A few of the tests above, and the orders to run them in."""
    entries, tile = functools.partial(kernels.entries, "adam"), kernels.tile
    cases = [many("adam", 8, entries(False), "mixed"), seams("adam", 4, tile(4), "mixed")]
    cases += [many("adam", 2, entries(True), "device"), many("adam", 4, entries(False), "host")]
    cases += [seams("adam", 8, tile(8), "device", "before")]
    few = {"largest_grid": FEW_BLOCKS}
    orders = [{}, {"thread_order": 1}, few, few | {"thread_order": 2, "block_order": 2}]
    several: list[Trial] = [(order, case.problems) for order in orders for case in cases]
    return [
        *several,
        ({}, functools.partial(problems_of_a_huge_tensor, each=8, dtype=BF16, shift=0)),
    ]


def first_problem(library: Path, several: list[Trial]) -> str:
    kernels = Kernels(library)
    for order, problems in several:
        with kernels.set(**order):
            if found := problems(kernels):
                return found[0]
    return "none"


def build_small(folder: Path, *flags: str) -> Path:
    return build(folder, "small", "-O0", "-DONLY=Adam", *flags)


def build_faulty(folder: Path, fault: str) -> Path:
    name, old, new = FAULTS[fault]
    source = (CSRC / "cuda" / name).read_text()
    assert source.count(old) == 1, f"{name} has changed: '{fault}' must be seeded in another way"
    (folder / "cuda").mkdir()
    for other in ("step.cu", "step.cuh"):
        shutil.copy(CSRC / "cuda" / other, folder / "cuda")
    (folder / "cuda" / name).write_text(source.replace(old, new))
    return build_small(folder)


@pytest.fixture(scope="module")
def faulty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Those that are asked for, compiled two at a time: fault -> the future of a library."""
    asked = [
        item.callspec.params.get("fault")
        for item in request.session.items
        if hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(2) as pool:
        return {
            f: pool.submit(build_faulty, tmp_path_factory.mktemp("faulty"), f)
            for f in asked
            if f in FAULTS
        }


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_noticed(kernels: Kernels, faulty: Any, fault: str) -> None:
    library, several = faulty[fault].result(), trials(kernels)
    found = in_child(lambda: first_problem(library, several))
    print(fault, "->", found)
    assert found != "none"


@pytest.mark.slow
@pytest.mark.parametrize("version", [13000, 12000])
def test_no_fault_no_problem(kernels: Kernels, tmp_path: Path, version: int) -> None:
    """CUDA 12.0 and before take smaller arguments, hence fewer tensors a launch."""
    library = build_small(tmp_path, f"-DCUDART_VERSION={version}")
    assert (Kernels(library).entries("adam", False) < 100) == (version == 12000)
    several = trials(kernels)
    assert in_child(lambda: first_problem(library, several)) == "none"
