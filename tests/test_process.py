"""Threads, processes and interruptions: none of them changes a bit, hangs, or loses a step."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, tensors_of, threads, wild
from torch import Tensor
from torch.optim import Optimizer

from adamfused import AdamW, RMSprop, backend

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(backend.native() is None, reason="the extension is not loaded"),
]
LARGE = 1 << 20  # numbers: enough for every thread
TESTS, PACKAGE = Path(__file__).parent, Path(backend.__file__).parents[1]
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}


def build(sizes: list[int], seed: int = 0, path: str = "native", **options: Any) -> Optimizer:
    rng = np.random.default_rng(seed)
    params = [torch.nn.Parameter(wild(rng, n, torch.float32)) for n in sizes]
    for p in params:
        p.grad = wild(rng, p.numel(), torch.float32)
    return AdamW(params, backend=path, **(OPTIONS | options))


def result(optimizer: Optimizer) -> str:
    """A hash of all bits, by numpy: torch's own operations hang in a forked child."""
    whole = hashlib.sha256()
    for _, t in tensors_of(optimizer):
        whole.update(t.detach().numpy().tobytes())
    return whole.hexdigest()


def expected(sizes: list[int], steps: int, seed: int = 0) -> str:
    optimizer = build(sizes, seed, "reference")
    for _ in range(steps):
        optimizer.step()
    return result(optimizer)


# ---- fork ----------------------------------------------------------------------------------------


def in_child(act: Callable[[], str], timeout_s: float = 10) -> str:
    """What ``act`` returns in a forked child: "hang" if it does not return in time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"failed"
        try:
            said = act().encode()
        finally:
            os.write(writer, said)
            os._exit(0)
    os.close(writer)
    try:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if os.waitpid(child, os.WNOHANG)[0]:
                child = 0
                return os.read(reader, 1000).decode()
            time.sleep(0.01)
        return "hang"
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(reader)


def stepped(optimizer: Optimizer, steps: int = 1) -> str:
    for _ in range(steps):
        optimizer.step()
    return result(optimizer)


def test_step_in_a_forked_child() -> None:
    with threads(2):
        optimizer = build([LARGE, 3])
        optimizer.step()  # torch's threads exist by now; they do not survive the fork
        said = in_child(lambda: stepped(optimizer))
    assert said == expected([LARGE, 3], steps=2)
    assert stepped(optimizer) == said, "the parent's own step"


def strided(n: int) -> list[Tensor]:
    """A parameter that moves by way of a copy, and one whose gradient lies otherwise in memory."""
    p = torch.nn.Parameter(torch.ones(n, 300)[:, ::2])
    q = torch.nn.Parameter(torch.ones(64, 64, 10, 10).to(memory_format=torch.channels_last))
    p.grad, q.grad = torch.ones(1).expand(p.shape), torch.ones(64, 64, 10, 10)
    return [p, q]


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "max_grad_norm": 1e9}])
def test_steps_with_copies_and_first_steps_in_a_forked_child(options: dict[str, Any]) -> None:
    """Those are torch's own parallel operations."""
    with threads(2):
        old, new = (AdamW(strided(2000), **options) for _ in range(2))
        old.step()
        in_parent = torch.get_num_threads()
        said = in_child(lambda: f"{stepped(new)} {stepped(old)} {torch.get_num_threads()}")
        assert said == f"{stepped(new)} {stepped(old)} {in_parent}"


def test_control_a_hang_is_noticed() -> None:
    with threads(2):
        torch.ones(LARGE).add_(1)
        said = in_child(lambda: str(torch.ones(LARGE).add_(1).sum()), timeout_s=1)
    assert said == "hang", "torch's own parallel operations hang there"
    assert in_child(lambda: time.sleep(9) or "", timeout_s=0.1) == "hang"


# ---- threads -------------------------------------------------------------------------------------


def in_threads(acts: list[Callable[[], Any]]) -> None:
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(acts))

    def run(act: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            act()
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=run, args=[act]) for act in acts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    assert not failures, failures


