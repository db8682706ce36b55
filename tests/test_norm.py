"""The norm of the gradients: the same bits wherever and however it is computed, right to half a unit in the last place
of float32, and with infinities, NaN, groups and several optimizers as in ``torch.nn.utils.clip_grad_norm_``."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers import COMPLEX_DTYPES, REAL_DTYPES, assert_same_bits, give_gradient, threads, wild
from test_layout import GRADIENT_LAYOUTS, LAYOUTS, SHAPE, WAITING, plain
from test_refusals import TENSORS, build, everything
from torch import Tensor

from adamfused import AdamW, RMSprop, backend, norm

INF, NAN = float("inf"), float("nan")
DTYPES = (*REAL_DTYPES, *COMPLEX_DTYPES)
# Around a lane's row (32), a chunk (4,096), and enough for two threads.
SIZES = [0, 1, 2, 31, 32, 33, 63, 4095, 4096, 4097, 4096 + 33, 2 * 4096, 100_003]
KERNELS = [
    (isa, n) for isa, here in (backend._C.isas() if backend._C else []) if here for n in (1, 2)
]
either_norm = pytest.mark.parametrize("largest", [False, True], ids=["2", "inf"])


@contextmanager
def kernel(isa: str, n_threads: int) -> Iterator[None]:
    """Runs its body with an instruction set and as many threads."""
    native = backend.native()
    assert native is not None
    before = native.isa()
    native.set_isa(isa)
    try:
        with threads(n_threads):
            yield
    finally:
        native.set_isa(before)


def parameter(grad: Tensor | None, like: Tensor | None = None) -> torch.nn.Parameter:
    """A parameter of the gradient's form, or of another's, with that gradient."""
    form = grad if like is None else like
    assert form is not None
    p = torch.nn.Parameter(torch.zeros_like(form) if like is None else like)
    give_gradient(p, grad)
    return p


def norm_of(params: list[torch.nn.Parameter], largest: bool, path: str = "reference") -> Tensor:
    """In float64, before it is rounded for the user."""
    native = backend.native() if path == "native" else None
    return norm.total_norm(params, INF if largest else 2.0, native, lambda p: "a parameter")


def assert_same_norm_everywhere(params: list[torch.nn.Parameter], largest: bool = False) -> Tensor:
    expected = norm_of(params, largest)
    assert expected.dtype == torch.float64 and expected.shape == ()
    for isa, n_threads in KERNELS:
        with kernel(isa, n_threads):
            assert_same_bits(norm_of(params, largest, "native"), expected, f"{isa}, {n_threads}")
    return expected


def gradients(sizes: list[int], dtype: torch.dtype, specials: float = 0.0) -> list[Tensor]:
    rng = np.random.default_rng(0)
    return [wild(rng, n, dtype, specials) for n in sizes]


# ---- the same bits -------------------------------------------------------------------------------


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.native
@pytest.mark.parametrize(("chunk", "lanes"), [(2048, 32), (8192, 32), (4096, 16), (4096, 64)])
def test_control_another_order_of_the_sum_has_other_bits(monkeypatch, chunk, lanes) -> None:
    p = parameter(normal(100_003, seed=2))
    assert_same_norm_everywhere([p])
    monkeypatch.setattr(norm, "CHUNK", chunk)
    monkeypatch.setattr(norm, "LANES", lanes)
    with pytest.raises(AssertionError, match="1 of 1 differ in bits"):
        assert_same_norm_everywhere([p])


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_size_of_any_dtype(dtype) -> None:
    params = [parameter(g) for g in gradients(SIZES, dtype)]
    for largest in [False] if dtype.is_complex else [False, True]:
        for p in params:
            assert_same_norm_everywhere([p], largest)
        assert 0 < assert_same_norm_everywhere(params, largest) < INF


@pytest.mark.native
@either_norm
@pytest.mark.parametrize("n", [31, 33, 129])
def test_any_number_of_tensors(n, largest) -> None:
    """Each has chunks of its own."""
    grads = gradients([i * 61 % 257 for i in range(n)], torch.float32)
    assert 0 < assert_same_norm_everywhere([parameter(g) for g in grads], largest)


@pytest.mark.native
def test_more_chunks_than_fit_in_one() -> None:
    """Then the sums of the sums of chunks are summed once more."""
    p = parameter(normal(4097 * 4096 - 5).bfloat16())
    assert 4000 < assert_same_norm_everywhere([p]) < 4200


LARGE = {
    # Of 269 chunks each, the last of which is not full: by one thread all four are read together, by two they are not.
    "alike": [(1_100_001, torch.float32)] * 4,
    "of several dtypes": [
        (1_700_001, torch.float32), (1_400_003, torch.bfloat16), (5, torch.float32), (0, torch.float32),
        (4097, torch.float32), (1_000_000, torch.float64), (900_007, torch.float16),
    ],
}  # fmt: skip


@pytest.mark.native
@either_norm
@pytest.mark.parametrize("sizes", LARGE.values(), ids=LARGE.keys())
def test_large_gradients(sizes, largest) -> None:
    """From 1,024 chunks on, four are read side by side where they are alike."""
    params = [parameter(normal(n, seed=i).to(dtype)) for i, (n, dtype) in enumerate(sizes)]
    assert sum(p.numel() for p in params) > 1024 * 4096
    assert 0 < assert_same_norm_everywhere(params, largest) < INF


@pytest.mark.native
@either_norm
def test_all_dtypes_in_one_sum(largest) -> None:
    every = [gradients([33, 4097], dtype) for dtype in (REAL_DTYPES if largest else DTYPES)]
    assert_same_norm_everywhere([parameter(g) for pair in every for g in pair], largest)


@pytest.mark.native
@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_another_dtype(dtype) -> None:
    """Counted as they are: not rounded to the parameter's dtype first."""
    for grad_dtype in COMPLEX_DTYPES if dtype.is_complex else REAL_DTYPES:
        (g,) = gradients([4097], grad_dtype)
        p = parameter(g, like=torch.zeros(4097, dtype=dtype))
        assert p.grad.dtype == grad_dtype
        assert_same_bits(assert_same_norm_everywhere([p]), norm_of([parameter(g)], False))


@pytest.mark.native
@pytest.mark.parametrize("p", LAYOUTS)
def test_any_layout(p) -> None:
    """In the order in which the parameter lies in memory, whatever the gradient's."""
    for g in GRADIENT_LAYOUTS:
        like = LAYOUTS[p](torch.zeros(SHAPE))
        grad = GRADIENT_LAYOUTS[g](
            wild(np.random.default_rng(1), 144, torch.float32).reshape(SHAPE)
        )
        found = assert_same_norm_everywhere([parameter(grad, like)])
        torch.testing.assert_close(found, plain(grad).double().norm(), rtol=1e-14, atol=0)
        assert_same_norm_everywhere([parameter(grad, like)], largest=True)


@pytest.mark.native
@pytest.mark.parametrize("shape", [(1,), (), (5, 7), (100, 99)], ids=str)
@pytest.mark.parametrize(("dtype", "wait"), WAITING.values(), ids=WAITING.keys())
def test_numbers_that_wait_for_their_sign(dtype, wait, shape) -> None:
    x = wild(np.random.default_rng(1), math.prod(shape), dtype).reshape(shape)
    assert_same_norm_everywhere([parameter(wait(x), like=torch.zeros_like(x))])


@pytest.mark.native
@either_norm
@pytest.mark.parametrize("special", [INF, -INF, NAN, 3.4e38, 1e-45, -0.0])
def test_special_numbers_anywhere(special, largest) -> None:
    for place in (0, 31, 32, 4095, 4096, 5000, 5032):
        (g,) = gradients([5033], torch.float32)
        g[place] = special
        g[(place + 700) % 5033] = INF  # a NaN must not be lost in it
        found = assert_same_norm_everywhere([parameter(g)], largest)
        assert found.isnan() if math.isnan(special) else found.isinf()


@pytest.mark.native
def test_flushing_subnormals_changes_no_bit() -> None:
    p = parameter(torch.full((100_003,), 1e-41))
    expected = norm_of([p], False)
    assert 1e-39 < expected < 1e-38
    for isa, n_threads in KERNELS:
        with kernel(isa, n_threads):
            try:
                torch.set_flush_denormal(True)
                found = norm_of([p], False, "native")
            finally:
                torch.set_flush_denormal(False)
            assert_same_bits(found, expected)


@pytest.mark.native
def test_norm_in_a_forked_child() -> None:
    """Torch's threads do not survive a fork; waiting for them would never end."""
    with threads(2):
        p = parameter(gradients([1 << 20], torch.float32)[0])
        optimizer = AdamW([p], backend="native")
        expected = float(optimizer.compute_grad_norm())
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if float(optimizer.compute_grad_norm()) == expected else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- how right it is -----------------------------------------------------------------------------


def truth(g: Tensor) -> float:
    """The square of a float32 is exact in float64, and `math.fsum` rounds once: right to 2^-53 of itself."""
    return math.sqrt(math.fsum((g.double() ** 2).tolist()))


def units_off(found: Tensor, g: Tensor) -> float:
    """How many units in the last place of float32."""
    assert found.dtype == torch.float32
    return abs(float(found) - truth(g)) / float(np.spacing(np.float32(truth(g))))


KINDS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: normal(300_003),
    "of any magnitude": lambda: wild(np.random.default_rng(0), 300_003, torch.float32),
    "all the same": lambda: torch.full((300_003,), 1.1),
    "squares overflow in float32": lambda: torch.full((1003,), 1e25),
    "squares vanish in float32": lambda: torch.full((1003,), 1e-25),
    "short": lambda: wild(np.random.default_rng(0), 5, torch.float32),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_right_to_half_a_unit_in_the_last_place(path, make) -> None:
    """The sum in float64 is right to 128 + 5 roundings a level, 2^-44 of itself; then there is one rounding to float32.
    So it is off by half a unit and 2^-20 of one."""
    g = make()
    assert units_off(AdamW([parameter(g)], backend=path).compute_grad_norm(), g) <= 0.5 + 2**-20


