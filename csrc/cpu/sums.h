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

template <SumOf what, class Format>
double sum_chunk(const typename Format::Rest* from, int n) {
  using Sum = Summed<what>;
  constexpr int width = ADAMFUSED_VECTOR / sizeof(double), vectors = kLanes / width;
  Vector<double> sum[vectors] = {};
  auto add = [&sum](const typename Format::Rest* row) {
    for (int j = 0; j < vectors; j += 2) {
      Vector<double> x[2];
      load_doubles<Format>(row + j * width, x);
      for (int i = 0; i < 2; ++i) sum[j + i] = Sum::join(sum[j + i], Sum::of(x[i]));
    }
  };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch(reinterpret_cast<const char*>(from + i) + 2 * kAhead);
    if constexpr (sizeof *from >= 4) __builtin_prefetch(reinterpret_cast<const char*>(from + i) + 2 * kAhead + 64);
    add(from + i);
  }
  if (i < n) {
    typename Format::Rest row[kLanes] = {};
    __builtin_memcpy(row, from + i, size_t(n - i) * sizeof row[0]);
    add(row);
  }
  double lane[kLanes];
  __builtin_memcpy(lane, sum, sizeof lane);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] = Sum::join(lane[j], lane[j + half]);
  return lane[0];
}

template <SumOf what>
void sum_chunks(const SumJob& job, int64_t begin, int64_t end) {
  int64_t low = 0, high = job.count;  // the tensor that holds chunk `begin`
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    (job.first_chunk[middle] <= begin ? low : high) = middle;
  }
  for (int64_t t = low, chunk = begin; chunk < end; ++t) {
    const Addends& tensor = job.tensors[t];
    const int64_t last = job.first_chunk[t + 1] < end ? job.first_chunk[t + 1] : end;
    for (; chunk < last; ++chunk) {
      const int64_t start = (chunk - job.first_chunk[t]) * kChunk;
      const int n = int(tensor.numel - start < kChunk ? tensor.numel - start : kChunk);
      switch (tensor.format) {
#define ADAMFUSED_CASE(F, ...)                                                                 \
  case FormatId::F:                                                                            \
    job.sums[chunk] = sum_chunk<what, F>(static_cast<const F::Rest*>(tensor.data) + start, n); \
    break;
        ADAMFUSED_NUMBER_FORMATS(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
        default:
          break;
      }
    }
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
