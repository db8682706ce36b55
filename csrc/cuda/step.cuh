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

// Kernel arguments may take 32,764 bytes since CUDA 12.1, 4,096 before. And in a graph: drivers, at least those of
// 2024, crash where more are captured (https://github.com/openxla/xla/pull/19252), which is why torch does not either.
constexpr bool kKnowsLarge = CUDART_VERSION >= 12010;
template <bool large>
constexpr int kArgumentBytes = large ? 32764 : 4096;
template <bool large>
constexpr int kTable = large ? 64 : 8;

// What an entry has besides for formats that are not plain.
template <class Rule, bool stored>
struct Besides {};
template <class Rule>
struct Besides<Rule, true> {
  void* master;
  float* scale[kRoom<Rule>];
  Source random;  // its t where the step count is on the host
};

// What an entry has besides for rules that carry a number.
template <bool any>
struct Carrying {};
template <>
struct Carrying<true> {
  float* carried;
};

template <class Rule, bool stored, bool large>
struct Arguments {
  static constexpr int parts = kState + Rule::states;
  struct Entry : Besides<Rule, stored>, Carrying<Carried<typename Rule::Hyper>::any> {
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
  static constexpr int entries =
      int((kArgumentBytes<large> - kTable<large> * sizeof(Ready) - 32) / (sizeof(Entry) + 4));

  Entry entry[entries];
  Ready ready[kTable<large>];
  uint32_t first_tile[entries + 1];
  int32_t count;
  const double* factor;    // as in Job
  const float* found_inf;  // likewise
};

// E numbers of all parts: parameter, gradient, states.
template <class Rule, class T, int E>
struct Elements {
  T p[E], g[E], s[kRoom<Rule>][E];

  __device__ __forceinline__ T (&part(int k)) [E] {
    return k == kParam ? p : k == kGrad ? g : s[k - kState];
  } __device__ __forceinline__ void move_by(const Rule& rule) {
    ADAMFUSED_UNROLL
    for (int i = 0; i < E; ++i) move(rule, p, g, s, i);
  }
};

template <class Rule, class Entry>
__device__ Rule prepare_on_device(const Recipe& recipe, const Entry& entry, const double* factor) {
  using Hyper = typename Rule::Hyper;
  double lr = recipe.lr;
  if (recipe.lr_on_device != nullptr)
    lr = recipe.lr_is_double ? *static_cast<const double*>(recipe.lr_on_device)
                             : double(*static_cast<const float*>(recipe.lr_on_device));
  const double t = entry.step != nullptr ? double(*entry.step) : recipe.t;
  double carried = recipe.carried;
  if constexpr (Carried<Hyper>::any)
    if (entry.step != nullptr) carried = double(*entry.carried);
  return Rule::prepare(hyper_of<Hyper>(recipe.hyper),
                       {lr, t, factor != nullptr ? *factor : 1.0, recipe.ema_decay, carried});
}

// A gradient that was scaled up overflowed: the step is not made.
template <class Arguments>
__device__ bool overflowed(const Arguments& job) {
  return job.found_inf != nullptr && *job.found_inf != 0.0f;
}

// Before the step: the counts that lie on the device move on by one, and what is carried beside them moves with them.
template <class Rule, bool stored, bool large>
__global__ void advance_kernel(const __grid_constant__ Arguments<Rule, stored, large> job) {
  int s = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (s >= job.count || job.entry[s].step == nullptr || overflowed(job)) return;
  const auto& entry = job.entry[s];
  *entry.step += 1.0f;
  using With = Carried<typename Rule::Hyper>;
  if constexpr (With::any) {
    const auto hyper = hyper_of<typename Rule::Hyper>(job.ready[entry.recipe].recipe.hyper);
    *entry.carried = float(With::after(hyper, double(*entry.step), double(*entry.carried)));
  }
}

// To fit two blocks into a multiprocessor where a few registers are missing, the compiler would spill; one is enough.
template <class Rule, class T, int E, bool stored, bool large>
__global__ void __launch_bounds__(kThreads, 1) step_kernel(const __grid_constant__ Arguments<Rule, stored, large> job) {
  constexpr int parts = kState + Rule::states;
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
      if (threadIdx.x == 0) made = prepare_on_device<Rule>(job.ready[entry.recipe].recipe, entry, job.factor);
      __syncthreads();
    }
    const Rule rule = made_here ? made : job.ready[entry.recipe].rule;

    const int64_t start = int64_t(tile - job.first_tile[s]) * tile_size<E>;
    const int n = int(entry.numel - start < tile_size<E> ? entry.numel - start : tile_size<E>);
    Source random{};
    if constexpr (stored) {
      random = entry.random;
      if (entry.step != nullptr) random.t = uint32_t(*entry.step);
    }
    constexpr int warp = kWarp * E;  // the numbers of one, which stays together
    for (int i = int(threadIdx.x) * E; i / warp * warp < n; i += kThreads * E) {
      const Places<E> at(start, n, entry.aligned, i);
      Packed<T, E> packed[parts], master;
      float scale[parts] = {};
      for_each<0, parts>([&](auto k) {
        as_rest<Rule, T, E, stored, k.value>(entry.format[k.value], [&](auto rest) {
          packed[k.value].template load<decltype(rest)>(entry.data[k.value], at);
        });
      });
      if constexpr (stored) {
        as_beside(entry.format[kParam], [&](auto beside) { master.template load<decltype(beside)>(entry.master, at); });
        for_each<kState, parts>([&](auto k) {
          const float* scales = entry.scale[k.value - kState];
          if (scales != nullptr && at.has(0)) scale[k.value] = scales[at.block()];
        });
      }

      Elements<Rule, T, E> x;
      for_each<0, parts>([&](auto k) {
        get<Rule, stored, k.value>(entry.format[k.value], packed[k.value], master, scale[k.value], x.part(k.value));
      });
      x.move_by(rule);

      for_each<0, parts>([&](auto k) {
        if constexpr (k.value != kGrad) {
          const FormatId format = entry.format[k.value];
          scale[k.value] = put<Rule, stored, k.value>(format, x.part(k.value), random, at, packed[k.value], master);
          as_rest<Rule, T, E, stored, k.value>(
              format, [&](auto rest) { packed[k.value].template store<decltype(rest)>(entry.data[k.value], at); });
        }
      });
      if constexpr (stored) {
        as_beside(entry.format[kParam],
                  [&](auto beside) { master.template store<decltype(beside)>(entry.master, at); });
        for_each<kState, parts>([&](auto k) {
          float* scales = entry.scale[k.value - kState];
          if (scales != nullptr && at.leads()) scales[at.block()] = scale[k.value];
        });
      }
      if (entry.data[parts] != nullptr) {
        put<Rule, stored, kCopy>(entry.format[parts], x.p, random, at, packed[kParam], master);
        as_rest<Rule, T, E, stored, kCopy>(entry.format[parts], [&](auto rest) {
          packed[kParam].template store<decltype(rest)>(entry.data[parts], at);
        });
      }
    }
  }
}

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused
