// How numbers rest in memory. The twin is adamfused/formats.py. Plain integer and float arithmetic without branches, so
// that every target gives the same bits.
//
// A format says how the bits of a float come from what rests and back, in words of 32 bits: one word W, or a vector of
// words that a CPU works on at once. So a comparison is followed by a choice, never a branch. What rests is a number of
// type Rest in one tensor and perhaps another, of type Beside, in a tensor beside it; both come in the low end of a
// word, as signed numbers if their type is.
//
// To add a format: a struct, a line in ADAMFUSED_FORMATS, its twin, and the line that tells it in step.h.
#pragma once

#include "target.h"

namespace adamfused {
namespace ADAMFUSED_TARGET {

constexpr uint32_t kInfinity = 0x7f800000, kMagnitude = 0x7fffffff;

// What is rounded at random draws its words from hashes of its place: no state to keep, and the same words whoever
// works on an element, and when. This one depends on every bit of x, one to one: Wellons' "lowbias32".
ADAMFUSED_HD uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The word of an element. What makes it random is mostly the key: here it only has to differ from those near it, and
// only the upper bits count.
constexpr uint32_t kGolden = 0x9e3779b9;  // 2^32 over the golden ratio, odd
template <uint32_t apart = kGolden, class W>
ADAMFUSED_HD W counter_at(W index, uint32_t key) {
  return index * apart + key;
}
template <class W>
ADAMFUSED_HD W word_of(W counter) {
  return (counter ^ (counter >> 15)) * 0x2c1b3c6du;
}

// The keys of words that are others each step: of a slot of a parameter.
ADAMFUSED_HD uint32_t key_of(uint32_t param, uint32_t t, int slot) {
  return mix(mix(param ^ t) ^ uint32_t(slot) * kGolden);
}

// Words that each walk through all of their range evenly, from step to step and from element to element: after a few,
// what they rounded up and down evens out better than by chance. All states of an element have the same.
constexpr uint32_t kRoot2 = 0x6a09e667;  // 2^32 times the root of 2, less 1; odd
ADAMFUSED_HD uint32_t key_of_dither(uint32_t param, uint32_t t) { return param + t * kGolden; }

struct Nothing {};

template <class W>
ADAMFUSED_HD auto is_nan(W b) {
  auto x = float_of(b);
  return x != x;
}
template <class W>
ADAMFUSED_HD auto is_finite(W magnitude) {
  return float_of(magnitude) < float_of(kInfinity);
}

struct F32 {
  using Rest = float;
  using Beside = Nothing;
  ADAMFUSED_HD static float get(float x) { return x; }
  ADAMFUSED_HD static float put(float x) { return x; }
  ADAMFUSED_HD static float put(double x) { return float(x); }
};

struct F64 {
  using Rest = double;
  using Beside = Nothing;
  ADAMFUSED_HD static double get(double x) { return x; }
  ADAMFUSED_HD static double put(double x) { return x; }
};

// A 16-bit format by what its bits mean.
template <class Bits>
struct Half : Bits {
  using Rest = uint16_t;
  using Beside = Nothing;
  ADAMFUSED_HD static float get(uint16_t h) { return float_of(Bits::widen(uint32_t(h))); }
  ADAMFUSED_HD static uint16_t put(float x) { return uint16_t(Bits::narrow(bits_of(x))); }
  ADAMFUSED_HD static uint16_t put(double x) { return put(float(x)); }
};

// The upper half of a float. Adding 0x7fff and the lowest kept bit rounds to nearest even; a NaN would overflow
// into the sign, so it gets the canonical pattern.
struct BF16Bits {
  template <class W>
  ADAMFUSED_HD static W widen(W h) {
    return h << 16;
  }
  template <class W>
  ADAMFUSED_HD static W narrow(W b) {
    W rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return is_nan(b) ? 0x7fc0u : rounded;
  }
  // Up or down, each as often as it is near: what is cut off is raised by a random number as long.
  template <class W>
  ADAMFUSED_HD static W narrow_at_random(W b, W word) {
    W rounded = (b + (word >> 16)) >> 16;
    return is_nan(b) ? 0x7fc0u : rounded;
  }
  // To nearest, ties away from zero: then the lower half, as a signed number, leads back.
  template <class W>
  ADAMFUSED_HD static W upper(W b) {
    return (b + 0x8000u) >> 16;
  }
};
using BF16 = Half<BF16Bits>;

// IEEE half. A half's magnitude moved into a float's fields is the number times 2^-112, subnormals included, so one
// exact multiplication undoes it. The other way, below 2^-14 halves are multiples of 2^-24, which is the spacing of
// floats at 0.5: adding 0.5 rounds there.
struct F16Bits {
  template <class W>
  ADAMFUSED_HD static W widen(W h) {
    W magnitude = (h & 0x7fffu) << 13;
    W b = bits_of(float_of(magnitude) * 0x1p112f);
    W special = magnitude >= 0x0f800000u ? b | kInfinity : b;  // infinity and NaN
    return special | (h & 0x8000u) << 16;
  }
  template <class W>
  ADAMFUSED_HD static W narrow(W b) {
    W magnitude = b & kMagnitude;
    W normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    W small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    W h = magnitude < 0x38800000u ? small : normal;  // 2^-14
    h = magnitude >= 0x477ff000u ? 0x7c00u : h;      // 65520: half way past the largest half
    h = magnitude > kInfinity ? 0x7e00u : h;
    return h | ((b >> 16) & 0x8000u);
  }
  template <class W>
  ADAMFUSED_HD static W narrow_at_random(W b, W word) {
    W magnitude = b & kMagnitude;
    W below = magnitude < 0x38800000u ? magnitude : 0u;
    W small = whole(float_of(below) * 0x1p37f);  // in units of 2^-13 of the spacing of halves there
    W fine = magnitude < 0x38800000u ? small : magnitude - 0x38000000u;
    W h = (fine + (word >> 19)) >> 13;
    h = magnitude >= 0x47800000u ? 0x7c00u : h;  // 65536
    h = magnitude > kInfinity ? 0x7e00u : h;
    return h | ((b >> 16) & 0x8000u);
  }
  template <class W>
  ADAMFUSED_HD static W upper(W b) {
    return narrow(b);
  }
};
using F16 = Half<F16Bits>;

// A 16-bit format that is rounded at random.
template <class Format>
struct AtRandom : Format {};
using BF16AtRandom = AtRandom<BF16>;
using F16AtRandom = AtRandom<F16>;

// A zero or an infinity that was written to the upper half since may not go with what is below: then it counts alone.
template <class W>
ADAMFUSED_HD W join_signed(W upper, W below) {
  const W joined = upper + below;
  return is_nan(joined) ? upper : joined;
}

// The upper half of a float, as the model sees it, and beside it the lower half: together all of its bits. To be
// joined, the upper half is in the upper end of its word.
struct Split16 {
  using Rest = uint16_t;
  using Beside = int16_t;
  template <class W>
  ADAMFUSED_HD static W join(W upper, W lower) {
    return join_signed(upper, lower);
  }
  template <class W>
  ADAMFUSED_HD static void part(W b, W& upper, W& lower) {
    b = is_nan(b) ? 0x7fc00000u : b;
    upper = BF16::upper(b);
    lower = b & 0xffffu;
  }
};

// The same of the upper 24 bits.
struct Split8 {
  using Rest = uint16_t;
  using Beside = int8_t;
  template <class W>
  ADAMFUSED_HD static W join(W upper, W lower) {
    return join_signed(upper, lower << 8);
  }
  template <class W>
  ADAMFUSED_HD static void part(W b, W& upper, W& lower) {
    W rounded = b + 0x7fu + ((b >> 8) & 1u);
    rounded = is_nan(b) ? 0x7fc00000u : rounded;
    upper = BF16::upper(rounded & 0xffffff00u);
    lower = (rounded >> 8) & 0xffu;
  }
};

// A 16-bit number, and beside it the float that it was rounded from. Where the two have parted, because the 16-bit one
// was written since, it counts.
template <class Format>
struct Master {
  using Rest = uint16_t;
  using Beside = float;
  template <class W>
  ADAMFUSED_HD static W join(W seen, W master) {
    return Format::upper(master) == seen ? master : Format::widen(seen);
  }
  template <class W>
  ADAMFUSED_HD static void part(W b, W& seen, W& master) {
    master = is_nan(b) ? 0x7fc00000u : b;
    seen = Format::upper(master);
  }
};
using MasterBF16 = Master<BF16>;
using MasterF16 = Master<F16>;

// Codes of 8 bits, and beside them a scale for each block, a power of two. A code is a float's exponent and first three
// bits of mantissa, counted from those of c, which is a part of the scale. To what has a sign c is added: so its codes
// are evenly spaced up to about c and logarithmically above, and zero is one of them. What is never negative is c at
// least, because its root may divide; only in a block of zeros, whose scale is zero, it is zero. Rounded up and down in
// turn, because a running average that moves by less than half of a code's step would else stand still.
constexpr int kBlock = 128;
constexpr int kShift = 20;                    // what a code leaves out of a float: all of the mantissa but three bits
constexpr uint32_t kLeastScale = 0x12800000,  // 2^-90 and
    kMostScale = 0x7f000000;                  // 2^127: so c and what the top code means are normal numbers
constexpr uint32_t kMark = 0x400000;  // in the scale of a block some of whose codes are of numbers that are not finite

ADAMFUSED_HD bool is_marked(float scale) { return (bits_of(scale) & kMark) != 0; }

// What a number of a block is raised by before the code leaves out the rest: a dither, with numbers of a block that are
// 32 apart the same.
constexpr int kPhases = 32;
template <class W>
ADAMFUSED_HD W dither_at(W index, uint32_t key) {
  return counter_at<kRoot2>(index, key) >> (32 - kShift);
}
ADAMFUSED_HD uint32_t phase_of(uint32_t index) { return index & ~uint32_t(kBlock - kPhases); }

template <class Scheme>
struct Code : Scheme {
  using Rest = uint8_t;
  using Beside = float;
  using Scheme::kC;
  using Scheme::kTop;
  static constexpr uint32_t kSpecial = kTop + 1;

  ADAMFUSED_HD static uint32_t c_of(float scale) { return bits_of(kC * float_of(bits_of(scale) & kInfinity)); }

  // Of a finite number's code; and of any.
  template <class W>
  ADAMFUSED_HD static W decode_finite(W code, float scale) {
    const uint32_t c = c_of(scale);
    if constexpr (Scheme::kSigned) {
      const W sign = (code & 0x80u) << 24;
      return bits_of(float_of((((code & 0x7fu) << kShift) + c) | sign) - float_of(sign | c));
    } else {
      return (code << kShift) + c;
    }
  }
  template <class W>
  ADAMFUSED_HD static W decode(W code, float scale) {
    const uint32_t special = is_marked(scale) ? kSpecial : 256;
    return code == special ? Scheme::kSpecialBits : decode_finite(code, scale);
  }
  // The power of two that is as large as the largest finite magnitude or next below; the next above, if the largest,
  // with c where that is added, is over 1.75 of it, which is the top code. So scales seldom change, and with them what
  // numbers that have not changed are rounded to.
  ADAMFUSED_HD static float scale_for(uint32_t largest, bool all_finite) {
    constexpr uint32_t c = Scheme::kSigned ? uint32_t(kC * 0x1p23f) : 0;  // in units of the last place
    const uint32_t scale = larger(smaller((largest + 0x1fffffu + c) & kInfinity, kMostScale), kLeastScale);
    return float_of(!all_finite ? scale | kMark : largest != 0 ? scale : 0u);
  }
  // Of a finite number, and of any.
  template <class W>
  ADAMFUSED_HD static W encode_finite(W b, float scale, W dither) {
    const uint32_t c = c_of(scale);
    const W magnitude = b & kMagnitude;
    if constexpr (Scheme::kSigned) {
      const W fine = bits_of(float_of(magnitude) + float_of(c)) + dither;
      return smaller((fine - c) >> kShift, W{} + kTop) | ((b >> 24) & 0x80u);
    } else {
      return smaller((larger(magnitude + dither, W{} + c) - c) >> kShift, W{} + kTop);
    }
  }
  template <class W>
  ADAMFUSED_HD static W encode(W b, float scale, W dither) {
    return is_finite(b & kMagnitude) ? encode_finite(b, scale, dither) : kSpecial;
  }
};

// c = 2^-15 of the scale: 126 codes of either sign, and one for NaN.
struct SignedScheme {
  static constexpr bool kSigned = true;
  static constexpr float kC = 0x1p-15f;
  static constexpr uint32_t kTop = 126, kSpecialBits = 0x7fc00000;
};
// c = 2^-31 of it; the last code is infinity.
struct UnsignedScheme {
  static constexpr bool kSigned = false;
  static constexpr float kC = 0x1p-31f;
  static constexpr uint32_t kTop = 254, kSpecialBits = kInfinity;
};
using SignedCode = Code<SignedScheme>;
using UnsignedCode = Code<UnsignedScheme>;

// Which kind a format is, if it is not that of a number by itself, rounded to nearest.
template <class Format>
inline constexpr bool is_code = false;
template <class Scheme>
inline constexpr bool is_code<Code<Scheme>> = true;
template <class Format>
inline constexpr bool is_joined = false;
template <>
inline constexpr bool is_joined<Split16> = true;
template <>
inline constexpr bool is_joined<Split8> = true;
template <class Half>
inline constexpr bool is_joined<Master<Half>> = true;
template <class Format>
inline constexpr bool at_random = false;
template <class Half>
inline constexpr bool at_random<AtRandom<Half>> = true;

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused

// The formats of numbers by themselves, which gradients and copies have, and the torch dtype of each.
#define ADAMFUSED_NUMBER_FORMATS(FORMAT) \
  FORMAT(F32, Float)                     \
  FORMAT(F64, Double)                    \
  FORMAT(BF16, BFloat16)                 \
  FORMAT(F16, Half)

// Every format.
#define ADAMFUSED_FORMATS(FORMAT)  \
  ADAMFUSED_NUMBER_FORMATS(FORMAT) \
  FORMAT(BF16AtRandom)             \
  FORMAT(F16AtRandom)              \
  FORMAT(Split16)                  \
  FORMAT(Split8)                   \
  FORMAT(MasterBF16)               \
  FORMAT(MasterF16)                \
  FORMAT(SignedCode)               \
  FORMAT(UnsignedCode)
