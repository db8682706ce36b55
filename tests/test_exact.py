"""The native kernels and the pure-Python reference give the same bits.

Compared as integers, so that a last bit or the sign of a zero counts; a NaN must stand in the same
places, whatever its payload. Run again under each ``ADAMFUSED_ISA``, this covers every instruction
set of the machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    COMPLEX_DTYPES,
    REAL_DTYPES,
    assert_same_bits,
    assert_same_result,
    differing,
    digest,
    give_gradient,
    tensors_of,
    wild,
    wild_run,
)

import adamfused
from adamfused import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    Lion,
    NAdam,
    RAdam,
    RMSprop,
    backend,
    rules,
)

pytestmark = [pytest.mark.native, pytest.mark.isa]

# Each row is an optimizer with its settings; every test below that takes `case` runs all of them.
CASES = {
    "sgd": (SGD, {}),
    "sgd-l2": (SGD, {"weight_decay": 0.1, "maximize": True}),
    "sgd-momentum": (SGD, {"momentum": 0.9}),
    "sgd-all": (SGD, {"momentum": 0.7, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    "sgd-nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "sgd-low-momentum": (SGD, {"momentum": 0.3, "nesterov": True}),
    "adagrad": (Adagrad, {}),
    "adagrad-all": (
        Adagrad,
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1, "maximize": True},
    ),
    "adadelta": (Adadelta, {}),
    "adadelta-all": (Adadelta, {"rho": 0.3, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    "adadelta-still": (Adadelta, {"rho": 1.0}),
    "lion": (Lion, {}),
    "lion-all": (Lion, {"betas": (0.3, 0.4), "weight_decay": 0.1, "maximize": True}),
    "nadam": (NAdam, {}),
    "nadam-l2": (NAdam, {"weight_decay": 0.1, "momentum_decay": 0.1, "maximize": True}),
    "nadam-decoupled": (
        NAdam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.3, 0.95)},
    ),
    "radam": (RAdam, {}),
    "radam-l2": (RAdam, {"weight_decay": 0.1, "betas": (0.9, 0.99), "maximize": True}),
    "radam-decoupled": (RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam-never-rectified": (RAdam, {"betas": (0.5, 0.3)}),
    "adam": (Adam, {}),
    "adam-l2": (Adam, {"weight_decay": 0.1}),
    "adam-decoupled": (Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adam-maximize-l2": (Adam, {"maximize": True, "weight_decay": 0.1}),
    "adam-uncorrected": (Adam, {"bias_correction": False}),
    "adam-low-beta1": (Adam, {"betas": (0.3, 0.95)}),
    "adam-no-memory": (Adam, {"betas": (0.0, 0.0)}),
    "adam-no-eps": (Adam, {"eps": 0.0}),
    "adamw": (AdamW, {"weight_decay": 0.1}),
    "adamw-amsgrad": (AdamW, {"amsgrad": True}),
    "adam-amsgrad-l2": (Adam, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    "rmsprop": (RMSprop, {}),
    "rmsprop-momentum": (RMSprop, {"momentum": 0.9}),
    "rmsprop-centered": (RMSprop, {"centered": True}),
    "rmsprop-centered-momentum": (RMSprop, {"centered": True, "momentum": 0.9}),
    "rmsprop-l2": (RMSprop, {"weight_decay": 0.1, "alpha": 0.3, "momentum": 0.2}),
    "rmsprop-all": (
        RMSprop,
        {"weight_decay": 0.1, "maximize": True, "centered": True, "momentum": 0.9},
    ),
}
TILE = 1024
SIZES = [0, 1, 5, TILE - 1, TILE, TILE + 1, 2 * TILE - 1, 2 * TILE, 2 * TILE + 1]


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


# ---- the comparison itself -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", REAL_DTYPES + COMPLEX_DTYPES, ids=str)
def test_one_flipped_bit_is_noticed(dtype):
    a = wild(np.random.default_rng(0), 9, dtype)
    b = a.clone()
    last = torch.view_as_real(b)[-1, -1:] if dtype.is_complex else b[-1:]
    last.view(torch.uint8)[0] ^= 1
    with pytest.raises(AssertionError, match="1 of"):
        assert_same_bits(a, b)


@pytest.mark.parametrize(
    "a, b, count",
    [(0.0, -0.0, 1), (np.nan, 1.0, 1), (np.inf, np.nan, 1), (np.nan, -np.nan, 0), (1e-45, 0.0, 1)],
)
def test_zeros_have_signs_and_a_nan_is_a_nan(a, b, count):
    assert differing(torch.tensor([a]), torch.tensor([b])) == count


def textbook_average(a, b, w):
    """beta * a + (1 - beta) * b: the same in exact arithmetic, other bits when rounded."""
    beta = float(np.float32(-w.c if w.far else 1.0 - w.c))
    return beta * a + (1.0 - beta) * b


def next_weight(beta, r):
    """1 - beta in float32, but one unit in the last place too large."""
    return rules.Weight(float(np.nextafter(np.float32(1 - beta), np.float32(1))), False)


@pytest.mark.parametrize(
    "name, replacement",
    [
        ("average", textbook_average),
        ("root", torch.sqrt),  # wrong in the last bit of 6 roots in 1,000
        ("weight", next_weight),
    ],
)
def test_a_rule_with_another_rounding_is_noticed(monkeypatch, name, replacement):
    monkeypatch.setattr(rules, name, replacement)
    native, reference = wild_run(AdamW, {}, [torch.float32], [100_003], steps=3, specials=0)
    with pytest.raises(AssertionError, match="differ in bits"):
        assert_same_result(native, reference)


def test_most_results_are_numbers(case):
    """Else the tests below would compare NaN with NaN."""
    make, kwargs = case
    native, _ = wild_run(make, kwargs, [torch.float32], SIZES)
    everything = torch.cat([t.detach().reshape(-1) for _, t in tensors_of(native)])
    assert everything.isfinite().float().mean() > 0.9
    assert not everything.isfinite().all()


# ---- native against reference --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", REAL_DTYPES + COMPLEX_DTYPES, ids=str)
def test_every_rule_and_dtype(case, dtype):
    make, kwargs = case
    assert_same_result(*wild_run(make, kwargs, [dtype], SIZES))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_large_and_small_tensors_of_several_dtypes_in_one_group(case, n_threads):
    make, kwargs = case
    dtypes = [torch.float32, torch.bfloat16, torch.complex128]
    both = wild_run(make, kwargs, dtypes, [100_003, 0, 3], steps=2, n_threads=n_threads)
    assert_same_result(*both)


def test_every_size_up_to_257(case):
    make, kwargs = case
    assert_same_result(*wild_run(make, kwargs, [torch.float32], range(1, 258), steps=3))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("state_dtype", [None, "param", *REAL_DTYPES], ids=str)
@pytest.mark.parametrize("dtype", REAL_DTYPES + COMPLEX_DTYPES, ids=str)
def test_gradients_and_states_of_other_dtypes(dtype, state_dtype):
    kwargs = {"state_dtype": state_dtype}
    for grad_dtype in COMPLEX_DTYPES if dtype.is_complex else REAL_DTYPES:
        for make in (AdamW, RMSprop):
            native, reference = wild_run(make, kwargs, [dtype], [7, TILE + 1], 6, grad_dtype)
            assert_same_result(native, reference)
            first = native.param_groups[0]["params"][1]
            assert first.grad.dtype == grad_dtype


def test_every_parameter_has_its_own_age():
    native, reference = wild_run(AdamW, {}, [torch.float32], [1, 2, 3, 4])
    ages = [int(native.state[p]["step"]) for p in native.param_groups[0]["params"]]
    assert ages == [13, 20, 20, 13]
    assert_same_result(native, reference)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_one_tensor_or_many_pieces_of_it(case, dtype):
    """Sharding: the pieces begin at odd places, so that no alignment is kept either."""
    make, kwargs = case
    cuts = [0, 1, 4, 1000, 1029, 4100, 4101, 40_000, 70_001]
    rng = np.random.default_rng(0)
    whole = wild(rng, cuts[-1], dtype)
    pieces = whole.clone()
    views = [torch.nn.Parameter(pieces[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    p = torch.nn.Parameter(whole)
    of_whole, of_pieces = make([p], **kwargs), make(views, **kwargs)
    for _ in range(4):
        g = wild(rng, cuts[-1], dtype, 0.02)
        give_gradient(p, g)
        for view, a, b in zip(views, cuts, cuts[1:], strict=False):
            give_gradient(view, g[a:b])
        of_whole.step()
        of_pieces.step()
    assert views[1].data_ptr() % 16 != 0
    assert_same_bits(whole, pieces)


# ---- numbers at rest -----------------------------------------------------------------------------


def stored(g, dtype, lr=1.0):
    """What the kernel leaves in a parameter of ``dtype`` when the float32 result of a step is lr * g.

    RMSprop with alpha = 1 keeps its average 0; with eps = 1 it moves by lr * g, here upwards from
    -0, which leaves the sign of a zero alone. An ``lr`` other than 1 keeps the square of g in range.
    """
    p = torch.nn.Parameter(torch.full(g.shape, -0.0, dtype=dtype))
    give_gradient(p, g)
    RMSprop([p], lr=lr, alpha=1.0, eps=1.0, maximize=True, backend="native").step()
    return p.detach()


def boundaries(dtype):
    """Every number of a 16-bit ``dtype`` and every midpoint of two, and their neighbours, as float32."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    numbers = every[every.isfinite()].double().unique()
    past = 2 * numbers[-1] - numbers[-2]  # where the next would be; half way there infinity begins
    numbers = torch.cat([-past[None], numbers, past[None]])
    at = torch.cat([numbers[1:-1], (numbers[:-1] + numbers[1:]) / 2]).float()
    infinity = torch.tensor(torch.inf)
    special = torch.tensor([torch.nan, -0.0, 0.0])
    return torch.cat([at, at.nextafter(infinity), at.nextafter(-infinity), special])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_and_written_unchanged(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    p = torch.nn.Parameter(every.clone())
    give_gradient(p, torch.zeros(2**16, dtype=dtype))
    AdamW([p], lr=0.0, backend="native").step()
    assert_same_bits(p, every)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_gradient_is_read_as_it_is(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    squarable = every[every.isnan() | (every.float().abs() < 2.0**60)]
    assert len(squarable) > 45_000
    assert_same_bits(stored(squarable, torch.float32), squarable.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits_is_that_of_torch(dtype):
    x = boundaries(dtype)
    small, large = x[~(x.abs() > 1)], x[(x.abs() > 1) & x.isfinite()]
    assert len(small) + len(large) > 190_000
    assert_same_bits(stored(small, dtype), small.to(dtype))
    assert_same_bits(stored(large * 2.0**-64, dtype, lr=2.0**64), large.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_infinity_is_written_as_infinity(dtype):
    g = torch.tensor([2.0**40, -(2.0**40)])
    infinities = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    assert_same_bits(stored(g, dtype, lr=2.0**100), infinities)


def test_the_rounding_test_notices_truncation():
    x = boundaries(torch.bfloat16)
    x = x[x.abs() <= 1]
    truncated = (x.view(torch.int32) >> 16 << 16).view(torch.float32).to(torch.bfloat16)
    with pytest.raises(AssertionError, match="differ in bits"):
        assert_same_bits(stored(x, torch.bfloat16), truncated)


# ---- instruction sets ----------------------------------------------------------------------------

HASH_OF_ALL_CASES = """
import torch, test_exact, helpers
from adamfused import backend
runs = [
    test_exact.wild_run(make, kwargs, helpers.REAL_DTYPES + helpers.COMPLEX_DTYPES, [1025, 37], 5)
    for make, kwargs in test_exact.CASES.values()
]
tensors = [t for native, _ in runs for _, t in helpers.tensors_of(native)]
print(backend.native().isa(), helpers.digest(tensors))
"""


def python_with_isa(isa, code):
    root = Path(adamfused.__file__).parent.parent
    path = os.pathsep.join([str(root), str(Path(__file__).parent)])
    env = os.environ | {"ADAMFUSED_ISA": isa, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)


def test_every_instruction_set_runs_when_forced_and_gives_the_same_bits():
    names = [name for name, runs_here in backend.native().isas() if runs_here]
    hashes = []
    for name in names:
        done = python_with_isa(name, HASH_OF_ALL_CASES)
        assert done.returncode == 0, done.stderr
        ran, hashed = done.stdout.split()
        assert ran == name
        hashes.append(hashed)
    assert names[0] == "scalar" and len(set(hashes)) == 1, dict(zip(names, hashes, strict=True))


def test_the_hash_notices_one_bit():
    a = torch.zeros(3)
    b = torch.tensor([0.0, 1e-45, 0.0])
    assert digest([a]) != digest([b]) and digest([a]) == digest([a.clone()])


@pytest.mark.parametrize("name", ["missing", "sse9"])
def test_an_instruction_set_that_cannot_be_had_is_an_error(name):
    if name == "missing":
        missing = [isa for isa, runs_here in backend.native().isas() if not runs_here]
        if not missing:
            pytest.skip("this processor has every instruction set that there are kernels for")
        name = missing[0]
    code = "import torch, adamfused; adamfused.AdamW([torch.nn.Parameter(torch.ones(1))])"
    done = python_with_isa(name, code)
    assert done.returncode != 0
    assert f"ValueError: ADAMFUSED_ISA={name}: " in done.stderr


@pytest.mark.skipif(not os.environ.get("ADAMFUSED_ISA"), reason="ADAMFUSED_ISA is not set")
def test_the_forced_instruction_set_is_the_one_in_this_process():
    assert backend.native().isa() == os.environ["ADAMFUSED_ISA"]
