"""How numbers rest in memory: every 16-bit pattern, split weights, whole masters and codes of 8 bits, against exact
arithmetic in float64.

Of the oracle, :mod:`adamfused.formats`; `test_storage_exact.py` compares the kernels with it, bit for bit.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from adamfused.formats import BLOCK, CODES, Random, are_scales, get, put, scales_shape

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CPU = torch.device("cpu")
HALVES = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
BOTH_CODES = pytest.mark.parametrize("dtype", CODES, ids=str)


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def float_of(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


@cache
def sample() -> Tensor:
    """Floats of every sign and exponent: 256 random mantissas, the lower halves at which rounding turns, and all 2^16
    lower halves of zero, of the largest and smallest numbers, and of infinity."""
    rng = np.random.default_rng(0)
    upper = np.arange(2**9, dtype=np.uint32) << 23
    turns = [
        h << 16 | lower
        for h in (0, 1, 126, 127)
        for lower in (0, 1, 0x1000, 0x3000, 0x7F80, 0x7FFF, 0x8000)
    ]
    turns += [0x80, 0x180, 0x7FFF80, 0x7FFFFF, 0x8001, 0x18000, 0x17FFF]
    mantissas = np.concatenate([rng.integers(0, 2**23, 256), turns])
    whole = [np.uint32(u) << 16 | np.arange(2**16, dtype=np.uint32)
             for u in (0x0000, 0x0080, 0xBFFF, 0xFF7F, 0x7F80)]  # fmt: skip
    return float_of(
        np.concatenate([(upper[:, None] | mantissas).ravel().astype(np.uint32), *whole])
    )


def value(x: Tensor) -> Tensor:
    """In float64; an infinity is what rounds to it, the next power of two."""
    inf = 2.0**16 if x.dtype == F16 else 2.0**128
    x = x.double()
    return torch.where(x.isinf(), x.sign() * inf, x)


def neighbour(x: Tensor, away: int) -> Tensor:
    """The next number of 16 bits away from zero or (``away`` = -1) towards it; of zero the smallest."""
    magnitude = (x.view(torch.int16).to(torch.int32) & 0x7FFF) + away
    return magnitude.clamp(min=0).to(torch.int16).view(x.dtype).copysign(x)


def assert_nearest(rounded: Tensor, x: Tensor, ties: str) -> None:
    """No 16-bit number is nearer; where two are as near, the even one, or the one away from zero, is taken."""
    exact, found = x.double(), value(rounded)
    distance = (found - exact).abs()
    wide, narrow = (value(neighbour(rounded, away)) for away in (1, -1))
    # Nothing lies beyond infinity, and nothing below zero.
    wide = torch.where(rounded.isinf(), torch.inf, wide)
    narrow = torch.where(rounded == 0, torch.inf, narrow)
    others = torch.stack([(wide - exact).abs(), (narrow - exact).abs()])
    assert bool((distance <= others.amin(0)).all())
    tied = distance == others.amin(0)
    assert int(tied.sum()) > 100, "else ties are not looked at"
    if ties == "even":
        assert not bool((rounded.view(torch.int16)[tied] & 1).any())
    else:
        assert bool((found.abs() > exact.abs())[tied].all())


# ---- numbers by themselves -----------------------------------------------------------------------


@HALVES
def test_every_half_is_read_as_numpy_reads_it_and_written_unchanged(dtype) -> None:
    every = every_half(dtype)
    read = get(every, F32)
    patterns = every.view(torch.int16).numpy().view(np.uint16)
    expected = patterns.astype(np.uint32) << 16 if dtype == BF16 else None
    by_numpy = patterns.view(np.float16).astype(np.float32) if expected is None else None
    assert_same_bits(read, float_of(expected) if by_numpy is None else torch.from_numpy(by_numpy))
    for random in (None, Random(1, 2), Random(3, 4, 5, 6)):
        written = torch.empty_like(every)
        put(read, written, random=random)
        assert_same_bits(written, every)
        put(get(every, F64), written, random=random)
        assert_same_bits(written, every)


@HALVES
def test_rounding_is_to_nearest_even(dtype) -> None:
    x = sample()
    x = x[x.isfinite()]
    if dtype == F16:
        x = x[x.abs() < 2.0**17]  # what lies further off is not next to the infinity of a half
    rounded = torch.empty(x.shape, dtype=dtype)
    put(x, rounded)
    assert_nearest(rounded, x, "even")
    with pytest.raises(AssertionError):  # the check can fail
        assert_nearest(neighbour(rounded, -1), x, "even")
    with pytest.raises(AssertionError):
        assert_nearest(rounded, x, "away")


@HALVES
def test_a_double_goes_to_16_bits_by_way_of_float32(dtype) -> None:
    """Just above half way between two: float32 rounds it to half way, and that goes to the even one."""
    spacing = float(torch.finfo(dtype).eps)
    x = torch.tensor([1 + spacing / 2 + 2.0**-40, 1 + spacing * 0.75], dtype=F64)
    rounded = torch.empty(2, dtype=dtype)
    put(x, rounded)
    assert rounded.tolist() == [1.0, 1 + spacing]


def test_complex_numbers_are_pairs_and_waiting_signs_are_resolved() -> None:
    z = torch.tensor([1 + 2j, -3 - 0j]).conj()
    assert get(z, F32).tolist() == [[1, -2], [-3, 0]]
    assert get(z, F64).dtype == F64
    rest = torch.zeros(2, dtype=torch.complex64)
    put(get(z, F32), rest)
    assert rest.tolist() == z.tolist()
    assert get(torch._neg_view(torch.ones(3)), F32).tolist() == [-1] * 3


# ---- split weights -------------------------------------------------------------------------------

SPLIT = {"split16": torch.int16, "split8": torch.int8, "fp32": F32}


def parted(x: Tensor, kind: str, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    rest, beside = torch.zeros(x.shape, dtype=dtype), torch.zeros(x.shape, dtype=SPLIT[kind])
    put(x, rest, beside)
    return rest, beside


def test_split16_keeps_every_bit_and_shows_the_nearest() -> None:
    x = sample()
    assert len(x) > 450_000 and len((x.view(torch.int32) >> 23).unique()) == 512
    rest, low = parted(x, "split16")
    assert_same_bits(get(rest, F32, low), x)
    assert int(x.isnan().sum()) > 60_000  # of many payloads
    finite = x.isfinite()
    assert_nearest(rest[finite], x[finite], "away")
    assert (rest.float()[x.isinf()] == x[x.isinf()]).all()
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_same_bits(get(rest, F32, low + (low == 5).to(torch.int16)), x)


def test_split16_joins_every_pair_of_halves_to_another_number() -> None:
    """Of a visible weight, all 2^16 lower halves: each leads to its own float, and from there back."""
    low = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for visible in (1.0, -1.5, 2.0**-126, -3e38):
        rest = torch.full(low.shape, visible, dtype=BF16)
        x = get(rest, F32, low)
        assert len(x.unique()) == 2**16
        again = parted(x, "split16")
        assert_same_bits(again[0], rest)
        assert_same_bits(again[1], low)


def test_split8_is_the_nearest_of_24_bits_and_shows_the_nearest_of_16() -> None:
    x = sample()
    rest, low = parted(x, "split8")
    joined = get(rest, F32, low)
    assert joined.isnan().equal(x.isnan())
    rest, joined, x = rest[x.isfinite()], joined[x.isfinite()], x[x.isfinite()]
    assert not bool((joined.view(torch.int32) & 0xFF).any())
    half_way = (x.view(torch.int32) & 0xFF) == 0x80
    assert int(half_way.sum()) > 100
    assert not bool((joined.view(torch.int32)[half_way] & 0x100).any()), "ties go to even"
    error = (value(joined) - x.double()).abs()
    # 24 bits have 15 of the mantissa, so half of the spacing is 2^-16 of the power of two below.
    normal = x.abs() >= 2.0**-126
    assert bool((error[normal] < 2.0**-16 * x.double().abs()[normal]).all())
    assert bool((error[~normal] <= 2.0**-142).all())
    assert float((error / x.double().abs())[normal].max()) > 0.99 * 2.0**-16  # the bound is reached
    finite = joined.isfinite()
    assert_nearest(rest[finite], joined[finite], "away")


@pytest.mark.parametrize("kind", SPLIT)
def test_what_24_and_32_bits_hold_comes_back(kind) -> None:
    """However often it is read and written."""
    rest, beside = parted(sample(), kind)
    x = get(rest, F32, beside)
    again = parted(x, kind)
    assert_same_bits(again[0], rest)
    assert_same_bits(again[1], beside)


def test_a_whole_master_shows_what_split16_shows() -> None:
    x = sample()
    rest, master = parted(x, "fp32")
    assert_same_bits(rest, parted(x, "split16")[0])
    assert_same_bits(master, x)
    assert len(master[master.isnan()].view(torch.int32).unique()) == 1  # one NaN
    nearest = torch.empty_like(rest)
    put(x, nearest)
    with pytest.raises(AssertionError):  # ties
        assert_same_bits(rest, nearest)


def test_a_whole_master_shows_the_nearest_even_float16() -> None:
    x = sample()
    rest, master = parted(x, "fp32", F16)
    assert_same_bits(master, x)
    near = x.abs() < 2.0**17
    assert_nearest(rest[near], x[near], "even")
    assert bool((rest.float() == x.sign() * torch.inf)[x.abs() >= 2.0**17].all())


@HALVES
def test_a_weight_written_from_outside_counts(dtype) -> None:
    """One by which a checkpoint of the model was loaded, for one: the master of that number is dropped, others stay."""
    x = torch.tensor([0.1, 0.2, 0.3, -0.0, torch.nan])
    rest, master = parted(x, "fp32", dtype)
    assert_same_bits(get(rest, F32, master), x)
    rest[1], rest[3] = 7.0, 0.0
    assert_same_bits(get(rest, F32, master), torch.tensor([0.1, 7.0, 0.3, 0.0, torch.nan]))


@pytest.mark.parametrize("kind", ["split16", "split8"])
def test_a_zero_or_an_infinity_written_from_outside_counts(kind) -> None:
    """By a clamp or a pruning mask: with what is below, which stays, some would mean a NaN."""
    x = torch.linspace(-2, 2, 1001)
    for written in (0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0):
        rest, low = parted(x, kind)
        assert bool((low < 0).any()) and bool((low > 0).any())
        rest.fill_(written)
        read = get(rest, F32, low)
        rest.copy_(read)  # what the model would see
        assert_same_bits(rest, torch.full_like(rest, written))


# ---- codes of 8 bits -----------------------------------------------------------------------------


class Given:
    """Stands for :class:`Random`, with the same word for each element, or one word each."""

    def __init__(self, words: int | Tensor) -> None:
        self.given = words

    def dither(self, n: int, device: torch.device) -> Tensor:
        return torch.as_tensor(self.given).expand(n)


NEAREST = Given(0x80000000)


def encoded(x: Tensor, dtype: torch.dtype, random: object) -> tuple[Tensor, Tensor]:
    codes = torch.full(x.shape, 77).to(dtype)
    scale = torch.full(scales_shape(x.shape), -1.0)
    put(x, codes, scale, random)  # type: ignore[arg-type]
    return codes, scale


def coded(x: Tensor, dtype: torch.dtype, random: object) -> Tensor:
    """There and back."""
    codes, scale = encoded(x, dtype, random)
    return get(codes, F32, scale)


def codes_of(dtype: torch.dtype) -> Tensor:
    """Every code of a finite number, from the lowest on; of what has a sign with one for zero."""
    top = CODES[dtype].top
    if not dtype.is_signed:
        return torch.arange(top + 1).to(dtype)
    number = torch.arange(-top, top + 1)
    return (number.abs() - 128 * (number < 0)).to(dtype)  # the sign is the uppermost bit


def grid(dtype: torch.dtype) -> Tensor:
    """In float64, what the codes from zero to the top mean with a scale of 1: eight to an octave, above c."""
    code = CODES[dtype]
    k = torch.arange(code.top + 1, dtype=F64)
    return code.c * ((k / 8).floor().exp2() * (1 + k % 8 / 8) - int(dtype.is_signed))


def scale_for(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """In float64, the least power of two with which no number of a block is above the top code; of zeros zero."""
    power = largest.double().log2().floor().clamp(min=-90).exp2()
    c = CODES[dtype].c * int(dtype.is_signed)
    power = torch.where(largest.double() + c * power > 1.75 * power, 2 * power, power)
    return torch.where(largest > 0, power, 0.0)


SCALES = pytest.mark.parametrize("scale", [2.0**-90, 2.0**-20, 1.0, 2.0**50, 2.0**127])


@BOTH_CODES
@SCALES
def test_every_code_has_a_number_of_its_own(dtype, scale) -> None:
    codes = codes_of(dtype)
    assert len(codes) == (253 if dtype.is_signed else 255)
    scales = torch.full(scales_shape(codes.shape), scale)
    x = get(codes, F32, scales)
    assert bool((x[1:] > x[:-1]).all())
    exact = scale * grid(dtype)
    if dtype.is_signed:
        assert_same_bits(x[:126], -x[127:].flip(0))
        assert x[126:].double().equal(exact) and x[126] == 0
        minus_zero = get(torch.full((1,), -128, dtype=dtype), F32, scales[:1])
        assert_same_bits(minus_zero, torch.zeros(1))
    else:
        assert x.double().equal(exact) and x[0] > 0
    assert_same_bits(get(codes, F32, 1.5 * scales), x)  # marked


@BOTH_CODES
def test_the_last_code_is_not_finite_in_a_marked_block(dtype) -> None:
    """A NaN among what is never negative is read as infinity: the root of either stops the element from moving on."""
    specials = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 0.0])
    codes, scale = encoded(specials, dtype, NEAREST)
    assert codes.tolist()[:3] == [CODES[dtype].special] * 3
    assert scale.tolist() == [1.5]
    read = get(codes, F32, scale)
    expected = torch.nan if dtype.is_signed else torch.inf
    assert_same_bits(read[:3], torch.full((3,), expected))
    assert read[3:].tolist() == coded(specials[3:], dtype, NEAREST).tolist()  # nor the others of it
    assert_same_bits(coded(specials[:3], dtype, NEAREST), torch.full((3,), expected))
    assert encoded(specials[3:], dtype, NEAREST)[1].tolist() == [1.0]
    assert bool(get(codes, F32, torch.ones(1)).isfinite().all())  # the comparison can fail


@BOTH_CODES
@SCALES
@pytest.mark.parametrize("largest", ["top", "scale"])
def test_every_code_comes_back(dtype, scale, largest) -> None:
    """Whatever the word that rounds it, with the largest that a scale may have and with the least."""
    codes = codes_of(dtype)
    top = CODES[dtype].top if largest == "top" else CODES[dtype].top - 5
    codes = codes[(codes.long() & (127 if dtype.is_signed else 255)) <= top]
    blocks = torch.full((len(codes), BLOCK), top).to(dtype)
    blocks[:, 1:] = codes[:, None]
    scales = torch.full(scales_shape(blocks.shape), scale)
    x = get(blocks, F32, scales)
    words = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, blocks.numel()))
    words[::5], words[1::5] = 0, 2**32 - 1
    again, new_scales = encoded(x, dtype, Given(words))
    assert_same_bits(again, blocks)
    assert_same_bits(new_scales, scales)
    up, _ = encoded(x * (1 + 2.0**-18), dtype, Given(2**32 - 1))  # the comparison can fail
    assert int((up != blocks).sum()) > blocks.numel() // 2


def logarithmic(n: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """Evenly spread in their logarithm from 10^low to 10^high; signed if codes of the dtype are."""
    rng = np.random.default_rng(1)
    x = 10.0 ** rng.uniform(low, high, n)
    return torch.from_numpy(x * rng.choice([-1, 1] if dtype.is_signed else [1], n)).float()


def assert_on_either_side(x: Tensor, dtype: torch.dtype, back: Tensor) -> None:
    """``back`` is the code's number just below ``x`` in magnitude or that just above, and has its sign."""
    unit = scale_for(x.view(-1, BLOCK).abs().amax(1), dtype).repeat_interleave(BLOCK)
    y, g = x.double().abs() / unit, grid(dtype)
    lower = (torch.searchsorted(g, y, right=True) - 1).clamp(0, len(g) - 2)
    gap = g[lower + 1] - g[lower]
    # Two roundings: of the sum with c, and of the difference on the way back. Each is 2^-24 of at most 16 gaps.
    slack = 2 * 2.0**-20 * gap
    z = back.double().abs() / unit
    assert bool(((z - y).abs() < gap + slack).all())
    on_grid = torch.minimum((z - g[lower]).abs(), (z - g[lower + 1]).abs()) <= slack
    # Just beside a code, rounding may cross it.
    beside = torch.minimum(y - g[lower], g[lower + 1] - y) <= slack
    assert bool((on_grid | beside).all())
    assert bool(((back == 0) | (back.sign() == x.sign())).all())


@BOTH_CODES
@pytest.mark.parametrize("size", [1.0, 1e-24, 1e-12, 1e4, 2.0**126])
def test_a_number_goes_to_the_code_below_or_above(dtype, size) -> None:
    x = logarithmic(512 * BLOCK, -9, 0, dtype) * size
    x.view(-1, BLOCK)[:, 0] = size
    for random in (Random(1, 2, 0, 2), Random(7, 1, 0, 3), NEAREST, Given(0), Given(2**32 - 1)):
        assert_on_either_side(x, dtype, coded(x, dtype, random))
    with pytest.raises(AssertionError):  # the check can fail
        assert_on_either_side(x, dtype, coded(1.2 * x.clamp(max=size / 1.2), dtype, NEAREST))
    with pytest.raises(AssertionError):
        assert_on_either_side(x, dtype, linear(x, dtype, NEAREST))


def linear(x: Tensor, dtype: torch.dtype, random: object) -> Tensor:
    """What codes are not: evenly spaced parts of the block's largest."""
    top = 127 if dtype.is_signed else 255
    blocks = x.view(-1, BLOCK)
    unit = blocks.abs().amax(1, keepdim=True) / top
    up = random.dither(x.numel(), CPU).view(-1, BLOCK) * 2.0**-32  # type: ignore[attr-defined]
    return ((blocks / unit).abs() + up).floor().mul(unit).copysign(blocks).float().view(-1)


def assert_no_zero_trap(code) -> None:
    """What is positive stays positive, and to an eighth right over nine decades: v of elements with small gradients
    beside ones with large ones is what keeps their steps small."""
    x = logarithmic(256 * BLOCK, -9, 0, torch.uint8)
    x.view(-1, BLOCK)[:, 0] = 1.0
    for random in (NEAREST, Random(1, 2, 0, 3)):
        back = code(x, torch.uint8, random)
        assert bool((back > 0).all())
        assert float((back.double() / x.double() - 1).abs().max()) < 0.125


def test_there_is_no_zero_trap() -> None:
    assert_no_zero_trap(coded)
    with pytest.raises(AssertionError):
        assert_no_zero_trap(linear)


def test_zero_stays_zero_among_numbers_with_a_sign() -> None:
    """Zeros of either sign, beside the least of floats and a large one, and alone, for the words at both ends."""
    for beside in ([], [2.0**-149], [1e-38], [1.0], [1e38], [1.0, torch.inf]):
        x = torch.tensor([0.0, -0.0, *beside])
        for random in (Given(0), Given(2**32 - 1), NEAREST):
            assert encoded(x, torch.int8, random)[0].tolist()[:2] == [0, -128]
            assert_same_bits(coded(x, torch.int8, random)[:2], torch.zeros(2))


def test_zeros_that_are_never_negative_stay_zero_in_a_block_of_them() -> None:
    """Beside another number they are as any that is far below it: 2^-31 of the scale."""
    x = torch.zeros(2 * BLOCK)
    x[0] = 3e-20
    for random in (Given(0), Given(2**32 - 1), NEAREST):
        codes, scale = encoded(x, torch.uint8, random)
        assert scale[1] == 0 and not bool(codes[1:].any())
        back = get(codes, F32, scale)
        assert_same_bits(back[BLOCK:], x[BLOCK:])
        assert_same_bits(back[1:BLOCK], (2.0**-31 * scale[0]).expand(BLOCK - 1))
        assert not bool(encoded(-0.0 * x, torch.uint8, random)[0].any())


def test_what_is_positive_is_read_as_positive() -> None:
    """The least float too, beside the largest of any size, and as no more than what is far below that."""
    largest = 2.0 ** torch.arange(-149, 128, dtype=F64)
    x = torch.stack([largest.float(), torch.full(largest.shape, 2.0**-149)], 1)
    x = torch.cat([x, torch.zeros(len(x), BLOCK - 2)], 1)
    for word in (0, 2**32 - 1):
        back = coded(x, torch.uint8, Given(word))
        assert bool((back > 0).all())
        assert bool((back[:, 1:] <= 2.0**-31 * x[:, :1].clamp(min=2.0**-90)).all())


@BOTH_CODES
def test_the_smallest_and_the_largest_floats(dtype) -> None:
    """Blocks below 2^-90 share the scale of that; what lies above 1.75 * 2^127 is taken for that."""
    least = torch.tensor([1e-28, 1e-29, 2e-30])
    back = coded(least, dtype, NEAREST)
    assert encoded(least, dtype, NEAREST)[1].tolist() == [2.0**-90]
    # Half of an eighth; the c of what has a sign is 2^-105, about 2% of the least of these, or less.
    assert bool(((back / least - 1).abs() < 0.0625 * 1.02).all())
    most = torch.tensor([1.75 * 2.0**127, 3.2e38, 3.4e38, 2.0**126])
    if dtype.is_signed:
        most = torch.cat([most, -most])
    back = coded(most, dtype, NEAREST)
    limited = most.clamp(-1.75 * 2.0**127, 1.75 * 2.0**127)
    assert bool(((back / limited - 1).abs() <= 2.0**-14).all())  # c is 2^-14 of the least, or less
    for size in (1e-45, 1e-38, 1e38, 3.4e38):
        assert bool(
            coded(logarithmic(BLOCK, -3, 0, dtype) * size, dtype, Random(1, 1)).isfinite().all()
        )


@BOTH_CODES
def test_a_block_has_its_own_scale_and_the_last_one_may_be_short(dtype) -> None:
    sizes = torch.tensor([1.0, 1e-12, 1e8, 0.0])
    x = torch.ones(4, BLOCK) * sizes[:, None]
    for n in (1, 127, 128, 129, 3 * BLOCK + 1, 4 * BLOCK):
        codes, scale = encoded(x.view(-1)[:n].clone(), dtype, NEAREST)
        assert scale.shape == (-(-n // BLOCK),)
        back = get(codes, F32, scale)
        assert bool(((back - x.view(-1)[:n]).abs() <= x.view(-1)[:n] / 16 * (1 + 2.0**-15)).all())
        assert scale.double().equal(scale_for(sizes[: len(scale)], dtype))


@BOTH_CODES
def test_a_scale_changes_only_with_the_power_of_two(dtype) -> None:
    """So numbers that do not change are rounded alike while their neighbours do."""
    x = logarithmic(BLOCK, -6, 0, dtype).clamp(-0.25, 0.25)
    found = {}
    for largest in (1.0, 0.9, 1.01, 1.74, 0.8, 1.76):
        x[0] = largest
        codes, scale = encoded(x, dtype, NEAREST)
        found[largest] = codes[1:], float(scale)
    codes, scale = found[1.0]
    assert [s / scale for _, s in found.values()] == [1, 1, 1, 1, 0.5, 2]
    assert_same_bits(found[0.9][0], codes)
    assert_same_bits(found[1.74][0], codes)
    assert not torch.equal(found[0.8][0], codes)


def test_what_may_be_a_scale() -> None:
    """What was made as one, and nothing beside it."""
    for dtype in CODES:
        for size in (0.0, 1e-45, 1e-20, 1.0, 3e38):
            for x in (torch.tensor([size]), torch.tensor([size, torch.inf])):
                assert are_scales(encoded(x, dtype, NEAREST)[1])
    for wrong in (-1.0, -0.0, 1.25, 1.75, 2.0**-91, torch.inf, torch.nan):
        assert not are_scales(torch.tensor([1.0, wrong]))


def test_codes_lie_in_row_major_order_whatever_the_strides() -> None:
    x = logarithmic(40 * BLOCK, -6, 0, torch.int8).view(40, BLOCK)
    codes, scale = encoded(x, torch.int8, Random(1, 2))
    other, other_scale = encoded(x.t().contiguous().t(), torch.int8, Random(1, 2))
    assert_same_bits(codes, other)
    assert_same_bits(scale, other_scale)
    assert_same_bits(
        get(codes, F32, scale).view(-1)[BLOCK:], get(codes[1:], F32, scale[1:]).view(-1)
    )


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (1,)),
        ((0,), (0,)),
        ((128,), (1,)),
        ((129,), (2,)),
        ((4, 128), (4, 1)),
        ((4, 2, 192), (4, 3)),
        ((4, 100), (4,)),
        ((5, 100), (4,)),
        ((3, 0), (0,)),
    ],
)
def test_there_is_a_scale_for_each_128_by_rows_where_rows_are_whole_blocks(shape, expected) -> None:
    assert tuple(scales_shape(torch.Size(shape))) == expected


# ---- dither --------------------------------------------------------------------------------------


def assert_no_drift(random_at, steps: int = 1000) -> None:
    """A number that is coded again and again is right on average.

    Each step adds the golden ratio to the word of an element. Of N such words the share in any interval is off by at
    most (3 + (1 / log phi + 1 / log 2) log N) / N (Kuipers & Niederreiter 1974, theorem 2.3.4), so the mean is off by
    at most that part of the gap between two codes, and by what rounding adds.
    """
    n = 64 * BLOCK
    for dtype in CODES:
        x = logarithmic(n, -6, 0, dtype)
        x.view(-1, BLOCK)[:, 0] = 1.0
        mean = sum(coded(x, dtype, random_at(t)).double() for t in range(1, steps + 1)) / steps
        g = grid(dtype)
        lower = (torch.searchsorted(g, x.double().abs(), right=True) - 1).clamp(0, len(g) - 2)
        gap = g[lower + 1] - g[lower]
        discrepancy = (
            3 + (1 / math.log((1 + 5**0.5) / 2) + 1 / math.log(2)) * math.log(steps)
        ) / steps
        assert bool(((mean - x.double()).abs() <= (discrepancy + 2 * 2.0**-20) * gap).all())


@pytest.mark.parametrize("slot", [2, 3])
def test_what_is_coded_again_and_again_does_not_drift(slot) -> None:
    assert_no_drift(lambda t: Random(12345, t, 0, slot), 300)
    with pytest.raises(AssertionError):  # to nearest, half of a gap is lost each time
        assert_no_drift(lambda t: NEAREST, 300)


def test_an_average_that_moves_by_less_than_a_code_follows() -> None:
    """A second moment that has to fall to a half while each step moves it by a thousandth: nearest stands still."""
    wanted = 0.5 + 0.5 * 0.999**1000
    ends = []
    for random_at in (lambda t: Random(1, t, 0, 3), lambda t: NEAREST):
        v = torch.ones(8 * BLOCK)
        v.view(-1, BLOCK)[:, 0] = 4.0  # holds the scale
        for t in range(1, 1001):
            v = coded(v + 0.001 * (torch.where(v > 2, v, 0.5) - v), torch.uint8, random_at(t))
        ends.append(v[v < 2])
    followed, stuck = ends
    # How exactly, the test before this one says.
    assert bool(((followed - wanted).abs() < (1 - wanted) / 2).all())
    assert bool((stuck == stuck[0]).all()) and float(stuck[0]) > 0.9


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e4])
def test_gradients_of_any_size_survive(size) -> None:
    """Adam's moments of a gradient after its first step, coded: each to an eighth, so the move to a fifth."""
    g = logarithmic(64 * BLOCK, -1, 0, torch.int8) * size
    m = coded(0.1 * g, torch.int8, Random(1, 1, 0, 2))
    v = coded(0.001 * g * g, torch.uint8, Random(1, 1, 0, 3))
    move = (m / 0.1) / (v / 0.001).sqrt()
    # m to an eighth and v to an eighth: 1.125 / (1 - 0.125)^0.5 = 1.203. The gap of m is an eighth of what is there and
    # c: 2^-15 of the scale, of which 10^-1 of the largest is 2^-4 at least.
    assert bool(((move * g.sign() - 1).abs() < 0.203 + 2.0**-10).all())