@pytest.mark.reference
def test_control_torchs_own_norm_is_further_off() -> None:
    """It sums in float32. Here by 250 units of normal numbers, and it overflows where the norm itself does not."""
    off = {
        kind: units_off(torch.nn.utils.get_total_norm([make()]), make())
        for kind, make in KINDS.items()
    }
    assert off["normal"] > 10 and off["all the same"] > 10
    assert off["squares overflow in float32"] == INF and off["squares vanish in float32"] > 1e6
    assert off["short"] <= 2


def test_float64_norm_of_float64_gradients(path) -> None:
    """Where the first parameter is float64, so is the norm: off by 2^-44 of itself at most, see above."""
    (g,) = gradients([50_001], torch.float64)
    found = AdamW([parameter(g)], backend=path).compute_grad_norm()
    assert found.dtype == torch.float64
    assert abs(float(found) - truth(g)) <= 2**-44 * truth(g)
    assert float(found.float()) != float(found)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_the_largest_magnitude_is_exact_and_torchs(path, dtype) -> None:
    grads = gradients([5, 1, 40_000], dtype)
    optimizer = AdamW([parameter(g) for g in grads], norm_type=INF, backend=path)
    found = optimizer.compute_grad_norm()
    assert float(found) == max(float(g.abs().max()) for g in grads)
    assert float(found) == float(torch.nn.utils.get_total_norm(grads, INF))
    assert float(found) != float(AdamW(optimizer.param_groups[0]["params"]).compute_grad_norm())


@pytest.mark.parametrize("dtype", COMPLEX_DTYPES, ids=str)
def test_complex_gradients_count_with_both_parts(path, dtype) -> None:
    (z,) = gradients([999], dtype)
    found = AdamW([parameter(z)], backend=path).compute_grad_norm()
    assert_same_bits(
        found, AdamW([parameter(torch.view_as_real(z))], backend=path).compute_grad_norm()
    )
    torch.testing.assert_close(found, torch.linalg.vector_norm(z), rtol=1e-5, atol=0)


def test_the_magnitude_of_a_complex_number_is_refused_as_a_norm(path) -> None:
    optimizer = AdamW(
        [parameter(torch.ones(2, dtype=torch.complex64))], norm_type=INF, backend=path
    )
    with pytest.raises(RuntimeError) as refusal:
        optimizer.compute_grad_norm()
    assert str(refusal.value) == (
        "AdamW: parameter 0 of group 0: its gradient is torch.complex64; expected a real one for norm_type=inf; use "
        "norm_type=2.0"
    )


# ---- what is counted -----------------------------------------------------------------------------


def test_nothing_to_count(path) -> None:
    for params in ([parameter(None, like=torch.ones(3))], [parameter(torch.zeros(0))]):
        optimizer = AdamW(params, max_grad_norm=1.0, backend=path)
        assert_same_bits(optimizer.compute_grad_norm(), torch.zeros(()))
        optimizer.step()
        assert_same_bits(optimizer.grad_norm, torch.zeros(()))


def test_all_groups_count_and_parameters_without_gradient_do_not(path) -> None:
    grads = [torch.tensor([3.0]), None, torch.tensor([4.0]), torch.tensor([12.0])]
    a, b, c, d = (parameter(g, like=torch.ones(1)) for g in grads)
    groups: Any = [{"params": [a, b]}, {"params": [c], "lr": 0.5}, {"params": []}, {"params": [d]}]
    assert float(RMSprop(groups, backend=path).compute_grad_norm()) == 13.0


def test_to_compute_it_changes_nothing(path) -> None:
    optimizer = build(path, 2, max_grad_norm=1.0)
    before, last = everything(optimizer), optimizer.grad_norm
    optimizer.compute_grad_norm()
    assert everything(optimizer) == before and optimizer.grad_norm is last
    assert build(path, 2).grad_norm is None, "nothing is computed that is not used"
    assert AdamW([parameter(torch.ones(3))], max_grad_norm=1.0).grad_norm is None


def test_grad_norm_is_that_before_clipping(path) -> None:
    optimizer = AdamW([parameter(torch.tensor([3.0, 4.0]))], max_grad_norm=0.1, backend=path)
    for times in (1.0, 2.0):
        optimizer.param_groups[0]["params"][0].grad.mul_(times)
        optimizer.step()
        assert_same_bits(optimizer.grad_norm, torch.tensor(5.0 * times))


ROW_NAMES = [name for name in TENSORS if "parameter" not in name and "shape" not in name]


@pytest.mark.parametrize("name", ROW_NAMES)
def test_gradient_that_cannot_be_read_is_refused_in_the_steps_words(path, name) -> None:
    provoke, message = TENSORS[name]
    optimizer = build(path, 1)
    mend = provoke(optimizer)
    before = everything(optimizer)
    with pytest.raises(RuntimeError) as refusal:
        optimizer.compute_grad_norm()
    assert str(refusal.value) == "AdamW: parameter 1 of group 1: " + message
    assert everything(optimizer) == before
    mend()
    assert optimizer.compute_grad_norm().isfinite()
