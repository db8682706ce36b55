// The CUDA kernels. A launch carries a table of tensors as kernel arguments; each block takes tiles of it in turn:
// get -> rule -> put, on E elements a thread, with 16-byte accesses where the tensors are aligned.
#pragma once

#include "cuda/packed.cuh"

namespace adamfused {
namespace ADAMFUSED_TARGET {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kRounds = 4;  // times a thread goes round within a tile
template <int E>
constexpr int tile_size = kThreads * E * kRounds;

// Kernel arguments may take 32,764 bytes since CUDA 12.1, 4,096 before.
#if CUDART_VERSION >= 12010
constexpr int kArgumentBytes = 32764;
constexpr int kTable = 64;
#else
constexpr int kArgumentBytes = 4096;
constexpr int kTable = 8;
#endif

template <class Rule, bool coded>
struct Arguments {
  static constexpr int parts = kState + Rule::states, besides = coded ? 1 + Rule::states : 1;
  struct Entry {
    void* data[parts + 1];  // the copy last
    void* beside[besides];  // the parameter, and each state
    float* step;
    uint32_t last;  // numbers in the last tile
    uint32_t key, t, first;
    FormatId format[parts + 1];
    uint8_t place : 7;  // in `ready`
    uint8_t aligned : 1;

    __device__ __forceinline__ void* master() const { return beside[0]; }
    __device__ __forceinline__ float* scales(int part) const {
      return coded && part >= kState ? static_cast<float*>(beside[1 + part - kState]) : nullptr;
    }
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

// E numbers of all parts: parameter, gradient, states.
template <class Rule, class T, int E>
struct Elements {
  T p[E], g[E], s[Rule::states][E];

  __device__ __forceinline__ T (&part(int k)) [E] {
    return k == kParam ? p : k == kGrad ? g : s[k - kState];
  } __device__ __forceinline__ void move_by(const Rule& rule) {
    ADAMFUSED_UNROLL
    for (int i = 0; i < E; ++i) move(rule, p, g, s, i);
  }
};

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
template <class Arguments>
__device__ bool overflowed(const Arguments& job) {
  return job.found_inf != nullptr && *job.found_inf != 0.0f;
}

// Before the step: the counts that lie on the device move on by one.
template <class Rule, bool coded>
__global__ void advance_kernel(const __grid_constant__ Arguments<Rule, coded> job) {
  int s = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (s < job.count && job.entry[s].step != nullptr && !overflowed(job)) *job.entry[s].step += 1.0f;
}

template <class Rule, class T, int E, bool coded>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ Arguments<Rule, coded> job) {
  constexpr int parts = kState + Rule::states, least = coded ? 1 : 16 / E;
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
      if (threadIdx.x == 0) made = prepare_on_device<Rule>(job.ready[entry.place].recipe, entry.step, job.factor);
      __syncthreads();
    }
    const Rule rule = made_here ? made : job.ready[entry.place].rule;

    const int64_t start = int64_t(tile - job.first_tile[s]) * tile_size<E>;
    const int n = tile + 1 == job.first_tile[s + 1] ? int(entry.last) : tile_size<E>;
    const uint32_t t = entry.step != nullptr ? uint32_t(*entry.step) : entry.t;
    constexpr int warp = kWarp * E;  // the numbers of one, which stays together
    for (int i = int(threadIdx.x) * E; i / warp * warp < n; i += kThreads * E) {
      const Places<E> at(start, n, entry.aligned, i);

      Packed<T, E> packed[parts], master;
      float scale[parts] = {};
      Elements<Rule, T, E> x;
      ADAMFUSED_UNROLL
      for (int k = 0; k < parts; ++k) packed[k].template load<least, 8>(size_of(entry.format[k]), entry.data[k], at);
      if (entry.master() != nullptr) master.template load<1, 4>(size_beside(entry.format[kParam]), entry.master(), at);
      ADAMFUSED_UNROLL
      for (int k = kState; k < parts; ++k)
        if (entry.scales(k) != nullptr && at.has(0)) scale[k] = entry.scales(k)[at.block()];
      ADAMFUSED_UNROLL
      for (int k = 0; k < parts; ++k) get<Rule, coded>(entry.format[k], k, packed[k], master, scale[k], x.part(k));
      x.move_by(rule);
      ADAMFUSED_UNROLL
      for (int k = 0; k < parts; ++k) {
        if (k == kGrad) continue;
        scale[k] = put<Rule, coded>(entry.format[k], x.part(k), {entry.key, t, entry.first, k}, at, packed[k], master);
        packed[k].template store<least, 8>(size_of(entry.format[k]), entry.data[k], at);
        if (entry.scales(k) != nullptr && at.leads()) entry.scales(k)[at.block()] = scale[k];
      }
      if (entry.master() != nullptr) master.template store<1, 4>(size_beside(entry.format[kParam]), entry.master(), at);
      if (entry.data[parts] != nullptr) {
        put<Rule, coded>(entry.format[parts], x.p, {0, 0, 0, kCopy}, at, packed[kParam], master);
        packed[kParam].template store<least, 8>(size_of(entry.format[parts]), entry.data[parts], at);
      }
    }
  }
}

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused
