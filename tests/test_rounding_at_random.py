"""Rounding at random: up or down, each as often as it is near, by words of which none tells another; so that what is
too small for 16 bits is not lost on average.

That the words depend on the seed, and on the parameter's place, is in `test_storage_options.py`; that a resumed run has
the same, in `test_storage_checkpoints.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, threads
from test_formats import CPU, HALVES, float_of, neighbour, sample, value
from torch import Tensor

from adamfused import Adagrad, AdamW, formats, fp32_weights
from adamfused.formats import Random, place_key, put

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


# ---- one number ----------------------------------------------------------------------------------


class Given:
    """Stands for :class:`Random`."""

    def __init__(self, words: Tensor) -> None:
        self.given = words

    def words(self, n: int, device: torch.device) -> Tensor:
        return self.given.expand(n)


def rounded(x: Tensor, dtype: torch.dtype, random: Any) -> Tensor:
    rest = torch.empty(x.shape, dtype=dtype)
    put(x, rest, random=random)
    return rest


def toward_zero(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The last number of 16 bits on the way to ``x``."""
    nearest = x.to(dtype)
    return torch.where(value(nearest).abs() > x.double().abs(), neighbour(nearest, -1), nearest)


@HALVES
@pytest.mark.parametrize("word", [0, 2**32 - 1, None], ids=["least", "largest", "hashed"])
def test_it_goes_to_the_number_below_or_above(dtype, word) -> None:
    """The next to infinity of a half is what would lie there, 65,536."""
    x = sample()
    random = Random(1, 2) if word is None else Given(torch.tensor(word))
    found = rounded(x, dtype, random)
    assert found.isnan().equal(x.isnan())
    x, found = x[x.isfinite()], found[x.isfinite()]
    inside = x.abs() < (2.0**16 if dtype == F16 else 2.0**128)
    assert bool((found[~inside].double() == x[~inside].sign() * torch.inf).all())
    x, found = x[inside], found[inside]
    low = toward_zero(x, dtype)
    ups = found != low
    assert_same_bits(found, torch.where(ups, neighbour(low, 1), low))
    assert not bool((ups & (value(low) == x)).any()), "what 16 bits can tell stays"
    assert (0 < int(ups.sum()) < len(ups)) if word != 0 else not bool(ups.any())


@HALVES
def test_the_chance_to_go_up_is_the_part_that_is_cut_off(dtype) -> None:
    """Exactly: of all that the word's upper bits may be, as many round up."""
    rng = np.random.default_rng(0)
    words = torch.arange(2**16) << 16
    exponents = [127, 254, 1, 0] if dtype == BF16 else [127, 142, 113, 112, 103, 90]
    for exponent, sign in itertools.product(exponents, (0, 1)):
        mantissas = rng.integers(0, 2**23, 4, dtype=np.uint32)
        for x in float_of(np.uint32(sign << 31 | exponent << 23) | mantissas):
            low = toward_zero(x, dtype)
            below, above = float(value(low).abs()), float(value(neighbour(low, 1)).abs())
            chance = (float(x.abs()) - below) / (above - below)
            ups = float((rounded(x.expand(2**16), dtype, Given(words)) != low).double().mean())
            # A half's cut is told to 13 bits: 24 - 11 are cut off a normal number, and more off a small one.
            exact = 2**16 if dtype == BF16 else 2**13
            assert ups == int(chance * exact) / exact


# ---- the words -----------------------------------------------------------------------------------

N = 2**16
KEY = place_key(0, 0)
STEPS = (1, 2, 3, 5, 17, 1000, 2**20)


def words(key: int = KEY, t: int = 1, slot: int = 0, first: int = 0, n: int = N) -> Tensor:
    return Random(key, t, first, slot).words(n, CPU)


def assert_independent(a: Tensor, b: Tensor) -> None:
    """By their upper 16 bits, which round: no correlation, and every pair of 16ths is as frequent.

    Of n independent pairs the correlation has the deviation n^-1/2, and chi-square of 256 cells the mean 255 and the
    deviation (2 * 255)^1/2; here each may be off by six, so that one of 10^8 tests fails by chance.
    """
    a, b = a >> 16, b >> 16
    n = len(a)
    correlation = float(torch.corrcoef(torch.stack([a, b]).double())[0, 1])
    assert abs(correlation) < 6 * n**-0.5
    counts = torch.bincount((a >> 12) * 16 + (b >> 12), minlength=256).double()
    chi_square = float(((counts - n / 256).square() / (n / 256)).sum())
    assert chi_square < 255 + 6 * (2 * 255) ** 0.5


NEIGHBOURS: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "elements": lambda t: (words(t=t), words(t=t, first=1)),
    "elements of a vector apart": lambda t: (words(t=t), words(t=t, first=8)),
    "elements of a row apart": lambda t: (words(t=t), words(t=t, first=4096)),
    "elements of a large row apart": lambda t: (words(t=t), words(t=t, first=28_657)),
    "elements 2^32 - 1 apart": lambda t: (words(t=t), words(t=t, first=2**32 - 1)),
    "the parameter and a state": lambda t: (words(t=t), words(t=t, slot=2)),
    "two states": lambda t: (words(t=t, slot=2), words(t=t, slot=3)),
    "steps": lambda t: (words(t=t), words(t=t + 1)),
    "steps and elements": lambda t: (words(t=t), words(t=t + 1, first=1)),
    "parameters": lambda t: (words(place_key(0, t), 1), words(place_key(0, t + 1), 1)),
    "a parameter and the next step of another": lambda t: (
        words(place_key(0, 0), t + 1),
        words(place_key(0, 1), t),
    ),
    "seeds": lambda t: (words(place_key(t, 0)), words(place_key(t + 1, 0))),
    "upper halves of seeds": lambda t: (words(place_key(t, 0)), words(place_key(t + 2**32, 0))),
}


