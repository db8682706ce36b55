// How numbers rest in memory: a type, `get` (to the number) and `put` (from it, to nearest even). The twin is
// adamfused/formats.py. Plain integer and float arithmetic without branches, so that every target gives the same bits.
//
// A format narrower than a float says how its bits become a float's and back, each in the low end of a word: of one
// word W, or of a vector of words that a CPU works on at once. So a comparison is followed by a choice, never a branch.
//
// To add a format: a struct, a line in ADAMFUSED_FORMATS, its twin.
#pragma once

#include "target.h"

namespace adamfused {
namespace ADAMFUSED_TARGET {

struct F32 {
  using Rest = float;
  ADAMFUSED_HD static float get(float x) { return x; }
  ADAMFUSED_HD static float put(float x) { return x; }
  ADAMFUSED_HD static float put(double x) { return float(x); }
};

struct F64 {
  using Rest = double;
  ADAMFUSED_HD static double get(double x) { return x; }
  ADAMFUSED_HD static double put(double x) { return x; }
};

// A 16-bit format by what its bits mean.
template <class Bits>
struct Half : Bits {
  using Rest = uint16_t;
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
    auto x = float_of(b);
    return x != x ? 0x7fc0u : rounded;
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
    W special = magnitude >= 0x0f800000u ? b | 0x7f800000u : b;  // infinity and NaN
    return special | (h & 0x8000u) << 16;
  }
  template <class W>
  ADAMFUSED_HD static W narrow(W b) {
    W magnitude = b & 0x7fffffffu;
    W normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    W small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    W h = magnitude < 0x38800000u ? small : normal;  // 2^-14
    h = magnitude >= 0x477ff000u ? 0x7c00u : h;      // 65520: half way past the largest half
    h = magnitude > 0x7f800000u ? 0x7e00u : h;
    return h | ((b >> 16) & 0x8000u);
  }
};
using F16 = Half<F16Bits>;

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused

// Every format, and the torch dtype that names it.
#define ADAMFUSED_FORMATS(FORMAT) \
  FORMAT(F32, Float)              \
  FORMAT(F64, Double)             \
  FORMAT(BF16, BFloat16)          \
  FORMAT(F16, Half)
