"""On a GPU: the bits of the reference on a CPU, for every rule and dtype, however the step is launched.

Needs a CUDA device, and is skipped where there is none, or fails with ``ADAMFUSED_NEED_GPU=1``; what can be checked
without one is in ``test_cuda_build.py`` and ``test_cuda_on_host.py``.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import COMPLEX_DTYPES, REAL_DTYPES, assert_same_bits, give_gradient, tensors_of, wild
from test_exact import CASES
from test_storage_exact import RULES, STORED, every_format
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

import adamfused
from adamfused import AdamW, norm, step_in_backward

if os.environ.get("ADAMFUSED_NEED_GPU") == "1" and not torch.cuda.is_available():
    pytest.fail(f"ADAMFUSED_NEED_GPU=1, but torch {torch.__version__} finds no CUDA device")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TILE = 256 * 8 * 4  # numbers that a block of threads moves at a time, at the most
SIZES = [0, 1, 5, 255, 1023, 1024, TILE - 1, TILE, TILE + 1, 100_003, 0]
GPU = "cuda"

# By a parameter's dtype, that of a copy.
COPY_DTYPES = {
    torch.float32: torch.bfloat16,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float64,
    torch.float64: torch.float16,
    torch.complex64: torch.complex128,
    torch.complex128: torch.complex64,
}
WHOLE = {"max_grad_norm": 2.0, "ema_decay": 0.9, "copies": True}


@pytest.fixture(autouse=True)
def ends_the_process_after_a_fault(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fault of the device stays with its process, and each later test there would fail: pytest-xdist starts anew."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if capture := request.config.pluginmanager.getplugin("capturemanager"):
            capture.suspend_global_capture()
        first = str(error).splitlines()[0]
        print(f"\n{request.node.nodeid} left a fault: {first}", file=sys.stderr, flush=True)
        os._exit(1)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def to_gpu(t: Tensor) -> Tensor:
    return t.to(GPU)


def pair(
    case, dtypes, sizes, capturable: bool = False, copies: bool = False, **options
) -> tuple[Optimizer, Optimizer]:
    """One optimizer with the kernels on the GPU, and its twin with the reference on the CPU."""
    make, kwargs = case
    rng = np.random.default_rng(0)
    starts = [wild(rng, n, dtype) for dtype in dtypes for n in sizes]
    on_gpu = [torch.nn.Parameter(to_gpu(t)) for t in starts]
    on_cpu = [torch.nn.Parameter(t.clone()) for t in starts]
    return (
        make(
            on_gpu,
            backend="native",
            capturable=capturable,
            copy_to=empty_copies(on_gpu) if copies else None,
            **kwargs,
            **options,
        ),
        make(
            on_cpu,
            backend="reference",
            copy_to=empty_copies(on_cpu) if copies else None,
            **kwargs,
            **options,
        ),
    )


def empty_copies(params: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p, dtype=COPY_DTYPES[p.dtype], requires_grad=False) for p in params]


def feed(gpu: Optimizer, cpu: Optimizer, t: int, specials: float = 0.02) -> None:
    """The same gradients for both; every third parameter has none at every third step."""
    rng = np.random.default_rng(t)
    params = zip(gpu.param_groups[0]["params"], cpu.param_groups[0]["params"], strict=True)
    for i, (p, q) in enumerate(params):
        grad = wild(rng, q.numel(), q.dtype, specials if t % 5 == 0 else 0).reshape(q.shape)
        missing = t % 3 == 0 and i % 3 == 0
        give_gradient(q, None if missing else grad)
        give_gradient(p, None if missing else to_gpu(grad))


def all_of(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Everything that a step leaves."""
    yield from tensors_of(optimizer)
    for i, t in enumerate(optimizer._copies.values()):
        yield f"copy {i}", t
    if optimizer.grad_norm is not None:
        yield "the norm", optimizer.grad_norm


def assert_same(gpu: Optimizer, cpu: Optimizer) -> None:
    for (name, x), (other, y) in zip(all_of(gpu), all_of(cpu), strict=True):
        assert name == other
        assert_same_bits(x.detach().cpu(), y.detach().cpu(), name)


def run(gpu: Optimizer, cpu: Optimizer, steps: int, specials: float = 0.02) -> None:
    for t in range(1, steps + 1):
        feed(gpu, cpu, t, specials)
        gpu.step()
        cpu.step()
    assert_same(gpu, cpu)


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", REAL_DTYPES + COMPLEX_DTYPES, ids=str)
def test_every_rule_and_dtype(case, dtype) -> None:
    run(*pair(case, [dtype], SIZES), steps=20)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16, torch.float64, "param"])
def test_states_of_another_dtype(case, state_dtype) -> None:
    make, kwargs = case
    run(*pair((make, {**kwargs, "state_dtype": state_dtype}), [torch.bfloat16], SIZES), steps=5)


def test_a_flipped_bit_is_noticed() -> None:
    gpu, cpu = pair(CASES["adamw"], [torch.float32], [1000])
    run(gpu, cpu, 2)
    with torch.no_grad():
        gpu.param_groups[0]["params"][0].view(torch.int32)[777] ^= 1
    with pytest.raises(AssertionError, match="1 of 1000 differ in bits, first at 777"):
        assert_same(gpu, cpu)


def test_hundreds_of_tensors_of_several_dtypes() -> None:
    """Several launches, with an empty tensor in the first, the last and any other place."""
    sizes = [0, *(1 + 37 * i % 5000 for i in range(400)), 0]
    run(*pair(CASES["adamw"], [torch.float32, torch.bfloat16, torch.float64], sizes), steps=3)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_misaligned_views(dtype) -> None:
    rng = np.random.default_rng(0)
    start, grads = wild(rng, 5003, dtype), [wild(rng, 5003, dtype) for _ in range(3)]
    for shift in (1, 3):
        whole = torch.full((5003 + 2 * shift,), 7.0, dtype=dtype, device=GPU)
        view = whole[shift : shift + 5003]
        view.copy_(start)
        p, q = torch.nn.Parameter(view), torch.nn.Parameter(start.clone())
        gpu, cpu = AdamW([p], backend="native"), AdamW([q], backend="reference")
        for g in grads:
            p.grad, q.grad = to_gpu(g), g
            gpu.step()
            cpu.step()
        assert_same(gpu, cpu)
        assert (whole[:shift] == 7).all() and (whole[shift + 5003 :] == 7).all()


@pytest.mark.parametrize("form", ["channels_last", "transposed", "strided", "expanded gradient"])
def test_layouts(form) -> None:
    rng = np.random.default_rng(0)
    start = wild(rng, 2 * 3 * 4 * 5, torch.float32).reshape(2, 3, 4, 5)
    grad = wild(rng, 2 * 3 * 4 * 5, torch.float32).reshape(2, 3, 4, 5)
    shaped = {
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
        "strided": lambda t: torch.stack([t, t], -1)[..., 0],
        "expanded gradient": lambda t: t,
    }[form]
    if form == "expanded gradient":
        grad = grad[:1, :1]
    p, q = torch.nn.Parameter(shaped(to_gpu(start))), torch.nn.Parameter(start.clone())
    gpu, cpu = AdamW([p], backend="native"), AdamW([q], backend="reference")
    for _ in range(3):  # expanded after the copy, which would make it dense
        p.grad, q.grad = to_gpu(grad).expand_as(p), grad.clone().expand_as(q)
        if form == "expanded gradient":
            assert p.grad.stride()[:2] == (0, 0)
        gpu.step()
        cpu.step()
    assert_same(gpu, cpu)


def test_over_two_to_the_31_elements() -> None:
    n = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 8 * n + 2**30:
        pytest.skip("needs 18 GB of free GPU memory")
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device=GPU))
    p.grad = torch.ones(n, dtype=torch.bfloat16, device=GPU)
    ends = [*range(5), *range(n - 5, n)]
    p.grad[ends] = torch.arange(10, dtype=torch.bfloat16, device=GPU) - 4
    gpu = AdamW([p], lr=0.1, state_dtype="param", backend="native")
    q = torch.nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    q.grad = p.grad[ends].cpu()
    cpu = AdamW([q], lr=0.1, state_dtype="param", backend="reference")
    for _ in range(3):
        gpu.step()
        cpu.step()
    assert_same_bits(p.detach()[ends].cpu(), q.detach())
    middle = p.detach()[2**31 - 4096 : 2**31 - 4000].cpu()
    assert (middle == middle[0]).all() and middle[0] != 1
    assert bool((p.detach()[5:-5] == middle[0]).all())


