// Sums over chunks on a CPU; see csrc/sum.h. Included by each instruction set's file.
#pragma once

#include "cpu/drive.h"

namespace adamfused {
namespace ADAMFUSED_TARGET {

// A float holds these exactly.
template <class Format>
inline constexpr bool fits_float = !same<Format, F64>;

typedef float FloatHalf __attribute__((vector_size(ADAMFUSED_VECTOR / 2)));

// g++ 12 has no single instruction of its own for this.
inline Vector<double> widen(FloatHalf x) {
#if defined(__AVX512F__)
  return (Vector<double>)_mm512_maskz_cvtps_pd(0xff, (__m256)x);
#elif defined(__AVX2__)
  return (Vector<double>)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, Vector<double>);
#endif
}

inline Word load_halves(const uint16_t* from) {
  Word word;
  for (int i = 0; i < kWords; ++i) word[i] = from[i];
  return word;
}

// Two vectors of doubles from memory.
template <class Format>
void load_doubles(const typename Format::Rest* from, Vector<double>* to) {
  if constexpr (fits_float<Format>) {
    FloatHalf halves[2];
    const Vector<float> x = [from] {
      if constexpr (same<Format, F32>)
        return load(from);
      else
        return float_of(Format::widen(load_halves(from)));
    }();
    __builtin_memcpy(halves, &x, sizeof x);
    for (int i = 0; i < 2; ++i) to[i] = widen(halves[i]);
  } else {
    __builtin_memcpy(to, from, 2 * sizeof *to);
  }
}

// So many chunks side by side, each of n numbers, to their sums: memory gives one core half as much again when it is
// read at four places as when it is read at one.
constexpr int kStreams = 4;
// Chunks. What caches may hold is read faster at one place, because four have more sums than there are registers.
constexpr int64_t kLargeSum = 1024;

template <SumOf what, class Format, int streams>
void sum_side_by_side(const typename Format::Rest* const* from, int n, double* const* to) {
  using Rest = typename Format::Rest;
  using Sum = Summed<what>;
  constexpr int width = ADAMFUSED_VECTOR / sizeof(double), vectors = kLanes / width;
  constexpr int row_bytes = kLanes * sizeof(Rest), ahead = streams > 1 ? kAhead : 2 * kAhead;
  Vector<double> sum[streams][vectors] = {};
  auto add = [&sum](int s, const Rest* row) {
    for (int j = 0; j < vectors; j += 2) {
      Vector<double> x[2];
      load_doubles<Format>(row + j * width, x);
      for (int i = 0; i < 2; ++i) sum[s][j + i] = Sum::join(sum[s][j + i], Sum::of(x[i]));
    }
  };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int s = 0; s < streams; ++s) {
      for (int at = 0; at < row_bytes; at += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(from[s] + i) + ahead + at);
      add(s, from[s] + i);
    }
  for (int s = 0; s < streams; ++s) {
    if (i < n) {
      Rest row[kLanes] = {};
      __builtin_memcpy(row, from[s] + i, size_t(n - i) * sizeof row[0]);
      add(s, row);
    }
    double lane[kLanes];
    __builtin_memcpy(lane, sum[s], sizeof lane);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) lane[j] = Sum::join(lane[j], lane[j + half]);
    *to[s] = lane[0];
  }
}

struct Chunk {
  FormatId format;
  const void* data;
  int n;
  double* sum;
};

template <SumOf what, int streams>
void sum_some(const Chunk* chunk) {
  double* to[streams];
  for (int s = 0; s < streams; ++s) to[s] = chunk[s].sum;
  switch (chunk->format) {
#define ADAMFUSED_CASE(F, ...)                                                              \
  case FormatId::F: {                                                                       \
    const F::Rest* from[streams];                                                           \
    for (int s = 0; s < streams; ++s) from[s] = static_cast<const F::Rest*>(chunk[s].data); \
    return sum_side_by_side<what, F, streams>(from, chunk->n, to);                          \
  }
    ADAMFUSED_NUMBER_FORMATS(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
    default:
      break;
  }
}

// The chunks of a job in order, from some one on.
class Chunks {
 public:
  Chunks(const SumJob& job, int64_t chunk) : job_(job), chunk_(chunk) {
    int64_t high = job.count;  // the tensor that holds it: the last whose first chunk is not past it
    while (high - tensor_ > 1) {
      const int64_t middle = (tensor_ + high) / 2;
      (job.first_chunk[middle] <= chunk ? tensor_ : high) = middle;
    }
  }

  Chunk next() {
    while (job_.first_chunk[tensor_ + 1] <= chunk_) ++tensor_;
    const Addends& of = job_.tensors[tensor_];
    const int64_t start = (chunk_ - job_.first_chunk[tensor_]) * kChunk, left = of.numel - start;
    const char* data = static_cast<const char*>(of.data) + size_t(start) * size_of(of.format);
    return {of.format, data, int(left < kChunk ? left : kChunk), job_.sums + chunk_++};
  }

 private:
  const SumJob& job_;
  int64_t chunk_, tensor_ = 0;
};

template <SumOf what>
void sum_chunks(const SumJob& job, int64_t begin, int64_t end) {
  const bool large = job.first_chunk[job.count] >= kLargeSum;
  const int64_t each = large ? (end - begin) / kStreams : 0;
  Chunks streams[kStreams] = {{job, begin}, {job, begin + each}, {job, begin + 2 * each}, {job, begin + 3 * each}};
  for (int64_t i = 0; i < each; ++i) {
    Chunk chunk[kStreams];
    bool alike = true;
    for (int s = 0; s < kStreams; ++s) {
      chunk[s] = streams[s].next();
      alike &= chunk[s].format == chunk->format && chunk[s].n == chunk->n;
    }
    if (alike)
      sum_some<what, kStreams>(chunk);
    else
      for (const Chunk& one : chunk) sum_some<what, 1>(&one);
  }
  for (int64_t left = begin + kStreams * each; left < end; ++left) {
    const Chunk chunk = streams[kStreams - 1].next();
    sum_some<what, 1>(&chunk);
  }
}

inline void sum(const SumJob& job, int64_t begin, int64_t end) {
  switch (job.what) {
    case SumOf::Squares:
      return sum_chunks<SumOf::Squares>(job, begin, end);
    case SumOf::Largest:
      return sum_chunks<SumOf::Largest>(job, begin, end);
    case SumOf::Numbers:
      return sum_chunks<SumOf::Numbers>(job, begin, end);
  }
}

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused
