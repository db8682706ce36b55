// The loop over tiles on a CPU. Each instruction set's file defines ADAMFUSED_TARGET and
// ADAMFUSED_VECTOR, the bytes of its widest vector, and includes this.
#pragma once

#include "cpu/isa.h"

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

// What comes is asked for this many bytes ahead. The processor's own prefetching ends with each page of memory, and a
// rule has so many instructions that the next page is not in sight when it does.
constexpr int kAhead = 512;

// One line (64 bytes of T) of every part: all is read before anything is written. Large tensors begin at the same place
// of a page, and some first-level caches cannot hold such lines side by side (AMD's tell ways apart by a few bits of
// the address); going back and forth between halves of lines would fetch each one twice.
template <class T, class Rule>
inline void move_line(const Rule& rule, T* const* part, int64_t at) {
  typedef T Vector __attribute__((vector_size(ADAMFUSED_VECTOR)));
  typedef T Anywhere __attribute__((vector_size(ADAMFUSED_VECTOR), aligned(sizeof(T)), may_alias));
  constexpr int parts = kState + Rule::states, vectors = 64 / ADAMFUSED_VECTOR, lanes = ADAMFUSED_VECTOR / sizeof(T);
  Vector x[kSlots][vectors];
  for (int k = 0; k < parts; ++k)
    for (int j = 0; j < vectors; ++j) x[k][j] = *reinterpret_cast<const Anywhere*>(part[k] + at + j * lanes);
  for (int j = 0; j < vectors; ++j) {
    Vector &p = x[kParam][j], &g = x[kGrad][j], &a = x[kState][j], &b = x[kState + 1][j], &c = x[kState + 2][j];
    if constexpr (Rule::states == 1) rule(p, g, a);
    if constexpr (Rule::states == 2) rule(p, g, a, b);
    if constexpr (Rule::states == 3) rule(p, g, a, b, c);
  }
  for (int k = 0; k < parts; ++k)
    if (k != kGrad)
      for (int j = 0; j < vectors; ++j) *reinterpret_cast<Anywhere*>(part[k] + at + j * lanes) = x[k][j];
}

template <class T, class Rule>
void move_lines(const Rule rule, int n, T* const* where) {
  constexpr int parts = kState + Rule::states, line = 64 / sizeof(T);
  T* part[parts];
  for (int k = 0; k < parts; ++k) part[k] = where[k];
  int i = 0;
  for (; i + line <= n; i += line) {
    for (int k = 0; k < parts; ++k) __builtin_prefetch(reinterpret_cast<const char*>(part[k] + i) + kAhead);
    move_line(rule, part, i);
  }
  if (i == n) return;
  T rest[parts][line];
  T* at[parts];
  for (int k = 0; k < parts; ++k) {
    at[k] = rest[k];
    for (int j = 0; j < line; ++j) rest[k][j] = T(0);
    __builtin_memcpy(rest[k], part[k] + i, (n - i) * sizeof(T));
  }
  move_line(rule, at, 0);
  for (int k = 0; k < parts; ++k)
    if (k != kGrad) __builtin_memcpy(part[k] + i, rest[k], (n - i) * sizeof(T));
}

constexpr int kAheadTensors = 4;

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
    if (s + kAheadTensors < job.count)  // a small tensor is over before the processor has seen where the next one lies
      for (int i = 0; i < parts; ++i) __builtin_prefetch(job.spans[s + kAheadTensors].data[i]);
    for (; tile < last; ++tile) {
      int64_t start = (tile - job.first_tile[s]) * kTile;
      int n = int(span.numel - start < kTile ? span.numel - start : kTile);
      for (int i = 0; i < parts; ++i) at[i] = get<T>(span.format[i], span.data[i], start, n, buffer[i]);
      move_lines<T>(rule, n, at);
      for (int i = 0; i < parts; ++i)
        if (i != kGrad) put<T>(span.format[i], span.data[i], start, n, at[i]);
    }
  }
}

#define ADAMFUSED_ROW(Rule, ...) {run<Rule, float>, run<Rule, double>},
#define ADAMFUSED_TABLE {ADAMFUSED_RULES(ADAMFUSED_ROW)}

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused
