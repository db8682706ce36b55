// What differs between the compilers that read the shared headers (rules.h, formats.h, tile.h, job.h).
//
// A file defines ADAMFUSED_TARGET before it includes them, and everything they hold lands in the namespace
// adamfused::ADAMFUSED_TARGET. Without that, the linker would keep one copy of an inline function for all
// instruction sets, and might keep the AVX-512 one on a machine that has no AVX-512. For the same reason the
// shared headers include nothing of the C++ standard library but plain C declarations.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

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
