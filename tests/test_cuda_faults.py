"""Faults seeded in the CUDA kernels: what ``test_cuda_on_host.py`` and ``test_cuda_sums_on_host.py`` notice."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_cases import AVERAGED_ADAM, AVERAGED_NADAM, FACTOR, ages, many, problems_of_a_huge_tensor
from cuda_cases import seams as step_seams
from cuda_faults import FAULTS, FAULTS_IN_SUMS, FAULTS_IN_WHAT_IS_CARRIED
from cuda_formats import BF16, CODE, SPLIT8
from cuda_library import (
    CSRC,
    FEW_BLOCKS,
    FLOATS,
    NEEDED,
    STORED,
    Kernels,
    Library,
    build,
    in_child,
)
from cuda_library import one_thread as one_thread
from cuda_sums import DTYPES, SEAMS, SUM_OF, SumCase, Sums
from cuda_sums import many as many_sums
from cuda_sums import problems_of_a_huge_tensor as problems_of_huge_sums
from cuda_sums import seams as sum_seams

pytestmark = NEEDED


Trial = tuple[dict[str, int], Callable[[Any], list[str]]]


def trials(kernels: Kernels) -> list[Trial]:
    """A few of the tests of the kernels, and the orders to run them in."""
    rule, tile = AVERAGED_ADAM, kernels.tile
    floats, stored = (kernels.about(rule, kind).entries for kind in (FLOATS, STORED))
    cases = [
        step_seams(rule, FLOATS, tile(FLOATS), "mixed"),
        step_seams(rule, STORED, tile(STORED), "mixed"),
        many(rule, FLOATS, floats, "device", None, (0.0, 2.0)),
        many(rule, STORED, stored, "host", FACTOR),
        step_seams(rule, STORED, tile(STORED), "device", FACTOR, "before"),
        ages(rule, FLOATS, 65),
    ]
    few = {"largest_grid": FEW_BLOCKS}
    orders = [{}, {"thread_order": 1}, few, few | {"thread_order": 2, "block_order": 2}]
    several: list[Trial] = [(order, case.problems) for order in orders for case in cases]
    several_formats = (SPLIT8, BF16, CODE, CODE, BF16, BF16)
    huge = functools.partial(
        problems_of_a_huge_tensor, kind=STORED, several=several_formats, shift=0
    )
    return [*several, ({}, huge)]


def trials_of_what_is_carried(kernels: Kernels) -> list[Trial]:
    """The same for a rule that carries a number."""
    rule = AVERAGED_NADAM
    entries = kernels.about(rule, FLOATS).entries
    cases = [
        many(rule, FLOATS, entries, "mixed", None, (0.0, 2.0)),
        many(rule, FLOATS, entries, "mixed", FACTOR),
    ]
    return [({}, case.problems) for case in cases]


@functools.cache
def trials_of_sums() -> list[Trial]:
    """The same for the kernels of sums."""
    cases = [SumCase([(n, dtype, 1)]) for n in SEAMS for dtype in DTYPES]
    cases += [
        SumCase([(5000, torch.float32, 0)], {at: x}) for at in (0, 4097) for x in (math.nan, -1e6)
    ]
    cases += [sum_seams("before"), many_sums(140), SumCase([(4096 * 4096 + 1, torch.bfloat16, 0)])]
    for case in cases:
        for what in SUM_OF:
            case.expected(what)  # once for all faults
    few = {"largest_grid": FEW_BLOCKS, "thread_order": 2, "block_order": 2}

    def problems(sums: Sums, case: SumCase) -> list[str]:
        return [problem for what in SUM_OF for problem in case.problems(sums, what)]

    several: list[Trial] = [({}, functools.partial(problems, case=case)) for case in cases]
    several.append((few, functools.partial(problems, case=cases[-2])))
    return [*several, ({}, problems_of_huge_sums)]


def first_problem(library: Library, several: list[Trial]) -> str:
    for order, problems in several:
        with library.set(**order):
            if found := problems(library):
                return found[0]
    return "none"


def build_small(folder: Path, *flags: str, rule: str = "Adam") -> Path:
    return build(folder, "small", "-O0", f"-DONLY={rule}", *flags)


def build_faulty(folder: Path, fault: str) -> Path:
    name, old, new = (FAULTS | FAULTS_IN_WHAT_IS_CARRIED | FAULTS_IN_SUMS)[fault]
    text = (CSRC / name).read_text()
    assert text.count(old) == 1, f"{name} has changed: '{fault}' must be seeded in another way"
    shutil.copytree(CSRC, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("launch.cuh"))
    (folder / name).write_text(text.replace(old, new))
    if fault not in FAULTS_IN_SUMS:
        return build_small(folder, rule="Adam" if fault in FAULTS else "NAdam")
    return build(folder, "sums", "-O0", source="sum.cpp")


@pytest.fixture(scope="module")
def faulty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Those that are asked for, compiled two at a time: fault -> the future of a library."""
    here = [item for item in request.session.items if item.path == request.path]
    calls = (item.callspec for item in here if hasattr(item, "callspec"))
    asked = [call.params["fault"] for call in calls if "fault" in call.params]
    with ThreadPoolExecutor(2) as pool:
        folders = ((fault, tmp_path_factory.mktemp("faulty")) for fault in asked)
        yield {fault: pool.submit(build_faulty, folder, fault) for fault, folder in folders}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_noticed(kernels: Kernels, faulty: Any, fault: str) -> None:
    library, several = faulty[fault].result(), trials(kernels)
    found = in_child(lambda: first_problem(Kernels(library), several))
    print(fault, "->", found)
    assert found != "none"


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS_IN_WHAT_IS_CARRIED)
def test_a_seeded_fault_in_what_is_carried_is_noticed(
    kernels: Kernels, faulty: Any, fault: str
) -> None:
    library, several = faulty[fault].result(), trials_of_what_is_carried(kernels)
    found = in_child(lambda: first_problem(Kernels(library), several))
    print(fault, "->", found)
    assert found != "none"


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS_IN_SUMS)
def test_a_seeded_fault_in_sums_is_noticed(faulty: Any, fault: str) -> None:
    library, several = faulty[fault].result(), trials_of_sums()
    found = in_child(lambda: first_problem(Sums(library), several))
    print(fault, "->", found)
    assert found != "none"


@pytest.mark.slow
@pytest.mark.parametrize("version", [13000, 12000])
def test_no_fault_no_problem(kernels: Kernels, tmp_path: Path, version: int) -> None:
    """CUDA 12.0 and before take smaller arguments, hence fewer tensors a launch."""
    library = Kernels(build_small(tmp_path, f"-DCUDART_VERSION={version}"))
    assert (library.about(AVERAGED_ADAM, FLOATS).entries < 100) == (version == 12000)
    several = trials(kernels)
    assert in_child(lambda: first_problem(library, several)) == "none"


@pytest.mark.slow
def test_no_fault_no_problem_in_what_is_carried(kernels: Kernels, tmp_path: Path) -> None:
    library = Kernels(build_small(tmp_path, rule="NAdam"))
    several = trials_of_what_is_carried(kernels)
    assert in_child(lambda: first_problem(library, several)) == "none"


@pytest.mark.slow
def test_no_fault_no_problem_in_sums(tmp_path: Path) -> None:
    library = Sums(build(tmp_path, "sums", "-O0", source="sum.cpp"))
    several = trials_of_sums()
    assert in_child(lambda: first_problem(library, several)) == "none"
