"""How numbers rest in memory: ``get`` (to the number) and ``put`` (from it). The twin of ``csrc/formats.h``.

A part of the step is a tensor, or a tensor with another one beside it:

=================  =======================  ========================================================================
tensor             beside it                format
=================  =======================  ========================================================================
a floating dtype   nothing                  the number; float32 rounds to 16 bits to nearest even, or at random
bfloat16           int16, the same shape    *split16*: the upper half of a float32; its lower half lies beside
bfloat16           int8, the same shape     *split8*: the upper 16 of 24 bits; the lower 8 lie beside
16 bits            float32, the same shape  a float32 number, and what it is rounded to
int8               float32, one a block     *int8*: signed codes of 8 bits, scaled by block
uint8              float32, one a block     *int8*: codes of 8 bits for what is never negative, scaled by block
=================  =======================  ========================================================================
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FORMATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes that parameters, gradients and states may have (a complex dtype is pairs of one of these)."""


def get(rest: Tensor, arithmetic: torch.dtype, beside: Tensor | None = None) -> Tensor:
    """The numbers of a part in the arithmetic's dtype, float32 or float64: a new tensor; complex ones as pairs."""
    if beside is not None:
        return (_decoded if rest.dtype in CODES else _joined)(rest, beside).to(arithmetic)
    if rest.is_complex():
        return torch.view_as_real(rest.to(arithmetic.to_complex(), copy=True).resolve_conj())
    return rest.to(arithmetic, copy=True).resolve_neg()


def put(
    x: Tensor, rest: Tensor, beside: Tensor | None = None, random: Random | None = None
) -> None:
    """Writes ``x`` into a part: to nearest even, or at random; a double goes to 16 bits and fewer by way of float32,
    as in C++."""
    if x.dtype == torch.float64 and rest.element_size() < (8 if rest.is_complex() else 4):
        x = x.to(torch.float32)
    if rest.dtype in CODES:
        assert beside is not None and random is not None
        _encode(x, rest, beside, random)
    elif beside is not None:
        _part(x, rest, beside)
    else:
        half = rest.dtype.to_real() if rest.is_complex() else rest.dtype
        if random is not None and half in _ROUND_AT_RANDOM:
            bits = _ROUND_AT_RANDOM[half](_bits(x), random.words(x.numel(), x.device).view(x.shape))
            x = _as_16_bits(bits, half)
        rest.copy_(torch.view_as_complex(x) if rest.is_complex() else x)


# ---- random numbers ------------------------------------------------------------------------------------------------
# Hashes of a counter: no state to keep, and the same numbers whoever works on an element, and when. The bits of a
# float32 and the words of the hash are int64 tensors here, because torch has few operations on unsigned numbers.

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio, odd
_ROOT_2 = 0x6A09E667  # 2^32 times the root of 2, less 1; odd


def mix(x):  # of an int, or of a tensor of them
    """A word of 32 bits that depends on every bit of ``x``, one to one (Wellons' hash "lowbias32")."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def place_key(seed: int, place: int) -> int:
    """What the random numbers of a parameter depend on: the seed, and its place among the optimizer's parameters."""
    return mix(mix(mix(seed & _WORD) ^ (seed >> 32 & _WORD)) ^ (place & _WORD))


class Random(NamedTuple):
    """The random words of one parameter, step and slot.

    Args:
        key: of the parameter, from :func:`place_key`.
        t: the step.
        first: the index of the first element in the whole parameter, of which this may be a shard.
        slot: 0 for the parameter, 2 for its first state, 3 for the second.
    """

    key: int
    t: int
    first: int = 0
    slot: int = 0

    @classmethod
    def at_step(cls, place_key: int, t: float, first: int = 0) -> Random:
        """Those of step ``t`` of a parameter."""
        return cls(place_key, int(t) & _WORD, first)

    def of(self, slot: int) -> Random:
        return self._replace(slot=slot)

    def words(self, n: int, device: torch.device) -> Tensor:
        """``n`` words, one an element: others each step."""
        key = mix(mix(self.key ^ self.t) ^ (self.slot * _GOLDEN & _WORD))
        i = torch.arange(n, dtype=torch.int64, device=device) + self.first
        counter = (i * _GOLDEN + key) & _WORD
        return ((counter ^ counter >> 15) * 0x2C1B3C6D) & _WORD

    def dither(self, n: int, device: torch.device) -> Tensor:
        """``n`` words, one an element, that each walk through all of their range evenly, from step to step and from
        element to element: after a few, what they rounded up and down evens out better than by chance. All states of an
        element have the same, and so have elements of a block of codes that are 32 apart."""
        i = torch.arange(n, dtype=torch.int64, device=device) & ~(BLOCK - _PHASES)
        return ((i + self.first) * _ROOT_2 + self.t * _GOLDEN + self.key) & _WORD


