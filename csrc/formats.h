// How numbers rest in memory: a type, `get` (to the number) and `put` (from it, to nearest even). The twin is
// adamfused/formats.py. Plain integer and float arithmetic without branches, so that every compiler vectorises it
// and every target gives the same bits.
//
// To add a format: a struct, a line in ADAMFUSED_FORMATS, its twin.
#pragma once

#include "target.h"

namespace adamfused {
namespace ADAMFUSED_TARGET {

ADAMFUSED_HD uint32_t bits_of(float x) {
  uint32_t b;
  __builtin_memcpy(&b, &x, sizeof b);
  return b;
}
ADAMFUSED_HD float float_of(uint32_t b) {
  float x;
  __builtin_memcpy(&x, &b, sizeof x);
  return x;
}

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

// The upper half of a float. Adding 0x7fff and the lowest kept bit rounds to nearest even; a NaN would overflow
// into the sign, so it gets the canonical pattern.
struct BF16 {
  using Rest = uint16_t;
  ADAMFUSED_HD static float get(uint16_t h) { return float_of(uint32_t(h) << 16); }
  ADAMFUSED_HD static uint16_t put(float x) {
    uint32_t b = bits_of(x);
    uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return uint16_t(x != x ? 0x7fc0u : rounded);
  }
  ADAMFUSED_HD static uint16_t put(double x) { return put(float(x)); }
};

// IEEE half. A half's magnitude moved into a float's fields is the number times 2^-112, subnormals included, so one
// exact multiplication undoes it. The other way, below 2^-14 halves are multiples of 2^-24, which is the spacing of
// floats at 0.5: adding 0.5 rounds there.
struct F16 {
  using Rest = uint16_t;
  ADAMFUSED_HD static float get(uint16_t h) {
    uint32_t magnitude = uint32_t(h & 0x7fffu) << 13;
    uint32_t b = bits_of(float_of(magnitude) * 0x1p112f);
    uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
    return float_of(b | special | uint32_t(h & 0x8000u) << 16);
  }
  ADAMFUSED_HD static uint16_t put(float x) {
    uint32_t b = bits_of(x);
    uint32_t magnitude = b & 0x7fffffffu;
    uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t h = magnitude < 0x38800000u ? small : normal;  // 2^-14
    h = magnitude >= 0x477ff000u ? 0x7c00u : h;             // 65520: half way past the largest half
    h = magnitude > 0x7f800000u ? 0x7e00u : h;
    return uint16_t(h | ((b >> 16) & 0x8000u));
  }
  ADAMFUSED_HD static uint16_t put(double x) { return put(float(x)); }
};

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused

// Every format, and the torch dtype that names it.
#define ADAMFUSED_FORMATS(FORMAT) \
  FORMAT(F32, Float)              \
  FORMAT(F64, Double)             \
  FORMAT(BF16, BFloat16)          \
  FORMAT(F16, Half)
