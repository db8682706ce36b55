// The loop over tiles on a CPU. Each instruction set's file defines ADAMFUSED_TARGET and includes this.
#pragma once

#include "cpu/isa.h"
#include "tile.h"

namespace adamfused {
namespace ADAMFUSED_TARGET {

template <class T, class Format>
void get_all(const typename Format::Rest* ADAMFUSED_RESTRICT from, int n, T* ADAMFUSED_RESTRICT to) {
  for (int i = 0; i < n; ++i) to[i] = T(Format::get(from[i]));
}

template <class T, class Format>
void put_all(const T* ADAMFUSED_RESTRICT from, int n, typename Format::Rest* ADAMFUSED_RESTRICT to) {
  for (int i = 0; i < n; ++i) to[i] = Format::put(from[i]);
}

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// Where the numbers of a part can be worked on: in place if they rest as T, else in `buffer`.
template <class T>
T* get(FormatId format, void* data, int64_t at, int n, T* buffer) {
  switch (format) {
#define ADAMFUSED_CASE(F, ...)                        \
  case FormatId::F: {                                 \
    F::Rest* rest = static_cast<F::Rest*>(data) + at; \
    if constexpr (same<F::Rest, T>)                   \
      return rest;                                    \
    else                                              \
      return get_all<T, F>(rest, n, buffer), buffer;  \
  }
    ADAMFUSED_FORMATS(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
  }
  return buffer;
}

template <class T>
void put(FormatId format, void* data, int64_t at, int n, const T* from) {
  switch (format) {
#define ADAMFUSED_CASE(F, ...)                                                                 \
  case FormatId::F:                                                                            \
    if constexpr (!same<F::Rest, T>) put_all<T, F>(from, n, static_cast<F::Rest*>(data) + at); \
    return;
    ADAMFUSED_FORMATS(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
  }
}

constexpr int kAhead = 4;  // tensors

template <template <class> class Rule, class T>
void run(const Job& job, int64_t begin, int64_t end) {
  constexpr int parts = kState + Rule<T>::states;
  alignas(64) T buffer[parts][kTile];
  T* at[kSlots] = {};
  const Rule<T>* rules = static_cast<const Rule<T>*>(job.rules);

  int64_t low = 0, high = job.count;  // the span that holds tile `begin`: the last whose first tile is not past it
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    (job.first_tile[middle] <= begin ? low : high) = middle;
  }
  for (int64_t s = low, tile = begin; tile < end; ++s) {
    const Span& span = job.spans[s];
    const Rule<T> rule = rules[span.recipe];
    int64_t last = job.first_tile[s + 1] < end ? job.first_tile[s + 1] : end;
    if (s + kAhead < job.count)  // a small tensor is over before the processor has seen where the next one lies
      for (int i = 0; i < parts; ++i) __builtin_prefetch(job.spans[s + kAhead].data[i]);
    for (; tile < last; ++tile) {
      int64_t start = (tile - job.first_tile[s]) * kTile;
      int n = int(span.numel - start < kTile ? span.numel - start : kTile);
      for (int i = 0; i < parts; ++i) at[i] = get<T>(span.format[i], span.data[i], start, n, buffer[i]);
      move_tile(rule, n, at[kParam], at[kGrad], at[kState], at[kState + 1], at[kState + 2]);
      for (int i = 0; i < parts; ++i)
        if (i != kGrad) put<T>(span.format[i], span.data[i], start, n, at[i]);
    }
  }
}

#define ADAMFUSED_ROW(Rule, ...) {run<Rule, float>, run<Rule, double>},
#define ADAMFUSED_TABLE {ADAMFUSED_RULES(ADAMFUSED_ROW)}

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused
