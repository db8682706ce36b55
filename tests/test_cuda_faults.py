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
from cuda_cases import ADAM, AVERAGED_ADAM, BF16, F32, FACTOR, ages, many, problems_of_a_huge_tensor
from cuda_cases import seams as step_seams
from cuda_library import CSRC, FEW_BLOCKS, NEEDED, Kernels, Library, build, in_child
from cuda_library import one_thread as one_thread
from cuda_sums import DTYPES, SEAMS, SUM_OF, SumCase, Sums
from cuda_sums import many as many_sums
from cuda_sums import problems_of_a_huge_tensor as problems_of_huge_sums
from cuda_sums import seams as sum_seams

pytestmark = NEEDED


FAULTS = {
    "the body runs over the end": (
        "cuda/step.cuh",
        "entry.aligned ? n / E * E : 0",
        "entry.aligned ? (n + E - 1) / E * E : 0",
    ),
    "the tail begins too early": (
        "cuda/step.cuh",
        "int i = body + int(threadIdx.x); i < n",
        "int i = int(threadIdx.x); i < n",
    ),
    "the tail leaves some out": (
        "cuda/step.cuh",
        "i < n; i += kThreads)",
        "i < n; i += kThreads * E)",
    ),
    "the body leaves some out": (
        "cuda/step.cuh",
        "i < body; i += kThreads * E)",
        "i < body; i += 2 * kThreads * E)",
    ),
    "aligned accesses to all": ("cuda/step.cuh", "entry.aligned ? n / E * E : 0", "n / E * E"),
    "the body reads ahead": (
        "cuda/step.cuh",
        "Elements<Rule, T, E> x;",
        "Elements<Rule, T, E> x; load(entry.format[kGrad], entry.data[kGrad], start + i + E, packed[kGrad]);",
    ),
    "the gradient is written": ("cuda/step.cuh", "if (k != kGrad) store<", "store<"),
    "a state stays": ("cuda/step.cuh", "if (k != kGrad) put_one<", "if (k < kState + 1) put_one<"),
    "the tensor before": (
        "cuda/step.cuh",
        "if (job.first_tile[middle] <= tile)",
        "if (job.first_tile[middle] < tile)",
    ),
    "never the last tensor": (
        "cuda/step.cuh",
        "high = job.count;",
        "high = job.count > 1 ? job.count - 1 : 1;",
    ),
    "tiles counted from the launch's first": (
        "cuda/step.cuh",
        "int64_t(tile - job.first_tile[s]) *",
        "int64_t(tile) *",
    ),
    "an offset in 32 bits": (
        "cuda/step.cuh",
        "const int64_t start = int64_t(tile - job.first_tile[s]) *",
        "const int start = int(tile - job.first_tile[s]) *",
    ),
    "one tile a block": ("cuda/step.cuh", "tile += gridDim.x", "tile += job.first_tile[job.count]"),
    "no barrier before the rule is made": (
        "cuda/step.cuh",
        "__syncthreads();  // the tile before",
        "// the tile before",
    ),
    "no barrier after the rule is made": (
        "cuda/step.cuh",
        "entry.step, job.factor);\n      __syncthreads();",
        "entry.step, job.factor);",
    ),
    "a barrier for some": (
        "cuda/step.cuh",
        "if (made_here) {",
        "if (made_here && threadIdx.x < 32) {",
    ),
    "counts stay": ("cuda/step.cuh", "*job.entry[s].step += 1.0f", "*job.entry[s].step += 0.0f"),
    "one count stays": (
        "cuda/step.cuh",
        "s < job.count && job.entry",
        "s < job.count - 1 && job.entry",
    ),
    "counts on the device past the first block stay": (
        "cuda/step.cuh",
        "int(blockIdx.x * blockDim.x +",
        "int(",
    ),
    "a double learning rate read as float": ("cuda/step.cuh", "recipe.lr_is_double ?", "false ?"),
    "a place is kept for the next launch": (
        "cuda/step.cu",
        "for (int32_t i : used) place[size_t(i)] = -1;",
        "",
    ),
    "a recipe's place is kept": (
        "cuda/step.cu",
        "for (int32_t i : recipe_used) recipe_place[size_t(i)] = -1;",
        "",
    ),
    "rules and recipes share places": (
        "cuda/step.cu",
        "(made_there ? recipe_place : place)",
        "(place)",
    ),
    "the last tensor says whether counts move": (
        "cuda/step.cu",
        "advance |= span.step != nullptr",
        "advance = span.step != nullptr",
    ),
    "an empty tensor's count stays": (
        "cuda/step.cu",
        "span.numel == 0 && span.step == nullptr",
        "span.numel == 0",
    ),
    "whole tiles only": (
        "cuda/step.cu",
        "(span.numel + tile_size - 1) / tile_size",
        "span.numel / tile_size",
    ),
    "tiles of twice the size": (
        "cuda/step.cu",
        "int64_t(kThreads) * E * kRounds",
        "int64_t(kThreads) * E * kRounds * 2",
    ),
    "the first tensor's alignment": (
        "cuda/step.cu",
        "entry.aligned = span.aligned",
        "entry.aligned = job.spans[0].aligned",
    ),
    # ---- the average of the weights, copies, factor, overflows
    "the average stays": (
        "cuda/step.cuh",
        "if (k != kGrad) store<",
        "if (k != kGrad && k != kState + 2) store<",
    ),
    "the average is of the weights before": (
        "rules.h",
        "Rule<T>::operator()(p, g, a, b);\n    e = averaged(e, p);",
        "e = averaged(e, p);\n    Rule<T>::operator()(p, g, a, b);",
    ),
    "the average begins with what was there": (
        "rules.h",
        "now.t == 1 ? 0.0 : now.ema_decay",
        "now.ema_decay",
    ),
    "the average's decay is lost": ("cuda/step.cuh", "recipe.ema_decay}", "0.5}"),
    "a copy begins with each tile": (
        "cuda/step.cuh",
        "store<T, E>(entry.format[parts], x.p, entry.data[parts], start + i)",
        "store<T, E>(entry.format[parts], x.p, entry.data[parts], i)",
    ),
    "a copy of a state": (
        "cuda/step.cuh",
        "store<T, E>(entry.format[parts], x.p,",
        "store<T, E>(entry.format[parts], x.s[0],",
    ),
    "a copy lacks the tail": (
        "cuda/step.cuh",
        "if (entry.data[parts] != nullptr) put_one",
        "if (false) put_one",
    ),
    "a copy in the parameter's format": (
        "cuda/step.cuh",
        "store<T, E>(entry.format[parts], x.p",
        "store<T, E>(entry.format[kParam], x.p",
    ),
    "a copy that is not there": (
        "cuda/step.cuh",
        "if (entry.data[parts] != nullptr) store",
        "if (true) store",
    ),
    "the format of a copy that is not there": (
        "cuda/step.cu",
        "if (k == parts && job.spans[s].data[k] == nullptr) continue;",
        "",
    ),
    "the factor is 1": ("cuda/step.cuh", "factor != nullptr ? *factor : 1.0", "factor ? 1.0 : 1.0"),
    "the factor counts only with counts on the device": (
        "cuda/step.cuh",
        "entry.step != nullptr || job.factor != nullptr",
        "entry.step != nullptr",
    ),
    "rules are packed where there is a factor": (
        "cuda/step.cu",
        "span.step != nullptr || job.factor != nullptr",
        "span.step != nullptr",
    ),
    "the count on the host is 1": ("cuda/step.cuh", ": recipe.t;", ": 1.0;"),
    "the count on the device is the host's": (
        "cuda/step.cuh",
        "step != nullptr ? double(*step) : recipe.t",
        "step != nullptr ? recipe.t : recipe.t",
    ),
    "tensors move in spite of an overflow": ("cuda/step.cuh", "if (overflowed(job)) return;", ""),
    "counts move in spite of an overflow": ("cuda/step.cuh", " && !overflowed(job)) *", ") *"),
    "an overflow on two devices is none": (
        "cuda/step.cuh",
        "*job.found_inf != 0.0f",
        "*job.found_inf == 1.0f",
    ),
    "any found_inf is an overflow": (
        "cuda/step.cuh",
        "job.found_inf != nullptr && *job.found_inf != 0.0f",
        "job.found_inf != nullptr",
    ),
}

FAULTS_IN_SUMS = {
    "neighbours are joined first": (
        "cuda/sum.cu",
        "unsigned half = kLanes / 2; half > 0; half /= 2",
        "unsigned half = 1; half < kLanes; half *= 2",
    ),
    "numbers of a lane in another order": (
        "cuda/sum.cu",
        "x[j] = from[i + j * kLanes];",
        "x[j] = from[i + (7 - j) * kLanes];",
    ),
    "the last numbers are left out": (
        "cuda/sum.cu",
        "for (; i < n; i += kLanes)",
        "for (; i + kLanes <= n; i += kLanes)",
    ),
    "one number too many": ("cuda/sum.cu", "i + 7 * kLanes < n;", "i + 7 * kLanes <= n;"),
    "whole chunks only": (
        "cuda/sum.cu",
        "tensor.numel - start < kChunk ? tensor.numel - start : kChunk",
        "kChunk",
    ),
    "chunks without their last number": (
        "cuda/sum.cu",
        "tensor.numel - start : kChunk)",
        "tensor.numel - start : kChunk - 1)",
    ),
    "the last chunk is left out": ("sum.h", "(numel + kChunk - 1) / kChunk", "numel / kChunk"),
    "sums of the tensor before": ("cuda/sum.cu", "[middle] <= chunk", "[middle] < chunk"),
    "never the last tensor of sums": ("cuda/sum.cu", "high = job.count;", "high = job.count - 1;"),
    "chunks counted from the launch's first": (
        "cuda/sum.cu",
        "int64_t(chunk - job.first_chunk[t]) *",
        "int64_t(chunk) *",
    ),
    "an offset of numbers in 32 bits": (
        "cuda/sum.cu",
        "const int64_t start = int64_t(chunk - job.first_chunk[t]) *",
        "const int start = int(chunk - job.first_chunk[t]) *",
    ),
    "one chunk a warp": (
        "cuda/sum.cu",
        "chunk += warps",
        "chunk += warps + job.first_chunk[job.count]",
    ),
    "the second launch writes over the first": ("cuda/sum.cu", "arguments.sums += *first;", ""),
    "launches are not cut": ("cuda/sum.cu", "arguments.count == SumArguments::entries ||", ""),
    "sums are squared again": (
        "cuda/sum.cu",
        "SumOf what = next(job.what);",
        "SumOf what = job.what;",
    ),
    "sums over sums": ("cuda/sum.cu", "    sums += chunks;\n", ""),
    "two levels of sums": (
        "cuda/sum.cu",
        "chunks > 1 && error",
        "chunks > 1 && sums == job.sums && error",
    ),
    "a NaN that comes later is lost": ("rules.h", "((b > a) | (b != b)) ? b : a", "b > a ? b : a"),
    "a NaN that came is lost": ("rules.h", "((b > a) | (b != b)) ? b : a", "a > b ? a : b"),
    "the largest is not the negative one": ("sum.h", "return x < 0.0 ? -x : x;", "return x;"),
    "the largest are added": (
        "sum.h",
        "if constexpr (what == SumOf::Largest) return larger(a, b);",
        "",
    ),
    "squares are rounded to float": (
        "cuda/sum.cu",
        "sum = Sum::join(sum, Sum::of(double(Format::get(x[j]))));",
        "sum = Sum::join(sum, double(float(Sum::of(double(Format::get(x[j]))))));",
    ),
}


Trial = tuple[dict[str, int], Callable[[Any], list[str]]]


def trials(kernels: Kernels) -> list[Trial]:
    """A few of the tests of the kernels, and the orders to run them in."""
    tile, averaged = kernels.tile, AVERAGED_ADAM
    entries, in_double = (kernels.about(averaged, there).entries for there in (False, True))
    cases = [
        many(ADAM, 8, kernels.about(ADAM, False).entries, "mixed"),
        step_seams(averaged, 4, tile(4), "mixed"),
        many(averaged, 2, in_double, "device", None, (0.0, 2.0)),
        many(averaged, 4, entries, "host", FACTOR),
        step_seams(averaged, 8, tile(8), "device", FACTOR, "before"),
        ages(ADAM, 4, 65),
    ]
    few = {"largest_grid": FEW_BLOCKS}
    orders = [{}, {"thread_order": 1}, few, few | {"thread_order": 2, "block_order": 2}]
    several: list[Trial] = [(order, case.problems) for order in orders for case in cases]
    huge = functools.partial(problems_of_a_huge_tensor, each=8, dtype=BF16, shift=0)
    return [*several, ({}, huge)]


@functools.cache
def trials_of_sums() -> list[Trial]:
    """The same for the kernels of sums."""
    cases = [SumCase([(n, dtype, 1)]) for n in SEAMS for dtype in DTYPES]
    cases += [SumCase([(5000, F32, 0)], {at: x}) for at in (0, 4097) for x in (math.nan, -1e6)]
    cases += [sum_seams("before"), many_sums(140), SumCase([(4096 * 4096 + 1, BF16, 0)])]
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


def build_small(folder: Path, *flags: str) -> Path:
    return build(folder, "small", "-O0", "-DONLY=Adam", *flags)


def build_faulty(folder: Path, fault: str) -> Path:
    name, old, new = (FAULTS | FAULTS_IN_SUMS)[fault]
    text = (CSRC / name).read_text()
    assert text.count(old) == 1, f"{name} has changed: '{fault}' must be seeded in another way"
    shutil.copytree(CSRC, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("launch.cuh"))
    (folder / name).write_text(text.replace(old, new))
    if fault in FAULTS:
        return build_small(folder)
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
    assert (library.about(ADAM, False).entries < 100) == (version == 12000)
    several = trials(kernels)
    assert in_child(lambda: first_problem(library, several)) == "none"


@pytest.mark.slow
def test_no_fault_no_problem_in_sums(tmp_path: Path) -> None:
    library = Sums(build(tmp_path, "sums", "-O0", source="sum.cpp"))
    several = trials_of_sums()
    assert in_child(lambda: first_problem(library, several)) == "none"
