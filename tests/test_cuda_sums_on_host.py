"""The sums behind the norm of the gradients, taken by the CUDA kernels on the CPU, have the bits of the oracle's.

As in ``test_cuda_on_host.py``, ``tests/cuda_on_host`` stands in for CUDA.
"""

from __future__ import annotations

import math

import pytest
import torch
from cuda_library import (
    FEW_BLOCKS,
    NEEDED,
    ORDERS,
    Addends,
    SumJob,
    build,
    in_child,
    layout,
)
from cuda_library import (
    one_thread as one_thread,
)
from cuda_sums import (
    DTYPES,
    SEAMS,
    SUM_OF,
    Size,
    SumCase,
    Sums,
    many,
    problems_of_a_huge_tensor,
    seams,
    sums_of,
)

from adamfused import norm

pytestmark = NEEDED

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
EVERY_SUM = pytest.mark.parametrize("what", SUM_OF)


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Sums:
    return Sums(build(tmp_path_factory.mktemp("sums"), "sums", "-O1", source="sum.cpp"))


def test_the_structs_and_numbers_are_those_of_the_header(sums: Sums) -> None:
    assert sums.layout == layout(Addends, SumJob)
    assert (sums.chunk, sums.lanes) == (norm.CHUNK, norm.LANES)
    for chunks in (0, 1, 2, 4095, 4096, 4097, 4096**2, 4096**2 + 1):
        assert sums.c.host_sums_of(chunks) == sums_of(chunks)


@EVERY_SUM
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_at_every_seam(sums: Sums, dtype: torch.dtype, what: str) -> None:
    for n in SEAMS:
        for shift in (0, 1):
            assert SumCase([(n, dtype, shift)]).problems(sums, what) == []


@EVERY_SUM
def test_more_tensors_than_a_launch_takes(sums: Sums, what: str) -> None:
    """Of the empty ones none takes a place in a launch."""
    case, before = many(sums.entries), sums.settings.launches
    assert case.problems(sums, what) == []
    assert sums.settings.launches - before == 3 + 1  # and one for the sum of sums
    assert len(case.sizes) > 3 * sums.entries


@pytest.mark.parametrize(
    "what, sizes",
    [
        ("squares", [(5 * 4096 + 7, F32, 0)]),
        ("largest", [(5 * 4096 + 7, F32, 0)]),
        ("squares", [(4096 * 4096, BF16, 0)]),
        ("squares", [(4096 * 4096 + 1, BF16, 0)]),
        ("largest", [(4096 * 4096 + 1, BF16, 0)]),
    ],
    ids=["6", "6-largest", "4096", "4097", "4097-largest"],
)
def test_sums_of_sums(sums: Sums, what: str, sizes: list[Size]) -> None:
    """So many chunks that there are two levels of sums, or three."""
    assert SumCase(sizes).problems(sums, what) == []


@EVERY_SUM
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_numbers_anywhere(sums: Sums, dtype: torch.dtype, what: str) -> None:
    n, inf, nan = 4096 * 2 + 77, math.inf, math.nan
    for at in (0, 31, 32, 4095, 4096, 8192, n - 1):
        for x in (nan, inf, -inf, -6e4):
            case = SumCase([(n, dtype, 0)], {at: x})
            assert case.problems(sums, what) == []
            assert math.isnan(case.expected(what)) == math.isnan(x)
            assert math.isinf(case.expected(what)) == math.isinf(x)
        for other in (0, n - 1):  # before the NaN, and behind it
            case = SumCase([(n, dtype, 0)], {other: inf, at: nan})
            assert case.problems(sums, what) == [] and math.isnan(case.expected(what))


@EVERY_SUM
def test_subnormal_and_huge_numbers(sums: Sums, what: str) -> None:
    """The square of a float32 is neither 0 nor infinity in float64; that of a float64 may be."""
    for dtype, scale in (
        (F32, (-45, -37)),
        (F32, (30, 38)),
        (F64, (-320, -150)),
        (F64, (150, 308)),
    ):
        case = SumCase([(5000, dtype, 0)], scale=scale)
        assert case.problems(sums, what) == []
        assert dtype is F64 or 0 < case.expected(what) < math.inf
    for x in (0.0, -0.0):
        case = SumCase([(33, F32, 0)], dict.fromkeys(range(33), x))
        assert case.problems(sums, what) == []
        assert math.copysign(1, case.expected(what)) == 1


@EVERY_SUM
@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_threads_and_blocks_is_free(sums: Sums, order: str, what: str) -> None:
    """Also where there are fewer blocks than chunks, so that a warp goes on to chunks of other tensors."""
    case = many(sums.entries)
    with sums.set(thread_order=ORDERS[order], block_order=ORDERS[order]):
        assert case.problems(sums, what) == []
        with sums.set(largest_grid=FEW_BLOCKS):
            assert case.problems(sums, what) == []


@EVERY_SUM
@pytest.mark.parametrize("pages", ["before", "after"])
def test_nothing_outside_of_the_tensors_is_read(sums: Sums, pages: str, what: str) -> None:
    case = seams(pages)
    assert in_child(lambda: str(case.problems(sums, what))) == "[]"


def test_no_tensors_and_empty_ones_take_no_launch(sums: Sums) -> None:
    before = sums.settings.launches
    for sizes in ([], [(0, F32, 0)] * 3):
        assert SumCase(sizes).problems(sums, "squares") == []
    assert sums.settings.launches == before


def test_more_than_2_to_the_32_numbers(sums: Sums) -> None:
    try:
        assert problems_of_a_huge_tensor(sums) == []
    except OSError as error:
        pytest.skip(f"no addresses for so much: {error}")
