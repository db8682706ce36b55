"""The CUDA kernels, compiled by g++ and run on the CPU, leave the same bits as the oracle. No GPU and no extension is
needed: ``tests/cuda_on_host`` stands in for CUDA's headers, and what it cannot show is what a GPU does at once.

To look for accesses outside of the tensors and for undefined behaviour (guard bytes find writes only)::

    LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \\
    CUDA_ON_HOST_FLAGS="-g -fsanitize=address,undefined" python -m pytest tests/test_cuda_on_host.py
"""

from __future__ import annotations

import ctypes
import itertools
from ctypes import c_uint32, c_void_p

import pytest
import torch
from cuda_library import (
    BF16,
    EVERY_KIND,
    EVERY_RULE,
    F16,
    F32,
    F64,
    FEW_BLOCKS,
    GROUPS,
    KINDS,
    MIRRORED,
    NEEDED,
    ORDERS,
    STATES,
    Case,
    Item,
    Job,
    Kernels,
    Library,
    Span,
    build,
    in_child,
    many,
    problems_of_a_huge_tensor,
    seams,
)

from adamfused import formats, rules

pytestmark = NEEDED


def test_the_structs_are_those_of_the_header(kernels: Kernels) -> None:
    here = []
    for struct, names in MIRRORED.items():
        here += [ctypes.sizeof(struct), *(getattr(struct, name).offset for name in names)]
    assert here == kernels.layout
    for name, states in STATES.items():
        known = (len(states.split()), len(GROUPS[name][0].hyper))
        assert kernels.rule(name, False)[:2] == known == kernels.rule(name, True)[:2]


def test_most_results_are_numbers(kernels: Kernels) -> None:
    """Else the tests would compare NaN with NaN."""
    for rule in STATES:
        case = seams(rule, 4, kernels.tile(4), "mixed")
        everything = torch.cat(
            [case.at(case.expected, p).double() for p in itertools.chain(*case.places)]
        )
        assert 0.9 < everything.isfinite().double().mean() < 1


@EVERY_RULE
@EVERY_KIND
def test_every_format_in_every_slot(kernels: Kernels, rule: str, each: int) -> None:
    params = {2: (F64,), 4: (F32,), 8: (F32, BF16, F16)}[each]
    others = (
        (F32, F64) if each == 4 else formats.FORMATS
    )  # one 16-bit tensor would make it 8 for all
    several = itertools.product(params, *[others] * (1 + len(STATES[rule].split())))
    sizes, shifts = (each + 1, 3 * each, 3 * each - 1, 37), ((0,) * 5, (0,) * 5, (1,) * 5)
    items = [
        Item(sizes[i % 4], dtypes, shifts[i % 3], i % 5, group=i % 3)
        for i, dtypes in enumerate(several)
    ]
    assert Case(rule, items).problems(kernels) == []


@EVERY_RULE
@EVERY_KIND
def test_sizes_at_every_seam(kernels: Kernels, rule: str, each: int) -> None:
    assert seams(rule, each, kernels.tile(each), "mixed").problems(kernels) == []


@EVERY_KIND
@pytest.mark.parametrize(
    "rule, counts", [*((rule, "mixed") for rule in STATES), ("adam", "host"), ("adam", "device")]
)
def test_more_tensors_than_a_launch_takes(
    kernels: Kernels, rule: str, each: int, counts: str
) -> None:
    assert many(rule, each, kernels.entries(rule, each == 2), counts).problems(kernels) == []


def test_counts_on_the_device_move_on_by_one_a_step(kernels: Kernels) -> None:
    case = many("adam", 4, kernels.entries("adam", False), "mixed", steps=3)
    assert case.problems(kernels) == []
    counted = [(i, c) for i, c in zip(case.items, case.counts, strict=True) if c]
    assert {i.numel == 0 for i, _ in counted} == {True, False}
    assert all(case.at(case.expected, c).item() == i.count + 3 for i, c in counted)


@pytest.mark.parametrize("each", [2, 8], ids="E={}".format)
@pytest.mark.parametrize("different", [63, 64, 65, 200])
def test_more_step_counts_than_a_launch_takes(kernels: Kernels, different: int, each: int) -> None:
    """They come again in later launches, and among them are tensors whose counts are on the device."""
    assert kernels.table == 64
    items = [
        Item(
            each + i % 3,
            KINDS[each][i % 2],
            count=i % different,
            on_device=i % 11 == 5,
            group=i % 3 * (i % 7 == 0),
        )
        for i in range(3 * different)
    ]
    assert Case("adam", items).problems(kernels) == []


@EVERY_RULE
@EVERY_KIND
def test_1000_tensors_take_at_most_4_launches(kernels: Kernels, rule: str, each: int) -> None:
    made = ctypes.create_string_buffer(kernels.rule(rule, each == 2)[2])
    spans = (Span * 1000)(*[Span(numel=5) for _ in range(1000)])
    launches = kernels.launches(
        Job(list(rules.RULES).index(rule), each == 2, spans, 1000, ctypes.addressof(made))
    )
    assert 1 <= launches <= 4


def test_empty_tensors_alone(kernels: Kernels) -> None:
    for on_device, launches in ((False, 0), (True, 1)):
        items = [Item(0, KINDS[4][0], on_device=on_device)] * 3
        before = kernels.settings.launches
        assert Case("adam", items).problems(kernels) == []
        assert kernels.settings.launches - before == launches


@pytest.mark.parametrize(
    "threads, blocks", [("up", "up"), ("down", "up"), ("down", "down"), ("mixed", "mixed")]
)
@EVERY_KIND
def test_the_order_of_threads_and_blocks_is_free(
    kernels: Kernels, each: int, threads: str, blocks: str
) -> None:
    """Also where there are fewer blocks than tiles, so that a block goes on to tiles of other tensors."""
    with kernels.set(thread_order=ORDERS[threads], block_order=ORDERS[blocks]):
        assert (
            many("adam", each, kernels.entries("adam", each == 2), "device").problems(kernels) == []
        )
        with kernels.set(largest_grid=FEW_BLOCKS):
            assert (
                many("adam", each, kernels.entries("adam", each == 2), "mixed").problems(kernels)
                == []
            )
            assert seams("adam", each, kernels.tile(each), "device").problems(kernels) == []


@pytest.mark.parametrize("pages", ["before", "after"])
@EVERY_KIND
def test_nothing_outside_of_the_tensors_is_read(kernels: Kernels, each: int, pages: str) -> None:
    case = seams("amsgrad", each, kernels.tile(each), "mixed", pages)
    assert in_child(lambda: str(case.problems(kernels))) == "[]"


def test_the_page_between_two_tensors_is_closed(kernels: Kernels) -> None:
    case = seams("amsgrad", 4, kernels.tile(4), "mixed", "before")
    last = max(end for place in case.places for _, end, _ in place)

    def read_past_the_end() -> str:
        memory = case.memory()
        with case.closed(memory):
            return str(memory[last].item())

    assert in_child(read_past_the_end) == "killed by SIGSEGV"


@pytest.mark.parametrize("each, dtype", [(8, BF16), (4, F32)], ids=["E=8", "E=4"])
@pytest.mark.parametrize("shift", [0, 1])
def test_more_than_2_to_the_32_elements(
    kernels: Kernels, each: int, dtype: torch.dtype, shift: int
) -> None:
    try:
        assert problems_of_a_huge_tensor(kernels, each, dtype, shift) == []
    except OSError as error:
        pytest.skip(f"no addresses for so much: {error}")


def test_launches_are_cut_where_tiles_can_no_longer_be_counted(kernels: Kernels) -> None:
    """Nothing runs: no such tensors exist. But a launch's tiles are counted in 32 bits."""
    made = ctypes.create_string_buffer(kernels.rule("adam", False)[2])
    spans = (Span * 5)(*[Span(numel=2**30 * kernels.tile(4)) for _ in range(5)])
    assert kernels.launches(Job(4, False, spans, 5, ctypes.addressof(made))) >= 2


def test_the_self_test_of_an_installation_passes(kernels: Kernels) -> None:
    assert kernels.c.host_self_test() is None


# ---- the stand-in itself -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Library:
    library = Library(build(tmp_path_factory.mktemp("self"), "self", "-O1", source="self_test.cpp"))
    library.c.host_kernel.restype = ctypes.c_char_p
    return library


def run_kernel(stand_in: Library, name: str, blocks: int, n: int) -> tuple[str, list[int]]:
    numbers = torch.arange(blocks * n, dtype=torch.int32)
    said = stand_in.c.host_kernel(
        name.encode(), c_void_p(numbers.data_ptr()), c_uint32(blocks), c_uint32(n)
    )
    return (said or b"").decode(), numbers.tolist()


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_barriers_shuffles_and_shared_memory(stand_in: Library, order: int) -> None:
    with stand_in.set(thread_order=order):
        for n in (128, 32):
            assert run_kernel(stand_in, "sum", 1, n) == ("", [n * (n - 1)] * n)
        assert run_kernel(stand_in, "stale", 4, 1) == ("", [-1] * 4)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_threads_and_blocks_run_in_the_order_that_is_set(stand_in: Library, order: int) -> None:
    with stand_in.set(thread_order=order, block_order=order):
        _, numbers = run_kernel(stand_in, "order", 7, 64)
    assert sorted(numbers) == list(range(min(numbers), min(numbers) + 448))
    assert (numbers == sorted(numbers)) == (order == 0)
    assert (numbers == sorted(numbers, reverse=True)) == (order == 1)


def test_what_a_gpu_may_refuse_is_refused(stand_in: Library) -> None:
    for name, blocks, n, message in [
        ("half_barrier", 1, 64, "a barrier that some threads wait at and others never come to"),
        ("load", 1, 32, "misaligned address"),
        ("store", 1, 32, "misaligned address"),
        ("sum", 0, 32, "invalid configuration"),
        ("sum", 1, 2048, "invalid configuration"),
    ]:
        assert message in run_kernel(stand_in, name, blocks, n)[0]
        assert run_kernel(stand_in, "sum", 1, 32)[0] == ""  # and the next launch is sound
