// What differs between the compilers that read the shared headers (rules.h, formats.h, job.h).
//
// A file defines ADAMFUSED_TARGET before it includes them, and everything they hold lands in the namespace
// adamfused::ADAMFUSED_TARGET. Without that, the linker would keep one copy of an inline function for all
// instruction sets, and might keep the AVX-512 one on a machine that has no AVX-512. For the same reason the
// shared headers include nothing of the C++ standard library but plain C declarations.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#ifndef ADAMFUSED_TARGET
#error "define ADAMFUSED_TARGET (scalar, avx2, avx512, cuda, host) before including adamfused headers"
#endif

#ifdef __CUDACC__
#define ADAMFUSED_HD __host__ __device__ __forceinline__
#define ADAMFUSED_UNROLL _Pragma("unroll")
#else
#define ADAMFUSED_HD inline
#define ADAMFUSED_UNROLL
#endif
#define ADAMFUSED_RESTRICT __restrict__

namespace adamfused {
namespace ADAMFUSED_TARGET {

template <class A, class B>
inline constexpr bool same = false;
template <class A>
inline constexpr bool same<A, A> = true;

// A number that is known when this is compiled, as an argument.
template <int k>
struct Index {
  static constexpr int value = k;
};

template <int begin, int end, class Work>
ADAMFUSED_HD void for_each(Work work) {
  if constexpr (begin < end) {
    work(Index<begin>{});
    for_each<begin + 1, end>(work);
  }
}

// A float's bits as a number, and back.
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
ADAMFUSED_HD uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
ADAMFUSED_HD uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
// A float without its fraction, from 0 to 2^31.
ADAMFUSED_HD uint32_t whole(float x) { return uint32_t(int32_t(x)); }

#ifdef ADAMFUSED_VECTOR  // bytes: what a file of csrc/cpu/ works on at once
template <class T>
struct Vectors {
  typedef T Type __attribute__((vector_size(ADAMFUSED_VECTOR)));
};
template <class T>
using Vector = typename Vectors<T>::Type;

inline Vector<uint32_t> bits_of(Vector<float> x) { return (Vector<uint32_t>)x; }
inline Vector<float> float_of(Vector<uint32_t> b) { return (Vector<float>)b; }
inline Vector<uint32_t> smaller(Vector<uint32_t> a, Vector<uint32_t> b) { return a < b ? a : b; }
inline Vector<uint32_t> larger(Vector<uint32_t> a, Vector<uint32_t> b) { return a > b ? a : b; }
inline Vector<uint32_t> whole(Vector<float> x) { return (Vector<uint32_t>)__builtin_convertvector(x, Vector<int32_t>); }
#endif

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused
