// The CUDA kernels. A launch carries a table of tensors as kernel arguments; each block takes tiles of it in turn:
// get -> rule -> put, on E elements a thread, with 16-byte accesses where the tensors are aligned.
#pragma once

#include "job.h"

namespace adamfused {
namespace ADAMFUSED_TARGET {

constexpr int kThreads = 256;
constexpr int kRounds = 4;  // times a thread goes round within a tile

// Kernel arguments may take 32,764 bytes since CUDA 12.1, 4,096 before.
#if CUDART_VERSION >= 12010
constexpr int kArgumentBytes = 32764;
constexpr int kTable = 64;
#else
constexpr int kArgumentBytes = 4096;
constexpr int kTable = 8;
#endif

template <class Rule>
struct Arguments {
  static constexpr int parts = kState + Rule::states;
  struct Entry {
    void* data[parts + 1];  // the copy last
    int64_t numel;
    float* step;
    int32_t recipe;
    FormatId format[parts + 1];
    bool aligned;
  };
  union Ready {
    Rule rule;
    Recipe recipe;
  };
  static constexpr int entries = int((kArgumentBytes - kTable * sizeof(Ready) - 32) / (sizeof(Entry) + 4));

  Entry entry[entries];
  Ready ready[kTable];
  uint32_t first_tile[entries + 1];
  int32_t count;
  const double* factor;    // as in Job
  const float* found_inf;  // likewise
};

// E elements of all parts: parameter, gradient, states.
template <class Rule, class T, int E>
struct Elements {
  T p[E], g[E], s[Rule::states][E];

  __device__ __forceinline__ T* part(int k) { return k == kParam ? p : k == kGrad ? g : s[k - kState]; }
  __device__ __forceinline__ void move_by(const Rule& rule) {
    ADAMFUSED_UNROLL
    for (int i = 0; i < E; ++i) move(rule, p, g, s, i);
  }
};

// N bytes between memory and registers, by the widest accesses that divide them.
template <int N>
ADAMFUSED_HD void load_bytes(const void* from, uint32_t* to) {
  static_assert(N == 4 || N == 8 || N % 16 == 0, "");
  if constexpr (N == 4) to[0] = *static_cast<const uint32_t*>(from);
  if constexpr (N == 8) {
    uint2 x = *static_cast<const uint2*>(from);
    to[0] = x.x, to[1] = x.y;
  }
  if constexpr (N >= 16) {
    ADAMFUSED_UNROLL
    for (int i = 0; i < N / 16; ++i) {
      uint4 x = static_cast<const uint4*>(from)[i];
      to[4 * i] = x.x, to[4 * i + 1] = x.y, to[4 * i + 2] = x.z, to[4 * i + 3] = x.w;
    }
  }
}

template <int N>
ADAMFUSED_HD void store_bytes(void* to, const uint32_t* from) {
  static_assert(N == 4 || N == 8 || N % 16 == 0, "");
  if constexpr (N == 4) *static_cast<uint32_t*>(to) = from[0];
  if constexpr (N == 8) *static_cast<uint2*>(to) = make_uint2(from[0], from[1]);
  if constexpr (N >= 16) {
    ADAMFUSED_UNROLL
    for (int i = 0; i < N / 16; ++i)
      static_cast<uint4*>(to)[i] = make_uint4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
  }
}

// E numbers of a part, as they rest. Loading and converting are two passes over the parts, so that all loads are
// under way before the first is waited for. What is wider than T (a float64 gradient) is converted at once.
template <class T, int E>
struct Packed {
  uint32_t word[E * sizeof(T) / 4];

  template <class Format>
  __device__ __forceinline__ void load(const void* data, int64_t at) {
    using Rest = typename Format::Rest;
    const Rest* from = static_cast<const Rest*>(data) + at;
    if constexpr (sizeof(Rest) <= sizeof(T)) {
      load_bytes<E * sizeof(Rest)>(from, word);
    } else {
      T x[E];
      ADAMFUSED_UNROLL
      for (int i = 0; i < E; ++i) x[i] = T(Format::get(from[i]));
      __builtin_memcpy(word, x, sizeof word);
    }
  }
  template <class Format>
  __device__ __forceinline__ void get(T* x) const {
    using Rest = typename Format::Rest;
    if constexpr (sizeof(Rest) <= sizeof(T)) {
      Rest rest[E];
      __builtin_memcpy(rest, word, sizeof rest);
      ADAMFUSED_UNROLL
      for (int i = 0; i < E; ++i) x[i] = T(Format::get(rest[i]));
    } else {
      __builtin_memcpy(x, word, sizeof word);
    }
  }
  template <class Format>
  __device__ __forceinline__ static void store(const T* x, void* data, int64_t at) {
    using Rest = typename Format::Rest;
    Rest rest[E];
    Rest* to = static_cast<Rest*>(data) + at;
    ADAMFUSED_UNROLL
    for (int i = 0; i < E; ++i) rest[i] = Format::put(x[i]);
    if constexpr (sizeof(Rest) == 8) {  // by way of words, nvcc 13.0 stores some of the doubles in pieces
      ADAMFUSED_UNROLL
      for (int i = 0; i < E / 2; ++i)
        reinterpret_cast<double2*>(to)[i] = make_double2(double(rest[2 * i]), double(rest[2 * i + 1]));
    } else {
      uint32_t words[E * sizeof(Rest) / 4];
      __builtin_memcpy(words, rest, sizeof rest);
      store_bytes<E * sizeof(Rest)>(to, words);
    }
  }
};

// The formats of a part are known at run time only, but are the same for a whole tile: a branch that no warp splits
// on. It keeps the number of kernels at rules, not rules x formats^parts.
#define ADAMFUSED_CASE_LOAD(F, ...)    \
  case FormatId::F:                    \
    packed.template load<F>(data, at); \
    return;
#define ADAMFUSED_CASE_GET(F, ...) \
  case FormatId::F:                \
    packed.template get<F>(x);     \
    return;
#define ADAMFUSED_CASE_STORE(F, ...)              \
  case FormatId::F:                               \
    Packed<T, E>::template store<F>(x, data, at); \
    return;
#define ADAMFUSED_CASE_GET_ONE(F, ...) \
  case FormatId::F:                    \
    return T(F::get(static_cast<const F::Rest*>(data)[at]));
#define ADAMFUSED_CASE_PUT_ONE(F, ...)           \
  case FormatId::F:                              \
    static_cast<F::Rest*>(data)[at] = F::put(x); \
    return;

template <class T, int E>
__device__ __forceinline__ void load(FormatId format, const void* data, int64_t at, Packed<T, E>& packed) {
  switch (format) { ADAMFUSED_FORMATS(ADAMFUSED_CASE_LOAD) }
}
template <class T, int E>
__device__ __forceinline__ void get(FormatId format, const Packed<T, E>& packed, T* x) {
  switch (format) { ADAMFUSED_FORMATS(ADAMFUSED_CASE_GET) }
}
template <class T, int E>
__device__ __forceinline__ void store(FormatId format, const T* x, void* data, int64_t at) {
  switch (format) { ADAMFUSED_FORMATS(ADAMFUSED_CASE_STORE) }
}
template <class T>
__device__ __forceinline__ T get_one(FormatId format, const void* data, int64_t at) {
  switch (format) { ADAMFUSED_FORMATS(ADAMFUSED_CASE_GET_ONE) }
  return T(0);
}
template <class T>
__device__ __forceinline__ void put_one(FormatId format, T x, void* data, int64_t at) {
  switch (format) { ADAMFUSED_FORMATS(ADAMFUSED_CASE_PUT_ONE) }
}

template <class Rule>
__device__ Rule prepare_on_device(const Recipe& recipe, const float* step, const double* factor) {
  typename Rule::Hyper hyper;
  __builtin_memcpy(&hyper, recipe.hyper, sizeof hyper);
  double lr = recipe.lr;
  if (recipe.lr_on_device != nullptr)
    lr = recipe.lr_is_double ? *static_cast<const double*>(recipe.lr_on_device)
                             : double(*static_cast<const float*>(recipe.lr_on_device));
  const double t = step != nullptr ? double(*step) : recipe.t;
  return Rule::prepare(hyper, {lr, t, factor != nullptr ? *factor : 1.0, recipe.ema_decay});
}

// A gradient that was scaled up overflowed: the step is not made.
template <class Rule>
__device__ bool overflowed(const Arguments<Rule>& job) {
  return job.found_inf != nullptr && *job.found_inf != 0.0f;
}

// Before the step: the counts that lie on the device move on by one.
template <class Rule>
__global__ void advance_kernel(const __grid_constant__ Arguments<Rule> job) {
  int s = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (s < job.count && job.entry[s].step != nullptr && !overflowed(job)) *job.entry[s].step += 1.0f;
}

template <class Rule, class T, int E>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ Arguments<Rule> job) {
  constexpr int parts = Arguments<Rule>::parts;
  constexpr int tile_size = kThreads * E * kRounds;
  __shared__ Rule made;
  if (overflowed(job)) return;

  for (uint32_t tile = blockIdx.x; tile < job.first_tile[job.count]; tile += gridDim.x) {
    int s = 0, high = job.count;  // the last entry whose first tile is not past this one
    while (high - s > 1) {
      int middle = (s + high) / 2;
      if (job.first_tile[middle] <= tile)
        s = middle;
      else
        high = middle;
    }
    const auto& entry = job.entry[s];
    const bool made_here = entry.step != nullptr || job.factor != nullptr;
    if (made_here) {
      __syncthreads();  // the tile before may still read `made`
      if (threadIdx.x == 0) made = prepare_on_device<Rule>(job.ready[entry.recipe].recipe, entry.step, job.factor);
      __syncthreads();
    }
    const Rule rule = made_here ? made : job.ready[entry.recipe].rule;

    const int64_t start = int64_t(tile - job.first_tile[s]) * tile_size;
    const int n = int(entry.numel - start < tile_size ? entry.numel - start : tile_size);
    const int body = entry.aligned ? n / E * E : 0;
    for (int i = int(threadIdx.x) * E; i < body; i += kThreads * E) {
      Packed<T, E> packed[parts];
      Elements<Rule, T, E> x;
      ADAMFUSED_UNROLL
      for (int k = 0; k < parts; ++k) load(entry.format[k], entry.data[k], start + i, packed[k]);
      ADAMFUSED_UNROLL
      for (int k = 0; k < parts; ++k) get(entry.format[k], packed[k], x.part(k));
      x.move_by(rule);
      ADAMFUSED_UNROLL
      for (int k = 0; k < parts; ++k)
        if (k != kGrad) store<T, E>(entry.format[k], x.part(k), entry.data[k], start + i);
      if (entry.data[parts] != nullptr) store<T, E>(entry.format[parts], x.p, entry.data[parts], start + i);
    }
    for (int i = body + int(threadIdx.x); i < n; i += kThreads) {
      Elements<Rule, T, 1> x;
      ADAMFUSED_UNROLL
      for (int k = 0; k < parts; ++k) *x.part(k) = get_one<T>(entry.format[k], entry.data[k], start + i);
      x.move_by(rule);
      ADAMFUSED_UNROLL
      for (int k = 0; k < parts; ++k)
        if (k != kGrad) put_one<T>(entry.format[k], *x.part(k), entry.data[k], start + i);
      if (entry.data[parts] != nullptr) put_one<T>(entry.format[parts], *x.p, entry.data[parts], start + i);
    }
  }
}

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused
