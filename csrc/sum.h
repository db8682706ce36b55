// What the norm of the gradients is made from: a sum over all their numbers (of squares, or the largest) in an order
// that depends on nothing but the tensors. The twin is adamfused/norm.py.
//
// A tensor's numbers, in the order of memory, come in chunks of kChunk, of which the last may be shorter. In a chunk,
// kLanes sums run side by side: the i-th number goes to lane i % kLanes, in order; then lanes are joined by halves. The
// chunks' sums, of all tensors in order, are a list of numbers that is summed in the same way, until one is left.
// All in double, where the square of a float is exact.
#pragma once

#include "job.h"

namespace adamfused {

constexpr int kChunk = 4096, kLanes = 32;

enum class SumOf : uint8_t { Squares, Largest, Numbers };

struct Addends {
  const void* data;
  FormatId format;
  int64_t numel;
};

struct SumJob {
  SumOf what;
  const Addends* tensors;
  int64_t count;
  const int64_t* first_chunk;  // of each tensor, in the list of all chunks; count + 1 entries
  double* sums;                // of the chunks
};

inline int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// What the sums of chunks are put together by.
inline SumOf next(SumOf what) { return what == SumOf::Largest ? SumOf::Largest : SumOf::Numbers; }

// How many sums there are in all, those of sums too; the last is the whole.
inline int64_t sums_of(int64_t chunks) {
  int64_t all = chunks;
  while (chunks > 1) all += chunks = chunks_of(chunks);
  return all;
}

namespace ADAMFUSED_TARGET {

// N is double, or a vector of them.
template <SumOf what>
struct Summed {
  template <class N>
  ADAMFUSED_HD static N of(N x) {
    if constexpr (what == SumOf::Squares) return x * x;
    if constexpr (what == SumOf::Largest) return x < 0.0 ? -x : x;
    return x;
  }
  template <class N>
  ADAMFUSED_HD static N join(N a, N b) {
    if constexpr (what == SumOf::Largest) return larger(a, b);
    return a + b;
  }
};

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused
