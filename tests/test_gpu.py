"""On a GPU: the bits of the reference on a CPU, for every rule and dtype, however the step is launched.

Needs a CUDA device, and is skipped where there is none; what can be checked without one is in
``test_cuda_build.py`` and ``test_cuda_on_host.py``.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import COMPLEX_DTYPES, REAL_DTYPES, assert_same_bits, give_gradient, tensors_of, wild
from test_exact import CASES
from torch import Tensor
from torch.optim import Optimizer

import adamfused
from adamfused import AdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TILE = 256 * 8 * 4  # numbers that a block of threads moves at a time, at the most
SIZES = [0, 1, 5, 255, 1023, 1024, TILE - 1, TILE, TILE + 1, 100_003, 0]
GPU = "cuda"


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def to_gpu(t: Tensor) -> Tensor:
    return t.to(GPU)


def pair(case, dtypes, sizes, **more) -> tuple[Optimizer, Optimizer]:
    """One optimizer with the kernels on the GPU, and its twin with the reference on the CPU."""
    make, kwargs = case
    rng = np.random.default_rng(0)
    starts = [wild(rng, n, dtype) for dtype in dtypes for n in sizes]
    on_gpu = [torch.nn.Parameter(to_gpu(t)) for t in starts]
    on_cpu = [torch.nn.Parameter(t.clone()) for t in starts]
    return (
        make(on_gpu, backend="native", **kwargs, **more),
        make(on_cpu, backend="reference", **kwargs),
    )


def feed(gpu: Optimizer, cpu: Optimizer, t: int, specials: float = 0.02) -> None:
    """The same gradients for both; every third parameter has none at every third step."""
    rng = np.random.default_rng(t)
    params = zip(gpu.param_groups[0]["params"], cpu.param_groups[0]["params"], strict=True)
    for i, (p, q) in enumerate(params):
        grad = wild(rng, q.numel(), q.dtype, specials if t % 5 == 0 else 0).reshape(q.shape)
        missing = t % 3 == 0 and i % 3 == 0
        give_gradient(q, None if missing else grad)
        give_gradient(p, None if missing else to_gpu(grad))


def assert_same(gpu: Optimizer, cpu: Optimizer) -> None:
    for (name, x), (_, y) in zip(tensors_of(gpu), tensors_of(cpu), strict=True):
        assert_same_bits(x.detach().cpu(), y.detach(), name)


def run(gpu: Optimizer, cpu: Optimizer, steps: int) -> None:
    for t in range(1, steps + 1):
        feed(gpu, cpu, t)
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
        grad = grad[:1, :1].expand(2, 3, 4, 5)
    p, q = torch.nn.Parameter(shaped(to_gpu(start))), torch.nn.Parameter(start.clone())
    gpu, cpu = AdamW([p], backend="native"), AdamW([q], backend="reference")
    for _ in range(3):
        p.grad, q.grad = to_gpu(grad), grad.clone()
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


# ---- how it is launched --------------------------------------------------------------------------


def captured(case, steps: int, lrs) -> tuple[Optimizer, Optimizer]:
    """An optimizer replayed from a CUDA graph, and its twin stepped eagerly, on the same data."""
    make, kwargs = case
    rng = np.random.default_rng(0)
    starts = [to_gpu(wild(rng, n, torch.float32)) for n in (5, 5000, 0, 100_003)]
    both = []
    for _ in range(2):
        params = [torch.nn.Parameter(t.clone()) for t in starts]
        for p in params:
            p.grad = torch.zeros_like(p)
        lr = torch.tensor(lrs[0], device=GPU)
        both.append(make(params, **{**kwargs, "lr": lr}, capturable=True, backend="native"))
    replayed, eager = both
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        replayed.step()  # makes the states
    torch.cuda.current_stream().wait_stream(warm)
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    for t in range(steps):
        for optimizer in both:
            optimizer.param_groups[0]["lr"].fill_(lrs[t % len(lrs)])
        for p, q in zip(*(o.param_groups[0]["params"] for o in both), strict=True):
            g = to_gpu(wild(np.random.default_rng(t), p.numel(), p.dtype))
            p.grad.copy_(g)
            q.grad.copy_(g)
        graph.replay()
        eager.step()
    return replayed, eager


@pytest.mark.parametrize("name", ["adam", "adamw", "adamw-amsgrad", "rmsprop-all"])
def test_graph_replayed_a_hundred_times(name) -> None:
    replayed, eager = captured(CASES[name], 100, [1e-3, 3e-3, 1e-4])
    for (what, x), (_, y) in zip(tensors_of(replayed), tensors_of(eager), strict=True):
        assert_same_bits(x.detach(), y.detach(), what)
    assert float(next(iter(eager.state.values()))["step"]) == 101


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


def test_a_thousand_tensors_take_few_launches() -> None:
    params = [torch.nn.Parameter(torch.randn(16, device=GPU)) for _ in range(1000)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = AdamW(params, backend="native")
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if "step_kernel" in e.name]
    assert 1 <= len(kernels) <= 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_parameters_on_several_devices() -> None:
    gpu, cpu = pair(CASES["adamw"], [torch.float32], [1000, 5000])
    with torch.no_grad():
        p = gpu.param_groups[0]["params"][1]
        p.data = p.data.to("cuda:1")
    run(gpu, cpu, 1)


# ---- with the rest of torch ----------------------------------------------------------------------


def test_grad_scaler_skips_a_step_that_overflows() -> None:
    p = torch.nn.Parameter(torch.randn(1000, device=GPU))
    optimizer = AdamW([p], backend="native")
    scaler = torch.amp.GradScaler(GPU, init_scale=4.0)
    scaler.scale((p * p).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    after_one, count = p.detach().clone(), optimizer.state[p]["step"].clone()
    optimizer.zero_grad()
    scaler.scale((p * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits(p.detach(), after_one)
    assert optimizer.state[p]["step"] == count == 1


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


def test_compiled_step() -> None:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 999, device=GPU))
    q = copy.deepcopy(p)
    compiled, eager = (AdamW([t], capturable=True, backend="native") for t in (p, q))
    for t in (p, q):
        t.grad = torch.sin(7 * t.detach())

    @torch.compile(fullgraph=True)
    def step() -> None:
        compiled.step()

    for _ in range(3):
        step()
        eager.step()
    assert_same_bits(p.detach(), q.detach())


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
    report = adamfused.parity(f"adamfused:{name}", cases="hostile,quick,bfloat16", device=GPU)
    assert report.passed, [(r.case, r.detail) for r in report.failures]