# ---- storage formats -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_every_format_of_parameters_and_states(rule) -> None:
    """At every size at which something changes; each third gradient is missing, and the fifth has special numbers."""
    for dtype, options, seams in every_format():
        sizes = [*seams, TILE - 1, TILE + 1, 2 * TILE + 129]
        run(*pair(RULES[rule], [dtype], sizes, seed=5, **options), steps=5)


@pytest.mark.parametrize("options", [WHOLE, WHOLE | {"capturable": True}], ids=["host", "device"])
@pytest.mark.parametrize("how", STORED)
def test_every_format_in_one_pass(how, options) -> None:
    """Unscaled, clipped, averaged and copied, with step counts on the host or on the device."""
    dtypes, formats = STORED[how]
    several = options | formats
    run(*pair(CASES["adamw"], dtypes, [5, 4097, 100_003], **several), steps=6, specials=0)


@pytest.mark.parametrize("how", STORED)
def test_hundreds_of_tensors_in_every_format(how) -> None:
    dtypes, options = STORED[how]
    sizes = [0, *(1 + 37 * i % 9000 for i in range(600)), 0]
    run(*pair(CASES["adamw-amsgrad"], dtypes, sizes, **options), steps=3)


@pytest.mark.parametrize("how", STORED)
def test_misaligned_views_in_every_format(how) -> None:
    dtypes, options = STORED[how]
    rng = np.random.default_rng(0)
    for dtype in dtypes:
        start, grads = wild(rng, 5003, dtype), [wild(rng, 5003, dtype) for _ in range(3)]
        whole = torch.full((5005,), 7.0, dtype=dtype, device=GPU)
        whole[1:-1] = to_gpu(start)
        p, q = torch.nn.Parameter(whole[1:-1]), torch.nn.Parameter(start.clone())
        gpu = AdamW([p], backend="native", **options)
        cpu = AdamW([q], backend="reference", **options)
        for g in grads:
            p.grad, q.grad = to_gpu(g), g
            gpu.step()
            cpu.step()
        assert_same(gpu, cpu)
        assert (whole[[0, -1]] == 7).all()


@pytest.mark.parametrize("how", STORED)
def test_random_numbers_are_new_at_each_replay_of_a_graph(how) -> None:
    dtypes, options = STORED[how]
    pairs = pair(CASES["adamw"], dtypes, [5, 5000], capturable=True, **options)
    replayed, eager = pairs
    for p, q in zip(*(o.param_groups[0]["params"] for o in pairs), strict=True):
        q.grad = wild(np.random.default_rng(0), q.numel(), q.dtype)
        p.grad = to_gpu(q.grad)
    graph = captured(replayed.step, replayed.step)
    eager.step()
    for _ in range(10):
        graph.replay()
        eager.step()
        assert_same(replayed, eager)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "exp_avg_scale", "master"])
def test_a_flipped_bit_of_what_is_stored_is_noticed(key) -> None:
    options = {"master_weights": "split8", "state_dtype": "int8"}
    gpu, cpu = pair(CASES["adamw"], [torch.bfloat16], [5000], **options)
    run(gpu, cpu, 2)
    stored = gpu.state[gpu.param_groups[0]["params"][0]][key]
    stored.view({1: torch.int8, 4: torch.int32}[stored.element_size()])[7] ^= 1
    with pytest.raises(AssertionError, match=f"'{key}'.* differ in bits, first at 7"):
        assert_same(gpu, cpu)


# ---- clipped, averaged, copied, unscaled ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_rule_in_one_pass(case, dtype) -> None:
    run(*pair(case, [dtype], SIZES, **WHOLE), steps=4, specials=0)


@pytest.mark.parametrize("dtype", REAL_DTYPES + COMPLEX_DTYPES, ids=str)
def test_every_dtype_in_one_pass(dtype) -> None:
    run(*pair(CASES["adamw"], [dtype], SIZES, **WHOLE), steps=20, specials=0)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_type": math.inf},
        {"ema_decay": 0.3, "ema_dtype": torch.float16},
        {"ema_decay": lambda t: min(0.99, t / (t + 10)), "ema_dtype": torch.float64},
        {"capturable": True},
    ],
    ids=["the largest", "a far average", "a function", "capturable"],
)
def test_options_in_one_pass(options) -> None:
    run(*pair(CASES["adamw"], [torch.float32], SIZES, **WHOLE | options), steps=6, specials=0)


def test_hundreds_of_tensors_in_one_pass() -> None:
    sizes = [0, *(1 + 37 * i % 5000 for i in range(400)), 0]
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    run(*pair(CASES["adamw"], dtypes, sizes, **WHOLE), steps=3, specials=0)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_the_norm_is_that_of_the_reference(norm_type) -> None:
    """In float64, also where gradients have special numbers; and not by luck: it notices one bit."""
    sizes = [0, 1, 31, 32, 33, 4095, 4096, 4097, 100_003]
    gpu, cpu = pair(CASES["adamw"], REAL_DTYPES, sizes, norm_type=norm_type)
    for t, specials in enumerate([0, 0.001, 0.5], start=1):
        feed(gpu, cpu, 5 * t, specials)
        assert_same_bits(adamfused.grad_norm([gpu]).cpu(), adamfused.grad_norm([cpu]))
    feed(gpu, cpu, 1, specials=0)
    grads = [p.grad for p in cpu.param_groups[0]["params"] if p.grad is not None and p.numel()]
    largest = max(grads, key=lambda g: float(g.double().abs().max()))
    largest[int(largest.double().abs().argmax())] *= 1.01
    with pytest.raises(AssertionError, match="1 of 1 differ"):
        assert_same_bits(adamfused.grad_norm([gpu]).cpu(), adamfused.grad_norm([cpu]))


def test_norm_of_over_two_to_the_32_numbers() -> None:
    """Of ones and a few twos, whose sum is exact in any order; a launch has more chunks than warps."""
    n = 2**32 + 5
    if torch.cuda.mem_get_info()[0] < 4 * n + 2**30:
        pytest.skip("needs 18 GB of free GPU memory")
    p = torch.nn.Parameter(torch.empty(n, dtype=torch.bfloat16, device=GPU))
    p.grad = torch.ones(n, dtype=torch.bfloat16, device=GPU)
    p.grad[[0, 2**31, 2**32, n - 1]] = 2.0
    assert adamfused.grad_norm([AdamW([p], backend="native")]) == math.sqrt(n + 4 * 3)


def test_norm_over_the_gpu_and_the_cpu() -> None:
    """One sum on each, and these are added; clipping is by the norm of all."""
    rng = np.random.default_rng(0)
    weights, grads = ([wild(rng, n, torch.float32) for n in (5000, 3)] for _ in range(2))
    params = [
        torch.nn.Parameter(w.to(d, copy=True)) for w, d in zip(weights, (GPU, "cpu"), strict=True)
    ]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(p.device, copy=True)
    sums = [norm.reference_sum([g], [g], False) for g in grads]
    optimizer = AdamW(params, max_grad_norm=2.0, backend="native")
    optimizer.step()
    assert_same_bits(optimizer.grad_norm.cpu(), torch.tensor(math.sqrt(sums[0] + sums[1])))

    twins = [torch.nn.Parameter(w.clone()) for w in weights]
    for q, g in zip(twins, grads, strict=True):
        q.grad = g
    twin = AdamW(twins, max_grad_norm=2.0, backend="reference")
    twin.step(grad_norm=adamfused.grad_norm([optimizer]).cpu())
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p.detach().cpu(), q.detach())


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_grad_scaler_skips_steps_that_overflow(dtype, capturable) -> None:
    gpu, cpu = pair(CASES["adamw"], [dtype], SIZES, capturable=capturable, **WHOLE)
    scalers = [GradScaler(d, init_scale=3000.7, growth_interval=2) for d in (GPU, "cpu")]
    for scaler, device in zip(scalers, (GPU, "cpu"), strict=True):
        scaler.scale(torch.ones((), device=device))  # makes the scale
    for t in range(1, 7):
        feed(gpu, cpu, t, specials=0)
        for optimizer, scaler in zip((gpu, cpu), scalers, strict=True):
            if t in (2, 5):
                optimizer.param_groups[0]["params"][4].grad[-1] = math.inf
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_same(gpu, cpu)
    assert gpu.state[gpu.param_groups[0]["params"][4]]["step"] == 4


def test_averaged_weights_for_evaluation() -> None:
    gpu, cpu = pair(CASES["adamw"], [torch.bfloat16], SIZES, **WHOLE)
    run(gpu, cpu, steps=3, specials=0)
    with gpu.swap_ema(), cpu.swap_ema():
        assert_same(gpu, cpu)
    assert_same(gpu, cpu)


# ---- how it is launched --------------------------------------------------------------------------


def captured(step: Callable[[], Any], first: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of ``step``, after ``first``, which makes the states."""
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        first()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("options", [{}, WHOLE], ids=["plain", "whole"])
@pytest.mark.parametrize(
    "name", ["adam", "adamw", "adamw-amsgrad", "rmsprop-all", "sgd-nesterov", "nadam"]
)
def test_graph_replayed_a_hundred_times(name, options) -> None:
    """A step in a graph reads the learning rate, the counts and the gradients, and leaves the norm, anew each time."""
    make, kwargs = CASES[name]
    lrs = [1e-3, 3e-3, 1e-4]
    case = make, kwargs | {"lr": torch.tensor(lrs[0])}
    replayed, eager = pair(case, [torch.float32], [5, 5000, 0, 100_003], capturable=True, **options)
    replayed.param_groups[0]["lr"] = to_gpu(torch.tensor(lrs[0]))
    params = [o.param_groups[0]["params"] for o in (replayed, eager)]
    for p, q in zip(*params, strict=True):
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    graph = captured(replayed.step, replayed.step)
    eager.step()
    for t in range(100):
        for optimizer in (replayed, eager):
            optimizer.param_groups[0]["lr"].fill_(lrs[t % len(lrs)])
        for p, q in zip(*params, strict=True):
            q.grad.copy_(wild(np.random.default_rng(t), q.numel(), q.dtype))
            p.grad.copy_(q.grad)
        graph.replay()
        eager.step()
        if options:
            assert_same_bits(replayed.grad_norm.cpu(), eager.grad_norm)
    assert_same(replayed, eager)
    assert float(next(iter(eager.state.values()))["step"]) == 101


def test_graph_of_a_step_that_a_grad_scaler_may_skip() -> None:
    """What a GradScaler says, the graph reads on the device: at the second replay, that there was an overflow."""
    gpu, cpu = pair(CASES["adamw"], [torch.float32], [5, 100_003], capturable=True, **WHOLE)
    for optimizer in (gpu, cpu):
        device = optimizer.param_groups[0]["params"][0].device
        optimizer.grad_scale = torch.tensor(3000.7, device=device)
        optimizer.found_inf = torch.zeros((), device=device)
    feed(gpu, cpu, 1, specials=0)
    graph = captured(gpu.step, gpu.step)
    cpu.step()
    for overflow in (0.0, 1.0, 0.0):
        gpu.found_inf.fill_(overflow)
        cpu.found_inf.fill_(overflow)
        graph.replay()
        cpu.step()
        assert_same(gpu, cpu)
    assert all(state["step"] == 3 for state in gpu.state.values())


@pytest.mark.parametrize("how", ["plain", *STORED])
def test_graph_of_a_step_after_a_checkpoint(how) -> None:
    """Loaded from a file by way of the CPU: the counts are on the device again, where the graph moves them on."""
    dtypes, formats = STORED.get(how, ([torch.float32], {}))
    several = {"capturable": True} | WHOLE | formats
    gpu, cpu = pair(CASES["adamw"], dtypes, [5, 5000], **several)
    run(gpu, cpu, steps=2, specials=0)  # at the third, a gradient is missing
    file = io.BytesIO()
    torch.save(gpu.state_dict(), file)
    file.seek(0)
    loaded, _ = pair(CASES["adamw"], dtypes, [5, 5000], **several)
    params = [o.param_groups[0]["params"] for o in (loaded, gpu)]
    with torch.no_grad():
        for p, q in zip(*params, strict=True):
            p.copy_(q)
            p.grad = q.grad
    loaded.load_state_dict(torch.load(file, map_location="cpu"))
    assert {state["step"].device.type for state in loaded.state.values()} == {GPU}
    graph = captured(loaded.step, loaded.step)
    cpu.step()
    for _ in range(3):
        graph.replay()
        cpu.step()
        assert_same(loaded, cpu)
    assert all(state["step"] == 6 for state in loaded.state.values())


@pytest.mark.parametrize("waits", [True, False], ids=["waits for an event", "on the same stream"])
def test_gradient_made_on_a_side_stream(waits) -> None:
    """The step runs on the current stream: the main one, which waits for the gradient, or the gradient's own."""
    gpu, cpu = pair(CASES["adamw"], [torch.float32], [1_000_003])
    p, q = gpu.param_groups[0]["params"][0], cpu.param_groups[0]["params"][0]
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    for t in range(5):
        q.grad = wild(np.random.default_rng(t), q.numel(), q.dtype)
        on_gpu = to_gpu(q.grad)
        p.grad = torch.zeros_like(p)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # a step that comes too early reads zeros
            p.grad.copy_(on_gpu)
            if waits:
                main.wait_event(side.record_event())
            else:
                gpu.step()
        if waits:
            gpu.step()
        main.wait_stream(side)
        cpu.step()
    assert_same(gpu, cpu)


def test_no_synchronisation_and_no_allocation_in_a_steady_step() -> None:
    for kwargs in ({}, {"capturable": True}):
        params = [torch.nn.Parameter(torch.randn(1000, device=GPU)) for _ in range(300)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = AdamW(params, backend="native", **kwargs)
        optimizer.step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def without_synchronisation(step: Callable[[], Any], times: int = 10) -> None:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(times):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_synchronisation_in_a_step_that_does_all() -> None:
    """Unscaled and maybe skipped for a GradScaler, clipped, averaged, copied."""
    params = [torch.nn.Parameter(torch.randn(1000, device=GPU)) for _ in range(300)]
    for p in params:
        p.grad = torch.randn_like(p)
    whole = {"max_grad_norm": 1.0, "ema_decay": 0.9, "copy_to": empty_copies(params)}
    clipped = AdamW(params, backend="native", **whole)
    clipped.step()
    without_synchronisation(clipped.step)

    optimizer, scaler = AdamW(params, backend="native", capturable=True, **whole), GradScaler(GPU)
    scaler.scale(torch.ones((), device=GPU))  # makes the scale

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    step()
    without_synchronisation(step)
    assert optimizer.state[params[0]]["step"] == 11


def comes_back_first(step: Callable[[], Any]) -> bool:
    """Whether a step returns while the device is at what was queued before it; torch sees only its own waiting."""
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # half a second
    slept = torch.cuda.Event()
    slept.record()
    step()
    return not slept.query()


@pytest.mark.parametrize("options", [{}, WHOLE], ids=["plain", "whole"])
@pytest.mark.parametrize("capturable", [False, True])
def test_the_host_does_not_wait_for_the_device(capturable, options) -> None:
    gpu, cpu = pair(CASES["adamw"], [torch.float32], [1000] * 300, capturable, **options)
    feed(gpu, cpu, 1, specials=0)
    for _ in range(2):
        gpu.step()
    assert comes_back_first(gpu.step)


def test_control_an_error_for_norms_that_are_not_finite_has_to_wait() -> None:
    p = torch.nn.Parameter(torch.randn(1000, device=GPU))
    p.grad = torch.randn_like(p)
    optimizer = AdamW([p], max_grad_norm=1.0, error_if_nonfinite=True, backend="native")
    optimizer.step()
    with pytest.raises(RuntimeError, match="synchronizing"):
        without_synchronisation(optimizer.step)
    assert not comes_back_first(optimizer.step)


def test_a_thousand_tensors_take_few_launches() -> None:
    params = [torch.nn.Parameter(torch.randn(16, device=GPU)) for _ in range(1000)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = AdamW(params, backend="native", max_grad_norm=1.0)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events()]
    assert 1 <= sum("step_kernel" in name for name in names) <= 4
    assert 2 <= sum("sum_kernel" in name for name in names) <= 9  # one of them for the sum of sums


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_parameters_on_several_devices() -> None:
    gpu, cpu = pair(CASES["adamw"], [torch.float32], [1000, 5000])
    with torch.no_grad():
        p = gpu.param_groups[0]["params"][1]
        p.data = p.data.to("cuda:1")
    run(gpu, cpu, 1)


# ---- with the rest of torch ----------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [False, True])
def test_tensor_lr(capturable) -> None:
    lr = torch.tensor(1e-3, device=GPU if capturable else "cpu")
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 999).to(d)) for d in (GPU, "cpu"))
    gpu = AdamW([p], lr=lr, capturable=capturable, backend="native")
    cpu = AdamW([q], lr=float(lr), backend="reference")
    for t in range(4):
        lr.fill_(1e-3 * (t + 1))
        cpu.param_groups[0]["lr"] = float(lr)
        p.grad, q.grad = p.detach().sin(), p.detach().sin().cpu()
        gpu.step()
        cpu.step()
    assert_same_bits(p.detach().cpu(), q.detach())


@pytest.mark.parametrize("on_a_side", [False, True], ids=["main stream", "side stream"])
@pytest.mark.parametrize("how", STORED)
def test_step_in_backward(how, on_a_side) -> None:
    """Gradients that are the same on both devices: of a sum of products, they are the other factors."""
    dtypes, options = STORED[how]
    _, cpu = pair(CASES["adamw"], dtypes, [5, 5000, 100_003], ema_decay=0.9, **options)
    twins = cpu.param_groups[0]["params"]
    model = torch.nn.ParameterList([to_gpu(q.detach()) for q in twins])
    make, kwargs = CASES["adamw"]
    kwargs = kwargs | {"ema_decay": 0.9, "backend": "native"} | options
    handle = step_in_backward(model, lambda named: make(named, **kwargs))
    main = torch.cuda.current_stream()
    stream = torch.cuda.Stream() if on_a_side else main
    stream.wait_stream(main)
    for t in range(1, 6):
        rng = np.random.default_rng(t)
        for q in twins:
            q.grad = wild(rng, q.numel(), q.dtype, specials=0)
        with torch.cuda.stream(stream):
            factors = [to_gpu(q.grad) for q in twins]
            sum((p * g).sum() for p, g in zip(model, factors, strict=True)).backward()
            assert all(p.grad is None for p in model)
            handle.optimizer.step()
        cpu.step()
    main.wait_stream(stream)
    assert_same(handle.optimizer, cpu)


@pytest.mark.parametrize("options", [{}, WHOLE], ids=["plain", "whole"])
def test_compiled_step(options) -> None:
    case = CASES["adamw"]
    compiled, _ = pair(case, [torch.float32], [999], capturable=True, **options)
    eager, _ = pair(case, [torch.float32], [999], capturable=True, **options)
    for optimizer in (compiled, eager):
        (p,) = optimizer.param_groups[0]["params"]
        p.grad = torch.sin(7 * p.detach())

    @torch.compile(fullgraph=True)
    def step() -> None:
        compiled.step()

    for _ in range(3):
        step()
        eager.step()
    assert_same(compiled, eager)


def test_self_test_of_the_installation() -> None:
    assert adamfused.backend.native().cuda_self_test() is None


def test_info_makes_a_step_of_everything() -> None:
    found = adamfused.info()
    assert found.ok and {use.backend for use in found.uses if use.device != "cpu"} == {"native"}


def test_bench_counts_launches_and_the_hosts_time() -> None:
    optimizers = ["adamfused:AdamW", "torch.optim:AdamW[fused=True]"]
    report = adamfused.bench(optimizers, ["1e6", "100x16"], device=GPU, seconds=0.3)
    for row in report.rows:
        assert row.problem == "" and row.time is not None
        assert row.host is not None and row.host > 0
        assert row.launches is not None and row.launches >= 1
    assert report.row("adamfused:AdamW", "100x16").launches <= 4


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_every_case_of_parity(name: str) -> None:
    report = adamfused.parity(
        f"adamfused:{name}", cases="hostile,quick,bfloat16", device=GPU, isolated=False
    )
    assert report.passed, [(r.case, r.detail) for r in report.failures]
