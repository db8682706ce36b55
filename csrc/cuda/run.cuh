// Packs jobs into launches.
#pragma once

#include "cuda/step.h"

#include <vector>

#include "cuda/launch.cuh"
#include "cuda/step.cuh"

namespace adamfused {
namespace cuda {

// What a job has of formats.
struct Formats {
  bool stored = false;   // any that is not plain
  size_t narrowest = 8;  // bytes

  Formats(const Job& job, int parts) {
    for (int64_t s = 0; s < job.count; ++s) {
      const Span& span = job.spans[s];
      for (int k = 0; k < parts; ++k) see(span.format[k]);
      if (span.data[kCopy] != nullptr) see(span.format[kCopy]);
    }
  }
  void see(FormatId format) {
    switch (format) {
#define ADAMFUSED_CASE(F, ...)       \
  case FormatId::F:                  \
    stored = stored || !is_plain<F>; \
    break;
      ADAMFUSED_FORMATS(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
    }
    narrowest = size_of(format) < narrowest ? size_of(format) : narrowest;
  }
};

template <class Rule, class T, int E, bool stored, bool large>
cudaError_t launch(const Arguments<Rule, stored, large>& arguments, bool advance, cudaStream_t stream) {
  if (advance) {
    const uint32_t blocks = uint32_t(arguments.count + kThreads - 1) / kThreads;
    const cudaError_t error = start(advance_kernel<Rule, stored, large>, blocks, kThreads, stream, arguments);
    if (error != cudaSuccess) return error;
  }
  const uint32_t tiles = arguments.first_tile[arguments.count];
  if (tiles == 0) return cudaSuccess;  // only empty tensors; an empty grid would be an error
  const uint32_t blocks = tiles < 0x7fffffffu ? tiles : 0x7fffffffu;
  return start(step_kernel<Rule, T, E, stored, large>, blocks, kThreads, stream, arguments);
}

template <class Rule, class T, int E, bool stored, bool large>
cudaError_t run(const Job& job, cudaStream_t stream) {
  using Args = Arguments<Rule, stored, large>;
  constexpr int64_t tile = tile_size<E>;
  static_assert(sizeof(Args) <= kArgumentBytes<large>, "kernel arguments are limited");
  Args arguments;  // up to 32 KB of stack
  int32_t last = 0;
  for (int64_t i = 0; i < job.count; ++i) last = job.spans[i].recipe > last ? job.spans[i].recipe : last;
  std::vector<int32_t> place(size_t(last) + 1, -1);  // from Job::rules to Arguments::ready
  std::vector<int32_t> recipe_place(place);          // from Job::recipes
  std::vector<int32_t> used, recipe_used;
  int ready = 0;
  bool advance = false;
  arguments.count = 0;
  arguments.first_tile[0] = 0;
  arguments.factor = job.factor, arguments.found_inf = job.found_inf;

  auto flush = [&]() {
    cudaError_t error =
        arguments.count == 0 ? cudaSuccess : launch<Rule, T, E, stored, large>(arguments, advance, stream);
    for (int32_t i : used) place[size_t(i)] = -1;
    for (int32_t i : recipe_used) recipe_place[size_t(i)] = -1;
    used.clear(), recipe_used.clear();
    ready = 0, advance = false, arguments.count = 0;
    return error;
  };

  for (int64_t s = 0; s < job.count; ++s) {
    const Span& span = job.spans[s];
    if (span.numel == 0 && span.step == nullptr) continue;  // an empty tensor takes no slot, unless its count must move
    uint64_t tiles = uint64_t((span.numel + tile - 1) / tile);
    bool full = arguments.count == Args::entries || ready == kTable<large> ||
                arguments.first_tile[arguments.count] + tiles > 0xffffffffull;
    if (full)
      if (cudaError_t error = flush(); error != cudaSuccess) return error;

    const bool made_there = span.step != nullptr || job.factor != nullptr;
    int32_t& slot = (made_there ? recipe_place : place)[size_t(span.recipe)];
    if (slot < 0) {
      slot = ready++;
      (made_there ? recipe_used : used).push_back(span.recipe);
      if (made_there)
        arguments.ready[slot].recipe = job.recipes[span.recipe];
      else
        arguments.ready[slot].rule = static_cast<const Rule*>(job.rules)[span.recipe];
    }
    auto& entry = arguments.entry[arguments.count];
    for (int k = 0; k < Args::parts; ++k) entry.data[k] = span.data[k], entry.format[k] = span.format[k];
    entry.data[Args::parts] = span.data[kCopy], entry.format[Args::parts] = span.format[kCopy];
    if constexpr (stored) {
      entry.master = span.data[kMaster];
      for (int k = 0; k < Rule::states; ++k) entry.scale[k] = static_cast<float*>(span.data[kScale + k]);
      entry.random = {span.key, span.t, span.first};
    }
    entry.numel = span.numel;
    entry.step = span.step;
    if constexpr (Carried<typename Rule::Hyper>::any) entry.carried = span.carried;
    entry.recipe = slot;
    entry.aligned = span.aligned;
    advance |= span.step != nullptr;
    arguments.first_tile[arguments.count + 1] = arguments.first_tile[arguments.count] + uint32_t(tiles);
    ++arguments.count;
  }
  return flush();
}

template <class RuleOfFloat, class RuleOfDouble>
cudaError_t run_in(const Job& job, cudaStream_t stream) {
  if (kKnowsLarge && takes_large_arguments(stream)) {  // an older nvcc must not come to see such kernels
    if (job.in_double) return run<RuleOfDouble, double, 4, true, kKnowsLarge>(job, stream);
    const Formats formats(job, kState + RuleOfFloat::states);
    if (formats.stored) return run<RuleOfFloat, float, 8, true, kKnowsLarge>(job, stream);
    return formats.narrowest < 4 ? run<RuleOfFloat, float, 8, false, kKnowsLarge>(job, stream)
                                 : run<RuleOfFloat, float, 4, false, kKnowsLarge>(job, stream);
  }
  // The kernels of every format are enough.
  return job.in_double ? run<RuleOfDouble, double, 4, true, false>(job, stream)
                       : run<RuleOfFloat, float, 8, true, false>(job, stream);
}

// One file compiles the rules, and another the rules with an average of the weights, side by side.
cudaError_t run_averaged(const Job& job, cudaStream_t stream);

}  // namespace cuda
}  // namespace adamfused
