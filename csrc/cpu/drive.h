// The loop over tiles on a CPU. Each instruction set's file defines ADAMFUSED_TARGET and
// ADAMFUSED_VECTOR, the bytes of its widest vector, and includes this.
#pragma once

#include "cpu/isa.h"
#include "cpu/lines.h"

namespace adamfused {
namespace ADAMFUSED_TARGET {

// What is worked on, as T.
template <class T, class Rule>
struct Parts {
  T* p;
  const T* g;
  T* s[kRoom<Rule>];
};

template <class T>
Vector<T> load(const T* from) {
  Vector<T> x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

template <class T>
void store(Vector<T> x, T* to) {
  __builtin_memcpy(to, &x, sizeof x);
}

constexpr int kCacheLine = 64;  // bytes

// A cache line of every part: all is read before anything is written. Large tensors begin at the same place
// of a page, and some first-level caches cannot hold such lines side by side (AMD's tell ways apart by a few bits of
// the address); going back and forth between halves of lines would fetch each one twice.
template <class T, class Rule, class Copy>
inline void move_line(const Rule& rule, const Parts<T, Rule>& at, int64_t i, const Copy& copy) {
  constexpr int vectors = kCacheLine / ADAMFUSED_VECTOR, lanes = ADAMFUSED_VECTOR / sizeof(T);
  Vector<T> p[vectors], g[vectors], s[kRoom<Rule>][vectors];
  for (int j = 0; j < vectors; ++j) g[j] = load(at.g + i + j * lanes);
  for (int j = 0; j < vectors; ++j) p[j] = load(at.p + i + j * lanes);
  for (int k = 0; k < Rule::states; ++k)
    for (int j = 0; j < vectors; ++j) s[k][j] = load(at.s[k] + i + j * lanes);
  for (int j = 0; j < vectors; ++j) move(rule, p, g, s, j);
  for (int k = 0; k < Rule::states; ++k)
    for (int j = 0; j < vectors; ++j) store(s[k][j], at.s[k] + i + j * lanes);
  for (int j = 0; j < vectors; ++j) store(p[j], at.p + i + j * lanes);
  copy.line(p, i);
}

// What becomes of the new parameters besides.
struct NoCopy {
  template <class Floats>
  void line(const Floats*, int64_t) const {}
  template <class T>
  void rest(const T*, int64_t, int) const {}
};

// A copy in another format, past the caches if it is large.
template <class Format>
struct CopyOut {
  typename Format::Rest* to;
  bool past_caches;

  void line(const Float* p, int64_t i) const {
    constexpr int vectors = kCacheLine / ADAMFUSED_VECTOR;
    Word word[vectors];
    for (int j = 0; j < vectors; ++j) word[j] = Format::narrow(bits_of(p[j]));
    if (!past_caches) return store_in_order(word, to + i);
    alignas(64) typename Format::Rest line[kCacheLine / sizeof(float)];
    store_in_order(word, line);
    stream(to + i, line, sizeof line);
  }
  void rest(const float* p, int64_t i, int left) const { put_floats<Format>({to, nullptr, 0, 0, 0, 0}, i, left, p); }
};

// Whether plain numbers are asked for ahead of time. With AVX-512 they are not: on Zen 4, the only such processor that
// this was measured on, SGD then runs 3 to 9 % faster. Formats, which take more instructions, are asked for there too.
constexpr bool kAsksForPlain = ADAMFUSED_VECTOR < 64;

template <class T, class Rule, class Copy = NoCopy>
void move_lines(const Rule rule, const Parts<T, Rule> at, int64_t n, const Copy copy = {}) {
  constexpr int line = kCacheLine / sizeof(T);
  int64_t i = 0;
  for (; i + line <= n; i += line) {
    if constexpr (kAsksForPlain) {
      constexpr int ahead = kAhead / sizeof(T);
      ask_for(at.g + i + ahead), ask_for(at.p + i + ahead);
      for (int k = 0; k < Rule::states; ++k) ask_for(at.s[k] + i + ahead);
    }
    move_line(rule, at, i, copy);
  }
  const size_t left = size_t(n - i);
  if (left == 0) return;
  constexpr int room = line > kLine ? line : kLine;  // what is copied out is read by lines
  T p[room] = {}, g[line] = {}, s[kRoom<Rule>][line] = {};
  __builtin_memcpy(p, at.p + i, left * sizeof(T));
  __builtin_memcpy(g, at.g + i, left * sizeof(T));
  Parts<T, Rule> rest{p, g, {}};
  for (int k = 0; k < Rule::states; ++k) {
    __builtin_memcpy(s[k], at.s[k] + i, left * sizeof(T));
    rest.s[k] = s[k];
  }
  move_line(rule, rest, 0, NoCopy{});
  copy.rest(p, i, int(left));
  __builtin_memcpy(at.p + i, p, left * sizeof(T));
  for (int k = 0; k < Rule::states; ++k) __builtin_memcpy(at.s[k] + i, s[k], left * sizeof(T));
}

// ---- formats that are known when this is compiled: from memory to registers and back ----

template <int parts>
struct Places {
  Place part[parts];
};

// Moves the numbers from `begin` to `end`, and gives where it stopped.
template <class Rule>
using MoveAs = int64_t (*)(Rule, const Places<kState + Rule::states>, int64_t begin, int64_t end);

#ifdef ADAMFUSED_PAIRS  // what runs anywhere need not be fast

// The code that a rule's k-th state has.
template <class Rule, int k>
auto code_of() {
  if constexpr ((Rule::never_negative >> k & 1) != 0)
    return UnsignedCode{};
  else
    return SignedCode{};
}
template <class Rule, int k>
using CodeOf = decltype(code_of<Rule, k>());

// Moves the numbers from `begin` to `end`, whole lines, of parts in these formats. Gives where it stopped. By value, so
// that what is written cannot be thought to change it.
template <class P, class G, class S, bool usual, class Rule>
int64_t move_as(Rule rule, const Places<kState + Rule::states> all, int64_t begin, int64_t end) {
  constexpr int states = Rule::states, room = kRoom<Rule>;
  if constexpr (usual) rule.take_as_usual();
  const Place* const place = all.part;
  const auto* g_rest = place[kGrad].rest<G>(0);
  auto* p_rest = place[kParam].rest<P>(0);
  auto* p_beside = place[kParam].below<P>(0);
  Words words = place[kParam].words(begin);
  for (int64_t i = begin; i < end; i += kLine) {
    Float p[kVectors], g[kVectors], s[room][kVectors];
    ask_for_line(g_rest + i), ask_for_line(p_rest + i);
    if constexpr (is_joined<P>) ask_for_line(p_beside + i);
    load_line<G>(g_rest + i, nullptr, 0, g);
    load_line<P>(p_rest + i, is_joined<P> ? p_beside + i : nullptr, 0, p);
    for (int k = 0; k < states; ++k) {
      const auto* rest = place[kState + k].rest<S>(i);
      ask_for_line(rest);
      load_line<S>(rest, nullptr, 0, s[k]);
    }
    for (int j = 0; j < kVectors; ++j) move(rule, p, g, s, j);
    for (int k = 0; k < states; ++k) store_line<S>(s[k], words, place[kState + k].rest<S>(i), nullptr);
    store_line<P>(p, words, p_rest + i, is_joined<P> ? p_beside + i : nullptr);
  }
  return end;
}

// The work on the j-th states of each kind.
template <class Rule, int Room, class Work>
ADAMFUSED_INLINE auto on_states(Float (&s)[Room][kVectors], int j, Work work) {
  static_assert(Rule::states <= 3, "");
  if constexpr (Rule::states == 1) return work(s[0][j]);
  if constexpr (Rule::states == 2) return work(s[0][j], s[1][j]);
  if constexpr (Rule::states == 3) return work(s[0][j], s[1][j], s[2][j]);
}

// The same where all states are codes, from a whole block on. Stops before a block that has codes of numbers that are
// not finite. What becomes of a block's states is kept until all of it is known, and then made into codes. Weights that
// can wait do: by then nothing that they need is under way, and there are codes to make while the processor divides.
template <class P, class G, class Rule>
int64_t move_codes(Rule rule, const Places<kState + Rule::states> all, int64_t begin, int64_t end) {
  constexpr int states = Rule::states;
  constexpr bool wait = waits<Rule>;
  rule.take_as_usual();
  const Place* const place = all.part;
  alignas(64) float kept[states][kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = int(end - at < kBlock ? end - at : kBlock);
    const auto* g_rest = place[kGrad].rest<G>(at);
    auto* p_rest = place[kParam].rest<P>(at);
    auto* p_beside = place[kParam].below<P>(at);
    Words words = place[kParam].words(at);
    float scale[states];
    bool marked = false;
    for (int k = 0; k < states; ++k) {
      scale[k] = *place[kState + k].below<SignedCode>(at);
      marked |= is_marked(scale[k]);
    }
    if (marked) return at;

    Word top[states] = {};
    for (int i = 0; i < n; i += kLine) {
      Float p[kVectors], g[kVectors], s[states][kVectors];
      ask_for_line(g_rest + i), ask_for_line(p_rest + i);
      if constexpr (is_joined<P>) ask_for_line(p_beside + i);
      load_line<G>(g_rest + i, nullptr, 0, g);
      if constexpr (!wait) load_line<P>(p_rest + i, is_joined<P> ? p_beside + i : nullptr, 0, p);
      for_each<0, states>([&](auto index) {
        constexpr int k = index.value;
        const auto* rest = place[kState + k].rest<CodeOf<Rule, k>>(at) + i;
        ask_for_line(rest);
        load_line<CodeOf<Rule, k>, true>(rest, nullptr, scale[k], s[k]);
      });
      for (int j = 0; j < kVectors; ++j) {
        if constexpr (wait)
          on_states<Rule>(s, j, [&](auto&... state) { rule.gather(rule.seen(Float{}, g[j]), state...); });
        else
          move(rule, p, g, s, j);
      }
      for_each<0, states>([&](auto index) {
        constexpr int k = index.value;
        for (int j = 0; j < kVectors; ++j) {
          const Word b = bits_of(s[k][j]);  // a sign where there is none is more than any magnitude
          top[k] = larger(top[k], CodeOf<Rule, k>::kSigned ? b & kMagnitude : b);
          store(s[k][j], kept[k] + i + j * kWords);
        }
      });
      if constexpr (!wait) store_line<P>(p, words, p_rest + i, is_joined<P> ? p_beside + i : nullptr);
    }

    // What is not finite, or above the top code of the largest scale, is for store_block: store_codes then writes
    // something that does not stay.
    bool plain = true;
    for_each<0, states>([&](auto index) {
      constexpr int k = index.value;
      using Format = CodeOf<Rule, k>;
      const uint32_t largest = largest_of(top[k]);
      plain &= largest < kMostScale;
      scale[k] = largest < kMostScale ? Format::scale_for(largest, true) : scale_of_block<Format>(kept[k], n);
      *place[kState + k].below<Format>(at) = scale[k];
    });
    const Dither dither = place[kState].dither(at);
    for (int i = 0; i < n; i += kLine) {
      Float g[kVectors], s[states][kVectors], p[kVectors], moves[kVectors];
      for (int k = 0; k < states; ++k)
        for (int j = 0; j < kVectors; ++j) s[k][j] = load(kept[k] + i + j * kWords);
      if constexpr (wait) {
        load_line<G>(g_rest + i, nullptr, 0, g);
        for (int j = 0; j < kVectors; ++j)
          moves[j] =
              on_states<Rule>(s, j, [&](auto... state) { return rule.update(rule.seen(Float{}, g[j]), state...); });
      }
      for_each<0, states>([&](auto index) {
        constexpr int k = index.value;
        store_codes<CodeOf<Rule, k>>(s[k], scale[k], dither.line(i), place[kState + k].rest<CodeOf<Rule, k>>(at) + i);
      });
      if constexpr (wait) {
        auto* const beside = is_joined<P> ? p_beside + i : nullptr;
        load_line<P, true>(p_rest + i, beside, 0, p);
        for (int j = 0; j < kVectors; ++j) p[j] = rule.moved(p[j], moves[j]);
        if (is_joined<P> && __builtin_expect(any_nan(bits_of(p[0]), bits_of(p[1])), false)) {
          load_line<P>(p_rest + i, beside, 0, p);
          for (int j = 0; j < kVectors; ++j) p[j] = rule.moved(p[j], moves[j]);
          store_line<P>(p, words, p_rest + i, beside);
        } else {
          store_line<P, true>(p, words, p_rest + i, beside);
        }
      }
    }
    if (__builtin_expect(!plain, false))
      for_each<0, states>([&](auto index) {
        constexpr int k = index.value;
        store_block<CodeOf<Rule, k>>(kept[k], n, scale[k], dither, place[kState + k].rest<CodeOf<Rule, k>>(at));
      });
  }
  return end;
}

// The one for a span's formats, or null. Only the usual ones are made, because each takes its time to compile: the
// others go by way of buffers. `rare`: also for a rule that is not usual.
template <class P, class G, bool rare, bool bytes_too, class Rule>
MoveAs<Rule> with_states(const FormatId* state, bool usual) {
  bool floats = true, bf16 = true, codes = true;
  for (int k = 0; k < Rule::states; ++k) {
    floats &= state[k] == FormatId::F32;
    bf16 &= state[k] == FormatId::BF16;
    codes &= state[k] == (Rule::never_negative >> k & 1 ? FormatId::UnsignedCode : FormatId::SignedCode);
  }
  if constexpr (!same<P, F32>)
    if (floats && usual) return move_as<P, G, F32, true, Rule>;
  if constexpr (rare && !Rule::averages)
    if (floats && !usual) return move_as<P, G, F32, false, Rule>;
  if constexpr (bytes_too && !Rule::averages && Rule::states > 0) {
    if (bf16 && usual) return move_as<P, G, BF16, true, Rule>;
    if (codes && usual) return move_codes<P, G, Rule>;
  }
  return nullptr;
}

template <class Rule>
MoveAs<Rule> way_to_move(const Span& span, bool usual) {
  const FormatId p = span.format[kParam], g = span.format[kGrad], *s = span.format + kState;
  if (g == FormatId::F32) return p == FormatId::F32 ? with_states<F32, F32, false, true, Rule>(s, usual) : nullptr;
  if (g == FormatId::F16) return p == FormatId::F16 ? with_states<F16, F16, false, false, Rule>(s, usual) : nullptr;
  if (g != FormatId::BF16) return nullptr;
  if (p == FormatId::BF16) return with_states<BF16, BF16, true, true, Rule>(s, usual);
  if (p == FormatId::Split16) return with_states<Split16, BF16, true, true, Rule>(s, usual);
  if (p == FormatId::Split8) return with_states<Split8, BF16, false, true, Rule>(s, usual);
  return nullptr;
}
#endif

constexpr int kAheadTensors = 4;
constexpr int64_t kLarge = 4096;  // tiles: more than caches hold, so that what is not read again need not stay there

template <class Rule, class T>
void run(const Job& job, int64_t begin, int64_t end) {
  constexpr int parts = kState + Rule::states;
  alignas(64) T buffer[parts][kStretch];
  T* at[parts];
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
    const int64_t last = job.first_tile[s + 1] < end ? job.first_tile[s + 1] : end;
    const int64_t first = (tile - job.first_tile[s]) * kTile, tiled = (last - job.first_tile[s]) * kTile;
    const int64_t past = tiled < span.numel ? tiled : span.numel;
    tile = last;
    if (s + kAheadTensors < job.count)  // a small tensor is over before the processor has seen where the next one lies
      for (int i = 0; i < parts; ++i) __builtin_prefetch(job.spans[s + kAheadTensors].data[i]);

    bool in_place = true;
    for (int i = 0; i < parts; ++i) in_place &= span.format[i] == as_is<T>;
    auto move_some = [&](int64_t n, auto... copy) {
      Parts<T, Rule> all{at[kParam], at[kGrad], {}};
      for (int k = 0; k < Rule::states; ++k) all.s[k] = at[kState + k];
      move_lines(rule, all, n, copy...);
    };
    if (in_place && !span.data[kCopy]) {
      for (int i = 0; i < parts; ++i) at[i] = static_cast<T*>(span.data[i]) + first;
      move_some(past - first);
      continue;
    }
    if constexpr (same<T, float>)
      if (in_place && span.format[kCopy] == FormatId::BF16) {
        for (int i = 0; i < parts; ++i) at[i] = static_cast<T*>(span.data[i]) + first;
        BF16::Rest* const to = static_cast<BF16::Rest*>(span.data[kCopy]) + first;
        move_some(past - first, CopyOut<BF16>{to, large && reinterpret_cast<uintptr_t>(to) % 16 == 0});
        continue;
      }
    Places<parts> places;
    Place* const place = places.part;
    for (int i = 0; i < parts; ++i) {
      void* const beside = i == kParam ? span.data[kMaster] : i == kGrad ? nullptr : span.data[kScale + i - kState];
      place[i] = {span.data[i], beside, span.key, span.t, span.first, i};
    }
    MoveAs<Rule> move_as = nullptr;
#ifdef ADAMFUSED_PAIRS
    if constexpr (same<T, float>)
      if (!span.data[kCopy]) move_as = way_to_move<Rule>(span, rule.is_usual());
#endif
    const int64_t lines = first + (past - first) / kLine * kLine,
                  whole = lines == past ? past : lines / kBlock * kBlock;
    for (int64_t start = first; start < past;) {
      if (move_as && start < whole) start = move_as(rule, places, start, whole);
      if (start == past) break;
      const int most = move_as ? kBlock : kStretch, n = int(past - start < most ? past - start : most);
      for (int i = 0; i < parts; ++i) at[i] = get<T>(span.format[i], place[i], start, n, buffer[i]);
      move_some(n);
      for (int i = 0; i < parts; ++i)
        if (i != kGrad) put<T>(span.format[i], place[i], start, n, at[i]);
      if (span.data[kCopy])
        copy_out<T>(span.format[kCopy], {span.data[kCopy], nullptr, 0, 0, 0, 0}, start, n, at[kParam], large);
      start += n;
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
