// The loop over tiles on a CPU. Each instruction set's file defines ADAMFUSED_TARGET and
// ADAMFUSED_VECTOR, the bytes of its widest vector, and includes this.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

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

// Bytes to memory past the caches, which need not read the lines first nor keep them. `to` is a multiple of 16.
inline void stream(void* to, const void* from, size_t bytes) {
  size_t i = 0;
#ifdef __SSE2__
  const __m128i* x = static_cast<const __m128i*>(from);
  for (; i + 16 <= bytes; i += 16) _mm_stream_si128(static_cast<__m128i*>(to) + i / 16, _mm_load_si128(x + i / 16));
#endif
  __builtin_memcpy(static_cast<char*>(to) + i, static_cast<const char*>(from) + i, bytes - i);
}

// Before other threads may read what was streamed.
inline void end_of_stream() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// The numbers of a part, written to a tensor of any format.
template <class T>
void copy_out(FormatId format, void* data, int64_t at, int n, const T* from, bool past_caches) {
  switch (format) {
#define ADAMFUSED_CASE(F, ...)                                                                        \
  case FormatId::F: {                                                                                 \
    F::Rest* to = static_cast<F::Rest*>(data) + at;                                                   \
    if (!past_caches || reinterpret_cast<uintptr_t>(to) % 16 != 0) return put_all<T, F>(from, n, to); \
    alignas(64) F::Rest rest[kTile];                                                                  \
    put_all<T, F>(from, n, rest);                                                                     \
    return stream(to, rest, size_t(n) * sizeof rest[0]);                                              \
  }
    ADAMFUSED_FORMATS(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
  }
}

// What comes is asked for this many bytes ahead. The processor's own prefetching ends with each page of memory, and a
// rule has so many instructions that the next page is not in sight when it does.
constexpr int kAhead = 512;

// The format of a part that rests as the number that the rule computes with.
template <class T>
struct AsIs {
  using Rest = T;
};

// As many numbers as a vector of T's holds, from memory and back.
template <class T, class Format>
Vector<T> load(const typename Format::Rest* from) {
  if constexpr (same<Format, AsIs<T>>) {
    Vector<T> x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
  } else {
    Vector<uint32_t> word;
    for (size_t i = 0; i < sizeof word / sizeof word[0]; ++i) word[i] = from[i];
    return float_of(Format::widen(word));
  }
}

template <class T, class Format>
void store(Vector<T> x, typename Format::Rest* to) {
  if constexpr (same<Format, AsIs<T>>) {
    __builtin_memcpy(to, &x, sizeof x);
  } else {
    Vector<uint32_t> word = Format::narrow(bits_of(x));
    for (size_t i = 0; i < sizeof word / sizeof word[0]; ++i) to[i] = uint16_t(word[i]);
  }
}

// What is worked on: the parameter and the gradient as they rest, the states as T.
template <class T, class P, class G, int S>
struct Parts {
  typename P::Rest* p;
  const typename G::Rest* g;
  T* s[S];
};

// One line (64 bytes of T) of every part: all is read before anything is written. Large tensors begin at the same place
// of a page, and some first-level caches cannot hold such lines side by side (AMD's tell ways apart by a few bits of
// the address); going back and forth between halves of lines would fetch each one twice.
template <class T, class P, class G, class Rule>
inline void move_line(const Rule& rule, const Parts<T, P, G, Rule::states>& at, int64_t i) {
  constexpr int vectors = 64 / ADAMFUSED_VECTOR, lanes = ADAMFUSED_VECTOR / sizeof(T);
  Vector<T> p[vectors], g[vectors], s[Rule::states][vectors];
  for (int j = 0; j < vectors; ++j) g[j] = load<T, G>(at.g + i + j * lanes);
  for (int j = 0; j < vectors; ++j) p[j] = load<T, P>(at.p + i + j * lanes);
  for (int k = 0; k < Rule::states; ++k)
    for (int j = 0; j < vectors; ++j) s[k][j] = load<T, AsIs<T>>(at.s[k] + i + j * lanes);
  for (int j = 0; j < vectors; ++j) move(rule, p, g, s, j);
  for (int k = 0; k < Rule::states; ++k)
    for (int j = 0; j < vectors; ++j) store<T, AsIs<T>>(s[k][j], at.s[k] + i + j * lanes);
  for (int j = 0; j < vectors; ++j) store<T, P>(p[j], at.p + i + j * lanes);
}

inline void ask_for(const void* x) { __builtin_prefetch(static_cast<const char*>(x) + kAhead); }

template <class T, class P, class G, class Rule>
void move_lines(const Rule rule, const Parts<T, P, G, Rule::states> at, int n) {
  constexpr int line = 64 / sizeof(T);
  int i = 0;
  for (; i + line <= n; i += line) {
    ask_for(at.g + i), ask_for(at.p + i);
    for (int k = 0; k < Rule::states; ++k) ask_for(at.s[k] + i);
    move_line(rule, at, i);
  }
  const size_t left = n - i;
  if (left == 0) return;
  typename P::Rest p[line] = {};
  typename G::Rest g[line] = {};
  T s[Rule::states][line] = {};
  __builtin_memcpy(p, at.p + i, left * sizeof p[0]);
  __builtin_memcpy(g, at.g + i, left * sizeof g[0]);
  Parts<T, P, G, Rule::states> rest{p, g, {}};
  for (int k = 0; k < Rule::states; ++k) {
    __builtin_memcpy(s[k], at.s[k] + i, left * sizeof(T));
    rest.s[k] = s[k];
  }
  move_line(rule, rest, 0);
  __builtin_memcpy(at.p + i, p, left * sizeof p[0]);
  for (int k = 0; k < Rule::states; ++k) __builtin_memcpy(at.s[k] + i, s[k], left * sizeof(T));
}

constexpr int kAheadTensors = 4;
constexpr int64_t kLarge = 4096;  // tiles: more than caches hold, so that what is not read again need not stay there

template <class Rule, class T>
void run(const Job& job, int64_t begin, int64_t end) {
  constexpr int parts = kState + Rule::states;
  alignas(64) T buffer[parts][kTile];
  T* at[kSlots] = {};
  const Rule* rules = static_cast<const Rule*>(job.rules);

  const bool large = job.first_tile[job.count] >= kLarge;
  int64_t low = 0, high = job.count;  // the span that holds tile `begin`: the last whose first tile is not past it
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    (job.first_tile[middle] <= begin ? low : high) = middle;
  }
  for (int64_t s = low, tile = begin; tile < end; ++s) {
    const Span& span = job.spans[s];
    const Rule rule = rules[span.recipe];
    int64_t last = job.first_tile[s + 1] < end ? job.first_tile[s + 1] : end;
    void* const copy = span.data[parts];
    // Parameters and gradients of these formats go to registers and back; any other than T goes by way of a buffer, and
    // so do those that a copy is made of.
    auto is = [&](FormatId format) {
      return sizeof(T) == sizeof(float) && !copy && span.format[kParam] == format && span.format[kGrad] == format;
    };
    if (s + kAheadTensors < job.count)  // a small tensor is over before the processor has seen where the next one lies
      for (int i = 0; i < parts; ++i) __builtin_prefetch(job.spans[s + kAheadTensors].data[i]);
    for (; tile < last; ++tile) {
      int64_t start = (tile - job.first_tile[s]) * kTile;
      int n = int(span.numel - start < kTile ? span.numel - start : kTile);
      for (int i = kState; i < parts; ++i) at[i] = get<T>(span.format[i], span.data[i], start, n, buffer[i]);
      auto move_as = [&](auto p_format, auto g_format, auto* p, const auto* g) {
        Parts<T, decltype(p_format), decltype(g_format), Rule::states> all{p, g, {}};
        for (int k = 0; k < Rule::states; ++k) all.s[k] = at[kState + k];
        move_lines(rule, all, n);
      };
      auto as_they_rest = [&](auto format) {
        using Format = decltype(format);
        auto* p = static_cast<typename Format::Rest*>(span.data[kParam]) + start;
        auto* g = static_cast<const typename Format::Rest*>(span.data[kGrad]) + start;
        if constexpr (sizeof(T) == sizeof(float)) move_as(format, format, p, g);
      };
      if (is(FormatId::BF16)) {
        as_they_rest(BF16{});
      } else if (is(FormatId::F16)) {
        as_they_rest(F16{});
      } else {
        for (int i = 0; i < kState; ++i) at[i] = get<T>(span.format[i], span.data[i], start, n, buffer[i]);
        move_as(AsIs<T>{}, AsIs<T>{}, at[kParam], at[kGrad]);
        put<T>(span.format[kParam], span.data[kParam], start, n, at[kParam]);
        if (copy) copy_out<T>(span.format[parts], copy, start, n, at[kParam], large);
      }
      for (int i = kState; i < parts; ++i) put<T>(span.format[i], span.data[i], start, n, at[i]);
    }
  }
  if (large) end_of_stream();
}

#define ADAMFUSED_ROW(Rule, ...)                         \
  {{run<Rule<float>, float>, run<Rule<double>, double>}, \
   {run<Averaged<Rule, float>, float>, run<Averaged<Rule, double>, double>}},
#define ADAMFUSED_TABLE {ADAMFUSED_RULES(ADAMFUSED_ROW)}

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused
