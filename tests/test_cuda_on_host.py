"""The CUDA kernels, compiled by g++ and run on the CPU, leave the same bits as the oracle. No GPU and no extension is
needed: ``tests/cuda_on_host`` stands in for CUDA's headers, and what it cannot show is what a GPU does at once.

To look for accesses outside of the tensors and for undefined behaviour (guard bytes find writes only)::

    LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0:handle_segv=0 \\
    CUDA_ON_HOST_FLAGS="-g -fsanitize=address,undefined" python -m pytest tests/test_cuda_*on_host.py
"""

from __future__ import annotations

import ctypes
import random
from ctypes import c_uint32, c_void_p

import pytest
import torch
from cuda_cases import (
    ADAM,
    AVERAGED_ADAM,
    FACTOR,
    FIRST,
    KINDS,
    RULES,
    Case,
    Item,
    ages,
    groups_of,
    many,
    parts_of,
    problems_of_a_huge_tensor,
    seams,
)
from cuda_formats import (
    AT_RANDOM,
    BF16,
    CODE,
    F16,
    F32,
    F64,
    JOINED,
    NUMBERS,
    SPLIT8,
    Format,
)
from cuda_library import (
    DOUBLES,
    FEW_BLOCKS,
    FLOATS,
    HALVES,
    NEEDED,
    ORDERS,
    PARTS,
    STORED,
    Job,
    Kernels,
    Kind,
    Library,
    Recipe,
    Rule,
    Span,
    build,
    in_child,
    layout,
)
from cuda_library import (
    one_thread as one_thread,
)

pytestmark = NEEDED

EVERY_RULE = pytest.mark.parametrize("rule", RULES, ids=str)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=str)
# An averaged rule is most of its plain one, so that one kind is enough.
EACH = pytest.mark.parametrize(
    "rule, kind",
    [
        pytest.param(rule, kind, id=f"{rule}-{kind}")
        for i, rule in enumerate(RULES)
        for kind in (list(KINDS)[i % 4 : i % 4 + 1] if rule.averaged else KINDS)
    ],
)


def test_the_structs_are_those_of_the_header(kernels: Kernels) -> None:
    assert kernels.layout == layout(Span, Recipe, Job)
    for rule in RULES:
        for kind in KINDS:
            about = kernels.about(rule, kind)
            assert about[:2] == (len(parts_of(rule)) - 2, len(groups_of(rule)[0].hyper))


# What may lie in the slot of the parameter, of a gradient or a copy, and of a state.
SLOTS: dict[Kind, tuple[list[Format], ...]] = {
    FLOATS: ([F32], [F32, F64], [F32, F64]),  # anything narrower would make it another kind
    HALVES: ([F32, BF16, F16], NUMBERS, NUMBERS),
    STORED: ([F32, BF16, F16, *AT_RANDOM, *JOINED], NUMBERS, [*NUMBERS, *AT_RANDOM, CODE, CODE]),
    DOUBLES: ([F64], NUMBERS, [*NUMBERS, *AT_RANDOM, CODE, CODE]),
}


@EACH
def test_every_format_in_every_slot(kernels: Kernels, rule: Rule, kind: Kind) -> None:
    """Of each two slots, every format in the one meets every format in the other."""
    params, numbers, others = SLOTS[kind]
    sizes, shifts = (5, 128, 131, 37), ((0,) * PARTS, (0,) * PARTS, (1,) * PARTS)
    rng, items = random.Random(0), []
    for i in range(300):
        several = (rng.choice(params), rng.choice(numbers), *rng.choices(others, k=4))
        copy, first = rng.choice([None, *numbers]), rng.choice(FIRST)
        items.append(Item(sizes[i % 4], several, shifts[i % 3], i % 5, False, i % 3, copy, first))
    assert Case(rule, items).problems(kernels) == []


@EACH
def test_sizes_at_every_seam(kernels: Kernels, rule: Rule, kind: Kind) -> None:
    case = seams(rule, kind, kernels.tile(kind), "mixed", FACTOR if rule.averaged else None)
    assert case.problems(kernels) == []
    assert 0.9 < case.share_of_numbers() < 1  # else NaN would be compared with NaN


@EACH
def test_more_tensors_than_a_launch_takes(kernels: Kernels, rule: Rule, kind: Kind) -> None:
    """Also where a GradScaler says on the device that there was no overflow."""
    entries, factor = kernels.about(rule, kind).entries, None if rule.averaged else FACTOR
    assert many(rule, kind, entries, "mixed", factor, (0.0,)).problems(kernels) == []


@EACH
def test_in_a_graph_arguments_are_few(kernels: Kernels, rule: Rule, kind: Kind) -> None:
    """So launches are more, by the kernels of every format."""
    few, factor = kernels.about(rule, kind).few, FACTOR if rule.averaged else None
    cases = [
        many(rule, kind, few, "mixed", factor, (0.0,)),
        seams(rule, kind, kernels.tile(STORED), "device", factor),
    ]
    tensors = job_of(kernels, rule, kind, [5] * 200)
    before = kernels.launches(tensors)
    with kernels.set(large_arguments=False):
        assert [case.problems(kernels) for case in cases] == [[], []]
        assert kernels.launches(tensors) == -(-200 // few) > before


@EVERY_KIND
@pytest.mark.parametrize("counts", ["host", "device"])
@pytest.mark.parametrize("factor", [None, FACTOR], ids=["no factor", "factor"])
def test_counts_on_the_host_and_on_the_device(
    kernels: Kernels, kind: Kind, counts: str, factor: float | None
) -> None:
    entries = kernels.about(AVERAGED_ADAM, kind).entries
    assert many(AVERAGED_ADAM, kind, entries, counts, factor).problems(kernels) == []


@pytest.mark.parametrize(
    "found_inf, made",
    [((None,) * 3, 3), ((0.0,) * 3, 3), ((0.0, 1.0, 0.0), 2), ((2.0,), 0)],
    ids=["unknown", "never", "once", "always"],
)
def test_counts_on_the_device_move_on_by_one_a_step_that_is_made(
    kernels: Kernels, found_inf: tuple[float | None, ...], made: int
) -> None:
    """A step whose scaled gradients overflowed is not made: no tensor moves, and no count."""
    entries = kernels.about(AVERAGED_ADAM, FLOATS).entries
    case = many(AVERAGED_ADAM, FLOATS, entries, "mixed", FACTOR, found_inf)
    assert case.problems(kernels) == []
    counted = [(i, c) for i, c in zip(case.items, case.counts, strict=True) if c]
    assert {i.numel == 0 for i, _ in counted} == {True, False}
    assert all(c.of(case.expected).item() == i.count + made for i, c in counted)
    still = case.found_inf_place.of(case.expected).copy_(case.found_inf_place.of(case.start))
    assert torch.equal(case.expected, case.start) == (made == 0), still


@pytest.mark.parametrize("factor", [None, FACTOR], ids=["no factor", "factor"])
@pytest.mark.parametrize("kind", [DOUBLES, HALVES], ids=str)
@pytest.mark.parametrize("different", [63, 64, 65, 200])
def test_more_step_counts_than_a_launch_takes(
    kernels: Kernels, different: int, kind: Kind, factor: float | None
) -> None:
    assert kernels.table == 64
    assert ages(AVERAGED_ADAM, kind, different, factor).problems(kernels) == []


@EVERY_RULE
@EVERY_KIND
def test_1000_tensors_take_few_launches(kernels: Kernels, rule: Rule, kind: Kind) -> None:
    """A launch takes fewer where tensors may have others beside them."""
    most = 6 if kind.stored else 4
    assert 1 <= kernels.launches(job_of(kernels, rule, kind, [5] * 1000)) <= most


def job_of(kernels: Kernels, rule: Rule, kind: Kind, sizes: list[int]) -> Job:
    """Tensors that have no memory, for launches that do not run."""
    spans = (Span * len(sizes))(*(Span(numel=n) for n in sizes))
    for span in spans:
        span.format[2] = {FLOATS: F32, HALVES: BF16, STORED: CODE, DOUBLES: F64}[kind].number
    return Job(
        rule=rule.number,
        averaged=rule.averaged,
        in_double=kind.in_double,
        spans=spans,
        count=len(sizes),
        rules=ctypes.addressof(ctypes.create_string_buffer(kernels.about(rule, kind).size)),
    )


def test_empty_tensors_alone(kernels: Kernels) -> None:
    for on_device, launches in ((False, 0), (True, 1)):
        items = [Item(0, KINDS[FLOATS][0], on_device=on_device, copy=F32)] * 3
        before = kernels.settings.launches
        assert Case(ADAM, items, factor=FACTOR).problems(kernels) == []
        assert kernels.settings.launches - before == launches


@pytest.mark.parametrize(
    "threads, blocks", [("up", "up"), ("down", "up"), ("down", "down"), ("mixed", "mixed")]
)
@EVERY_KIND
def test_the_order_of_threads_and_blocks_is_free(
    kernels: Kernels, kind: Kind, threads: str, blocks: str
) -> None:
    """Also where there are fewer blocks than tiles, so that a block goes on to tiles of other tensors."""
    entries, tile = kernels.about(AVERAGED_ADAM, kind).entries, kernels.tile(kind)
    device = many(AVERAGED_ADAM, kind, entries, "device")
    several = [many(AVERAGED_ADAM, kind, entries, "host", FACTOR), seams(ADAM, kind, tile, "mixed")]
    with kernels.set(thread_order=ORDERS[threads], block_order=ORDERS[blocks]):
        assert device.problems(kernels) == []
        with kernels.set(largest_grid=FEW_BLOCKS):
            assert [case.problems(kernels) for case in several] == [[], []]


@pytest.mark.parametrize("pages", ["before", "after"])
@EVERY_KIND
def test_nothing_outside_of_the_tensors_is_read(kernels: Kernels, kind: Kind, pages: str) -> None:
    rule = Rule("amsgrad", averaged=True)
    case = seams(rule, kind, kernels.tile(kind), "mixed", FACTOR, pages)
    assert in_child(lambda: str(case.problems(kernels))) == "[]"


def test_the_page_between_two_tensors_is_closed(kernels: Kernels) -> None:
    rule = Rule("amsgrad", averaged=True)
    case = seams(rule, FLOATS, kernels.tile(FLOATS), "mixed", FACTOR, "before")
    last = max(part.rest.end for parts in case.parts for part in parts)

    def read_past_the_end() -> str:
        memory = case.memory.copy_of(case.start)
        with case.memory.closed(memory):
            return str(memory[last].item())

    assert in_child(read_past_the_end) == "killed by SIGSEGV"


@pytest.mark.parametrize(
    "kind, several",
    [
        (FLOATS, (F32,) * 5),
        (HALVES, (BF16,) * 5),
        (STORED, (SPLIT8, BF16, CODE, CODE, AT_RANDOM[0], BF16)),
    ],
    ids=["floats", "halves", "stored"],
)
@pytest.mark.parametrize("shift", [0, 1])
def test_more_than_2_to_the_32_elements(
    kernels: Kernels, kind: Kind, several: tuple[Format, ...], shift: int
) -> None:
    try:
        assert problems_of_a_huge_tensor(kernels, kind, several, shift) == []
    except OSError as error:
        pytest.skip(f"no addresses for so much: {error}")


def test_launches_are_cut_where_tiles_can_no_longer_be_counted(kernels: Kernels) -> None:
    """Nothing runs: no such tensors exist. But a launch's tiles are counted in 32 bits."""
    assert kernels.launches(job_of(kernels, ADAM, FLOATS, [2**30 * kernels.tile(FLOATS)] * 5)) >= 2


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