# ---- 16 bits, and what lies beside them ----------------------------------------------------------------------------

_NAN, _INF = 0x7FC00000, 0x7F800000


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32).to(torch.int64) & _WORD


def _float_of(bits: Tensor) -> Tensor:
    return _signed(bits, 32).to(torch.int32).view(torch.float32)


def _signed(bits: Tensor, n: int) -> Tensor:
    """The low ``n`` bits as a signed number."""
    return ((bits & (1 << n) - 1) ^ (1 << n - 1)) - (1 << n - 1)


def _as_16_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return _signed(bits, 16).to(torch.int16).view(dtype)


def _bf16_at_random(b: Tensor, words: Tensor) -> Tensor:
    """Up or down, each as often as it is near: what is cut off is raised by a random number as long."""
    rounded = (b + (words >> 16)) >> 16
    return torch.where((b & 0x7FFFFFFF) > _INF, 0x7FC0, rounded & 0xFFFF)


def _f16_at_random(b: Tensor, words: Tensor) -> Tensor:
    magnitude = b & 0x7FFFFFFF
    # Below 2^-14 halves are multiples of 2^-24; else they have 13 bits fewer than a float.
    small = (_float_of(magnitude.clamp(max=0x38800000)) * 2.0**37).to(torch.int64)
    long = torch.where(magnitude < 0x38800000, small, magnitude - 0x38000000)
    h = (long + (words >> 19)) >> 13
    h = torch.where(magnitude >= 0x47800000, 0x7C00, h)  # 65536
    h = torch.where(magnitude > _INF, 0x7E00, h)
    return h | b >> 16 & 0x8000


_ROUND_AT_RANDOM = {torch.bfloat16: _bf16_at_random, torch.float16: _f16_at_random}


def _upper(b: Tensor) -> Tensor:
    """The nearest 16 upper bits, ties away from zero: so that the lower 16, as a signed number, lead back."""
    return (b + 0x8000) >> 16 & 0xFFFF


def _visible(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a float32 number that lies beside is rounded to. A bfloat16 is that of split16, so that both train alike."""
    return _as_16_bits(_upper(_bits(x)), dtype) if dtype == torch.bfloat16 else x.to(dtype)


def _joined(rest: Tensor, beside: Tensor) -> Tensor:
    if beside.dtype == torch.float32:
        # A weight that was written since, by a checkpoint of the model for one, counts.
        same = _visible(beside, rest.dtype).view(torch.int16) == rest.contiguous().view(torch.int16)
        return torch.where(same, beside, rest.float())
    upper = rest.contiguous().view(torch.int16).to(torch.int64) << 16
    joined = _float_of(upper + (beside.to(torch.int64) << (16 - 8 * beside.element_size())))
    # A zero or an infinity that was written since may not go with what is below: then it counts alone.
    return torch.where(joined.isnan(), rest.float(), joined)


def _part(x: Tensor, rest: Tensor, beside: Tensor) -> None:
    if beside.dtype == torch.float32:
        x = torch.where(x.isnan(), torch.nan, x)  # one NaN for all processors
        beside.copy_(x)
        rest.copy_(_visible(x, rest.dtype))
        return
    b = _bits(x)
    b = torch.where((b & 0x7FFFFFFF) > _INF, _NAN, b)
    if beside.dtype == torch.int8:
        b = (b + 0x7F + (b >> 8 & 1)) >> 8 << 8 & _WORD
        beside.copy_(_signed(b >> 8, 8))
    else:
        beside.copy_(_signed(b, 16))
    rest.copy_(_as_16_bits(_upper(b), rest.dtype))


# ---- 8 bits --------------------------------------------------------------------------------------------------------
# Codes of 8 bits, and beside them a scale for each block, a power of two. A code is exponent and first three bits of
# mantissa of a float32, counted from those of c, which is a part of the scale. To what has a sign c is added: so its
# codes are evenly spaced up to about c and logarithmically above, and zero is one of them. What is never negative is c
# at least, because its root divides; only in a block of zeros, whose scale is zero, it is zero. Rounded up and down in
# turn, because a running average that moves by less than half of a code's step would else stand still.

BLOCK = 128
"""Consecutive numbers that have one scale."""
_PHASES = 32  # how many of a block have dithers of their own
_SHIFT = 20  # what a code leaves out of a float32: all of the mantissa but three bits


class Code(NamedTuple):
    """A code of 8 bits.

    Args:
        c: of a scale of 1, a power of two.
        top: the largest code of a finite number. In a block whose scale is marked, the next one stands for a number
            that is not.
    """

    c: float
    top: int

    @property
    def special(self) -> int:
        """What stands for a number that is not finite: for NaN if signed, else for infinity."""
        return self.top + 1


CODES = {
    torch.int8: Code(c=2.0**-15, top=126),  # and the sign in the uppermost bit
    torch.uint8: Code(c=2.0**-31, top=254),
}


def scales_shape(shape: torch.Size) -> tuple[int, ...]:
    """The shape of the scales of a tensor: by rows where a row is whole blocks, so that both can be sharded alike."""
    row = shape[1:].numel()
    if len(shape) > 1 and row > 0 and row % BLOCK == 0:
        return (shape[0], row // BLOCK)
    return (-(-shape.numel() // BLOCK),)


def _decoded(codes: Tensor, scale: Tensor) -> Tensor:
    code, signed = CODES[codes.dtype], codes.dtype.is_signed
    byte = codes.reshape(-1).to(torch.int64) & 0xFF
    scale = scale.reshape(-1).repeat_interleave(BLOCK)[: byte.numel()]
    c = _c_of(scale, code)
    magnitude = byte & 0x7F if signed else byte
    x = _float_of((magnitude << _SHIFT) + _bits(c))
    if signed:
        sign = torch.where(byte != magnitude, -1.0, 1.0)
        x = sign * x - sign * c  # of any sign, 0 is +0
    special = (byte == code.special) & (_bits(scale) & _MARK != 0)
    return torch.where(special, torch.nan if signed else torch.inf, x).view(codes.shape)


def _encode(x: Tensor, codes: Tensor, scale: Tensor, random: Random) -> None:
    code, signed = CODES[codes.dtype], codes.dtype.is_signed
    n = x.numel()
    numbers = x.new_zeros(scale.numel(), BLOCK)
    numbers.view(-1)[:n] = x.reshape(-1)
    magnitude = numbers.abs()
    finite = magnitude < torch.inf
    largest = torch.where(finite, magnitude, 0.0).amax(1, keepdim=True)
    its_scale = _scale_for(largest, finite.all(1, keepdim=True), signed, code)
    c = _c_of(its_scale, code)
    up = random.dither(numbers.numel(), x.device).view(numbers.shape) >> 32 - _SHIFT
    if signed:
        byte = (_bits(magnitude + c) + up - _bits(c) >> _SHIFT).clamp(max=code.top)
        byte = _signed(torch.where(numbers.signbit(), byte | 0x80, byte), 8)
    else:
        byte = ((_bits(magnitude) + up).maximum(_bits(c)) - _bits(c) >> _SHIFT).clamp(max=code.top)
    byte = torch.where(finite, byte, code.special)
    codes.copy_(byte.view(-1)[:n].view(x.shape))
    scale.copy_(its_scale.view(scale.shape))


def _c_of(scale: Tensor, code: Code) -> Tensor:
    return code.c * _float_of(_bits(scale) & _INF)


def _scale_for(largest: Tensor, all_finite: Tensor, signed: bool, code: Code) -> Tensor:
    """The power of two that is as large as the largest or next below; the next above, if the largest, with c where that
    is added, is over 1.75 of it, which is the top code. So scales seldom change, and with them what numbers that have
    not changed are rounded to. Of zeros it is zero; marked if not all of the block are finite."""
    c = int(code.c * 2**23) if signed else 0  # in units of the last place
    scale = (_bits(largest) + 0x1FFFFF + c & _INF).clamp(_LEAST, _MOST)
    return _float_of(torch.where(~all_finite, scale | _MARK, torch.where(largest > 0, scale, 0)))


# 2^-90 and 2^127: so c and what the top code means are normal numbers.
_LEAST, _MOST = 0x12800000, 0x7F000000
_MARK = 0x400000


def are_scales(numbers: Tensor) -> bool:
    """Whether float32 numbers are scales of codes: powers of two, or marked ones, or the 0 of zeros."""
    bits = _bits(numbers)
    power = bits & ~_MARK
    right = (power >= _LEAST) & (power <= _MOST) & ((power & ~_INF) == 0)
    return bool((right | (bits == 0)).all())