SIZES = [[LARGE // 8, 5, 70_000], [3] * 100, [1025, 0, 40_000]]


@pytest.mark.parametrize("n_threads", [1, 2])
def test_optimizers_stepped_at_once(n_threads) -> None:
    with threads(n_threads):
        optimizers = [build(sizes, seed) for seed, sizes in enumerate(SIZES)]
        in_threads([lambda o=o: stepped(o, 5) for o in optimizers])
    for seed, (o, sizes) in enumerate(zip(optimizers, SIZES, strict=True)):
        assert result(o) == expected(sizes, 5, seed)


def test_optimizers_of_one_model_stepped_at_once_share_no_bits() -> None:
    """Neighbours in one buffer, each with an optimizer and a thread of its own."""
    flat = [torch.linspace(-1, 1, 40_003) for _ in range(2)]
    cuts = [slice(0, 10_001), slice(10_001, 20_001), slice(20_001, 40_003)]
    for whole, path in zip(flat, ("native", "reference"), strict=True):
        acts = []
        for cut in cuts:
            p = torch.nn.Parameter(whole[cut])
            p.grad = whole[cut].cos()
            optimizer = RMSprop([p], momentum=0.9, backend=path)
            acts.append(lambda o=optimizer: stepped(o, 20))
        in_threads(acts) if path == "native" else [act() for act in acts]
    assert_same_bits(*flat)


def test_step_inside_the_backward_pass() -> None:
    """One optimizer a parameter, stepped from autograd's hooks, in threads that call backward at once."""

    def train(params: list[torch.nn.Parameter], path: str, hooked: bool) -> None:
        optimizers = {p: AdamW([p], lr=0.1, backend=path) for p in params}

        def move(p: torch.Tensor) -> None:
            optimizers[p].step()
            p.grad = None

        for p in params if hooked else []:
            p.register_post_accumulate_grad_hook(move)
        for _ in range(5):
            torch.stack([(p * p.detach().cos()).sum() for p in params]).sum().backward()
            for p in [] if hooked else params:
                move(p)

    def parameters(seed: int) -> list[torch.nn.Parameter]:
        return build([5, 70_000, 1025], seed).param_groups[0]["params"]

    models = [[parameters(seed) for seed in range(4)] for _ in range(2)]
    for p in (p for model in models for params in model for p in params):
        p.grad = None
    in_threads([lambda ps=params: train(ps, "native", hooked=True) for params in models[0]])
    for ours, twins in zip(*models, strict=True):
        train(twins, "reference", hooked=False)
        for p, q in zip(ours, twins, strict=True):
            assert_same_bits(p.detach(), q.detach())


def progress_during(act: Callable[[], Any]) -> float:
    """How often another Python thread could run while ``act`` did, per second."""
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.0005)

    other = threading.Thread(target=tick)
    begin = time.perf_counter()
    other.start()
    act()
    took, count = time.perf_counter() - begin, ticks
    done.set()
    other.join()
    return count / took


def test_other_python_threads_run_during_a_step() -> None:
    with threads(1):
        optimizer = build([16 * LARGE])
        optimizer.step()
        assert progress_during(lambda: stepped_only(optimizer, 5)) > 100


def stepped_only(optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.step()


def test_control_a_call_that_holds_the_interpreter_is_noticed() -> None:
    hold = ctypes.PyDLL(None).usleep  # PyDLL, other than CDLL, does not let go
    assert progress_during(lambda: hold(300_000)) < 100


class Odd(str):
    """A key that a dict takes for a string, and that runs some code when it is compared."""

    act: Callable[[], None]
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        self.act()
        return str(self) == other


@pytest.mark.parametrize("size", [16, LARGE // 8], ids=["brief", "long"])
@pytest.mark.parametrize("where", ["decay", "key"])
def test_python_that_runs_within_a_step_may_take_away_what_it_found(where, size) -> None:
    """Gradients and states that nothing else holds any more: their memory would be given to others."""
    junk: list[Tensor] = []
    calls = 0

    def take_away() -> None:
        nonlocal calls
        calls += 1
        for p in params:
            p.grad = None
            for key, value in optimizer.state[p].items():
                optimizer.state[p][key] = value.clone()
        junk.extend(torch.full((n,), torch.nan) for n in (1, size) for _ in range(100))

    def decay(t: float) -> float:
        if t == 2:
            take_away()
        return 0.9

    sizes = [size] * 10
    optimizer, twin = (
        build(sizes, **({"ema_decay": f} if where == "decay" else {}))
        for f in (decay, lambda t: 0.9)
    )
    params = optimizer.param_groups[0]["params"]
    optimizer.step(), twin.step()
    if where == "key":
        state = optimizer.state[params[5]]
        odd = Odd("step")
        odd.act = take_away
        optimizer.state[params[5]] = {odd: state.pop("step")} | state
    optimizer.step(), twin.step()
    assert calls > 0
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        assert_same_bits(p.detach(), q.detach())


def test_a_scale_may_be_taken_away_while_the_next_one_is_found() -> None:
    optimizer, twin = (build([2**13] * 3, state_dtype="int8") for _ in range(2))
    params = optimizer.param_groups[0]["params"]
    optimizer.step(), twin.step()
    state = optimizer.state[params[1]]
    junk: list[Tensor] = []

    def take_away() -> None:
        scale = state["exp_avg_scale"]
        state["exp_avg_scale"] = scale.clone()
        junk.extend(torch.full_like(scale, torch.nan) for _ in range(100))

    odd = Odd("exp_avg_sq_scale")
    odd.act = take_away
    state[odd] = state.pop("exp_avg_sq_scale")
    optimizer.step(), twin.step()
    assert junk
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        assert_same_bits(p.detach(), q.detach())


# ---- the environment of a process ----------------------------------------------------------------


def in_tests(**environment: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE), str(TESTS)])} | environment


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import torch, test_process as t; " + code],
        env=in_tests(**environment),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ENVIRONMENTS = [
    {"OMP_NUM_THREADS": "8"},
    {"OMP_NUM_THREADS": "8", "OMP_THREAD_LIMIT": "1"},
    {"OMP_NUM_THREADS": "8", "OMP_THREAD_LIMIT": "3", "OMP_DYNAMIC": "true"},
]


@pytest.mark.slow
@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
def test_openmp_settings_change_no_bit(environment) -> None:
    code = "print(t.stepped(t.build([t.LARGE // 4, 3, 100_000]), 3))"
    assert python(code, **environment) == expected([LARGE // 4, 3, 100_000], 3)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
def test_thread_count_changes_no_bit(n_threads) -> None:
    sizes = [LARGE // 4, 3, 100_000, 1024, 1025]
    with threads(n_threads):
        assert stepped(build(sizes), 3) == expected(sizes, 3)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_flushing_subnormals_elsewhere_changes_no_bit(n_threads) -> None:
    """The setting is a thread's own: obeyed, it would hold for some of the tiles only."""
    optimizer, twin = (build([LARGE // 8], path=path) for path in ("native", "reference"))
    for o in (optimizer, twin):
        o.param_groups[0]["params"][0].grad = torch.full((LARGE // 8,), 1e-20)
    twin.step()
    try:
        torch.set_flush_denormal(True)
        with threads(n_threads):
            optimizer.step()
    finally:
        torch.set_flush_denormal(False)
    assert all(0 < s["exp_avg_sq"].max() < 1e-38 for s in twin.state.values())
    assert result(optimizer) == result(twin)


# ---- interruptions -------------------------------------------------------------------------------


def train(file: str, last: int) -> str:
    """Training that goes on where the file says, and writes the file after each step."""
    optimizer, first = build([5, 30_000]), 0
    params = optimizer.param_groups[0]["params"]
    if os.path.exists(file):
        saved = torch.load(file, weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["n"]
        for p, data in zip(params, saved["params"], strict=True):
            p.data = data
    for n in range(first, last):
        for p in params:
            p.grad = wild(np.random.default_rng(n), p.numel(), p.dtype)
        optimizer.step()
        state = {
            "n": n + 1,
            "params": [p.data for p in params],
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, file + ".new")
        os.replace(file + ".new", file)
        if n == 2:
            print("under way", flush=True)
    return result(optimizer)


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_training_goes_on_after_the_process_was_ended(tmp_path, by) -> None:
    file, code = (
        str(tmp_path / "checkpoint"),
        # a shell's background jobs, and what they start, ignore SIGINT
        "import signal, sys, test_process as t; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "t.train(sys.argv[1], 10**9)",
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, file], env=in_tests(), stdout=-1, stderr=subprocess.DEVNULL
    )
    assert child.stdout is not None and child.stdout.readline() == b"under way\n"
    time.sleep(0.05)
    child.send_signal(by)
    try:
        child.wait(timeout=30)
    finally:
        child.kill()
        child.stdout.close()
    steps = torch.load(file, weights_only=True)["n"]
    assert train(file, steps + 3) == train(str(tmp_path / "other"), steps + 3)


class Alarm(BaseException):
    """Raised from a signal handler, as KeyboardInterrupt is."""


@pytest.mark.parametrize("start", [0, 2], ids=["the first step", "a later step"])
def test_interrupted_step_is_either_made_or_not(start) -> None:
    template = build([3, 100_000, 0, 5])  # mostly in the kernels
    grads = [p.grad for p in template.param_groups[0]["params"]]

    def after(steps: int) -> Optimizer:
        optimizer = copy.deepcopy(template)  # without the gradients
        for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            p.grad = g
        for _ in range(steps):
            optimizer.step()
        return optimizer

    def bits(optimizer: Optimizer) -> str:
        for p in [p for p, state in optimizer.state.items() if state["step"] == 0]:
            del optimizer.state[p]  # new, as good as none
        return result(optimizer)

    def ring(*_: Any) -> None:
        raise Alarm

    either = [bits(after(start)), bits(after(start + 1))]

    def seconds() -> float:
        optimizer = after(start)
        begin = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - begin

    took = min(seconds() for _ in range(3))
    handler = signal.signal(signal.SIGALRM, ring)
    seen: list[bool] = []
    delays = iter(np.random.default_rng(0).uniform(1e-6, 1.5 * took, 2000))
    try:
        while len(seen) < 30 and (delay := next(delays, None)) is not None:
            optimizer = after(start)
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                optimizer.step()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Alarm:
                seen.append(bits(optimizer) in either)
    finally:
        signal.signal(signal.SIGALRM, handler)
        # The first step makes states under torch.no_grad(), which an alarm in its __exit__ leaves on.
        torch.set_grad_enabled(True)
    assert len(seen) > 10
    assert all(seen), f"{seen.count(False)} of {len(seen)} interrupted steps were made in part"


# ---- to another process --------------------------------------------------------------------------


def go_on(optimizer: Optimizer) -> str:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = p.detach().sin()  # a parameter is pickled without its gradient
    return stepped(optimizer)


def test_optimizer_sent_to_another_process() -> None:
    optimizer = build([5, 70_000])
    optimizer.step()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        by_bytes = pool.apply(go_on, [pickle.loads(pickle.dumps(optimizer))])
        through_shared_memory = pool.apply(go_on, [optimizer])
    twin = build([5, 70_000], path="reference")
    twin.step()
    assert by_bytes == through_shared_memory == go_on(twin)