@pytest.mark.parametrize("pair", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_neighbours_tell_nothing_of_each_other(pair) -> None:
    for t in STEPS:
        assert_independent(*pair(t))


def test_the_same_words_twice_or_a_plain_counter_would_be_noticed() -> None:
    with pytest.raises(AssertionError):
        assert_independent(words(), words())
    counter = torch.arange(N + 1) * 0x9E3779B9 & 0xFFFFFFFF
    with pytest.raises(AssertionError):
        assert_independent(counter[1:], counter[:-1])
    with pytest.raises(AssertionError):
        assert_independent(words(), words() ^ words(t=2) >> 2)


def assert_even(words: Tensor) -> None:
    """(some, others): of any 8 in a row of the first dimension each quarter of the range gets one to four."""
    quarter = words >> 30
    for start in range(len(words) - 7):
        counts = torch.stack([(quarter[start : start + 8] == q).sum(0) for q in range(4)])
        assert int(counts.min()) >= 1 and int(counts.max()) <= 4


def test_dither_is_even_over_the_steps_and_over_the_elements() -> None:
    steps = torch.stack([Random(KEY, t).dither(512, CPU) for t in range(1, 33)])
    assert_even(steps)
    assert_even(steps.t())
    with pytest.raises(AssertionError):  # by chance, some quarter would often get none
        assert_even(torch.stack([Random(KEY, t).words(512, CPU) for t in range(1, 9)]))


def test_dither_is_that_of_the_element_and_of_no_other_parameter() -> None:
    for t in STEPS:
        word = Random(KEY, t, 0, 2).dither(N, CPU)
        assert torch.equal(word, Random(KEY, t, 0, 3).dither(N, CPU))
        assert not bool((word == Random(place_key(0, 1), t, 0, 2).dither(N, CPU)).any())


@pytest.mark.parametrize("first", [1, 127, 4096, 2**31 - 3, 2**32 - 3])
def test_a_shard_has_the_words_that_it_has_in_the_whole(first) -> None:
    for slot in (0, 2, 3):
        whole = Random(KEY, 9, first - 1, slot).words(100, CPU)
        shard = Random(KEY, 9, first, slot).words(99, CPU)
        assert torch.equal(shard, whole[1:])
        assert not torch.equal(shard, whole[:-1])


@pytest.mark.parametrize("first", [128, 4096, 2**31 - 128, 2**32 - 128])
def test_a_shard_of_whole_blocks_is_dithered_as_in_the_whole(first) -> None:
    whole = Random(KEY, 9, first - 128).dither(600, CPU)
    assert torch.equal(Random(KEY, 9, first).dither(472, CPU), whole[128:])
    assert not torch.equal(Random(KEY, 9, first + 1).dither(472, CPU), whole[128:])


def test_step_counts_are_taken_as_whole_numbers() -> None:
    assert Random.at_step(KEY, 3.0) == Random(KEY, 3)
    assert Random.at_step(KEY, 2.0**53 - 1, 5) == Random(KEY, 2**32 - 1, 5)


# ---- training ------------------------------------------------------------------------------------

ULP = 2.0**-7  # of a bfloat16 from 1 to 2


def trained(
    dtype: torch.dtype, grads: list[Tensor], path: str, start: float = 1.5, **options: Any
) -> tuple[torch.nn.Parameter, AdamW]:
    p = torch.nn.Parameter(torch.full(grads[0].shape, start, dtype=dtype))
    p.grad_dtype = grads[0].dtype
    optimizer = AdamW([p], backend=path, **options)
    for g in grads:
        p.grad = g
        optimizer.step()
    return p, optimizer


def assert_no_drift(found: Tensor, right: Tensor, steps: int) -> None:
    """A step is off by 1 - f of an ulp in f of the cases and by f in the others: by 0 on average, with a variance of
    f (1 - f) <= 1/4. So after T steps the deviation is at most T^1/2 / 2 ulps, and that of the mean of N elements is
    N^1/2 times less, of which four are granted. The root of the mean square is that deviation to (2 N)^-1/2 of it, and
    that is far below its bound, which only f = 1/2 in every step would reach."""
    assert bool((right > 1).all()) and bool((right < 2).all()), "where an ulp is 2^-7"
    error = found.double() - right.double()
    n = len(error)
    assert float(error.mean().abs()) <= 4 * (ULP / 2) * (steps / n) ** 0.5
    assert float(error.square().mean().sqrt()) <= (ULP / 2) * steps**0.5


def test_training_does_not_drift(path) -> None:
    """A bfloat16 AdamW run beside one of float32 weights, given the same gradients: of a mean, and noise."""
    steps, n = 100, 2**15
    generator = torch.Generator().manual_seed(0)
    grads = [(0.3 + torch.randn(n, generator=generator)).to(BF16) for _ in range(steps)]
    options = {"lr": 2e-3, "weight_decay": 0.01, "path": path}
    right = trained(F32, grads, **options)[0].detach()
    assert float((right - 1.5).abs().mean()) > 4 * ULP, "else nothing has moved"
    at_random = trained(BF16, grads, **options, stochastic_rounding=True, seed=1)[0].detach()
    assert_no_drift(at_random, right, steps)
    assert len((at_random - right).unique()) > 1000
    nearest = trained(BF16, grads, **options)[0].detach()
    with pytest.raises(AssertionError):  # the check can fail
        assert_no_drift(nearest, right, steps)


def test_a_weight_decay_far_below_an_ulp_acts(path) -> None:
    """lr * weight_decay = 10^-5, and no gradient: with random rounding the mean falls as it should, a split weight does
    exactly what a float32 one does, and to nearest nothing moves."""
    steps, n = 200, 2**14
    grads = [torch.zeros(n)] * steps
    options = {"lr": 1e-3, "weight_decay": 1e-2, "path": path}
    right, _ = trained(F32, grads, **options)
    assert abs(float(right.detach()[0]) - 1.5 * (1 - 1e-5) ** steps) < 1e-5
    at_random, _ = trained(BF16, grads, **options, stochastic_rounding=True)
    assert_no_drift(at_random.detach(), right.detach(), steps)
    assert at_random.double().mean() < 1.5 - 1e-3
    split, optimizer = trained(BF16, grads, **options, master_weights="split16")
    weights = fp32_weights(torch.nn.ParameterDict({"p": split}), optimizer)["p"]
    assert_same_bits(weights, right.detach())
    nearest, _ = trained(BF16, grads, **options)
    assert bool((nearest == 1.5).all())
    with pytest.raises(AssertionError):
        assert_no_drift(nearest.detach(), right.detach(), steps)


@pytest.mark.native
def test_the_bits_do_not_depend_on_threads() -> None:
    """Nor on where a thread begins: the tensor is long enough for each to have its part."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(200_003, generator=generator).to(BF16) for _ in range(2)]
    options: dict[str, Any] = {"path": "native", "state_dtype": BF16, "stochastic_rounding": True}
    ends = []
    for n in (1, 2):
        with threads(n):
            p, optimizer = trained(BF16, grads, **options)
        ends.append([p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]])
    other, _ = trained(BF16, grads, **options, seed=1)
    for a, b in zip(*ends, strict=True):
        assert_same_bits(a, b)
    with pytest.raises(AssertionError):
        assert_same_bits(ends[0][0], other.detach())


@pytest.mark.parametrize(
    ("options", "grows"),
    [
        ({"state_dtype": torch.bfloat16}, False),
        ({"state_dtype": torch.bfloat16, "stochastic_rounding": True}, True),
        ({"state_dtype": "int8"}, True),
    ],
    ids=["to nearest", "at random", "int8"],
)
def test_a_sum_of_ones_in_few_bits(options, grows) -> None:
    """Rounded to nearest it stands still at 2^8. At random it is 1,000 on average: 4,096 sums spread by up to 70, so
    that their mean is within 6 standard deviations of it at 6.6."""
    p = torch.nn.Parameter(torch.zeros(4096))
    p.grad = torch.ones_like(p)
    optimizer = Adagrad([p], **options)
    for _ in range(1000):
        optimizer.step()
    state = optimizer.state[p]
    sums = formats.get(state["sum"], torch.float32, state.get("sum_scale"))
    if not grows:
        assert (sums == 256).all()
        return
    assert sums.std() < 70
    assert abs(float(sums.mean()) - 1000) < 6 * 70 / 64
