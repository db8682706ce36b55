// A CPU's way from numbers as they rest to vectors of floats and back. Included by drive.h.
#pragma once

#include "cpu/words.h"

namespace adamfused {
namespace ADAMFUSED_TARGET {

// What comes is asked for this many bytes ahead, or numbers that rest in another format. The processor's own
// prefetching ends with each page of memory, and a rule has so many instructions that the next page is not in sight
// when it does.
constexpr int kAhead = 512, kNumbersAhead = 256;

// The empty statement keeps GCC, which takes prefetching for doing nothing, from leaving out the whole call.
ADAMFUSED_INLINE void ask_for(const void* x) {
  asm volatile("");
  __builtin_prefetch(x);
}

// All of a line that is to come.
template <class Rest>
ADAMFUSED_INLINE void ask_for_line(const Rest* x) {
  for (size_t at = 0; at < kLine * sizeof(Rest); at += 64)
    ask_for(reinterpret_cast<const char*>(x + kNumbersAhead) + at);
}

// The random words of lines that follow one another.
class Words {
 public:
  Words(uint32_t key, uint32_t index) {
    Word place;
    for (int i = 0; i < kWords; ++i) place[i] = place_of(i);
    next_ = counter_at(place + index, key);
  }
  // Those of a line's j-th vector.
  Word of(int j) const { return word_of(next_ + uint32_t(j) * kVectorStep * kGolden); }
  void next_line() { next_ += uint32_t(kLine) * kGolden; }

 private:
  Word next_;
};

// What the codes of a block are dithered by.
class Dither {
 public:
  Dither(uint32_t key, uint32_t index) {
    Word place;
    for (int i = 0; i < kWords; ++i) place[i] = place_of(i);
    for (int i = 0; i < kPhases / kWords; ++i)
      words_[i] = dither_at(place + (index + i / kVectors * kLine + i % kVectors * kVectorStep), key);
  }
  // The line that begins with the block's i-th number.
  const Word* line(int i) const { return words_ + i % kPhases / kWords; }

 private:
  Word words_[kPhases / kWords];
};
static_assert(kPhases % kLine == 0 && kBlock % kPhases == 0, "");

ADAMFUSED_INLINE uint32_t largest_of(Word x) {
  uint32_t largest = 0;
  for (int i = 0; i < kWords; ++i) largest = larger(largest, x[i]);
  return largest;
}

// A line of floats from a part as it rests. `scale` is that of codes. `plain`: these are of finite numbers, and what is
// in two parts is not NaN.
template <class Format, bool plain = false>
ADAMFUSED_INLINE void load_line(const typename Format::Rest* rest, const typename Format::Beside* beside, float scale,
                                Float* x) {
  constexpr bool upper =
      same<Format, BF16> || same<Format, BF16AtRandom> || same<Format, Split16> || same<Format, Split8>;
  Word word[kVectors], below[kVectors];
#ifdef ADAMFUSED_PAIRS
  if constexpr (is_code<Format> && plain) return load_codes<Format>(rest, scale, x);
  if constexpr (same<Format, Split16>) {
    load_split16<plain>(rest, beside, word);
    for (int j = 0; j < kVectors; ++j) x[j] = float_of(word[j]);
    return;
  }
#endif
  if constexpr (upper)
    load_upper_words(rest, word);
  else
    load_words(rest, word);
  if constexpr (is_joined<Format>) load_words(beside, below);
  for (int j = 0; j < kVectors; ++j) {
    if constexpr (same<Format, F32> || (upper && !is_joined<Format>))
      x[j] = float_of(word[j]);
    else if constexpr (is_code<Format>)
      x[j] = float_of(plain ? Format::decode_finite(word[j], scale) : Format::decode(word[j], scale));
    else if constexpr (is_joined<Format>)
      x[j] = float_of(Format::join(word[j], below[j]));
    else
      x[j] = float_of(Format::widen(word[j]));
  }
}

template <class Format, bool plain = false>
ADAMFUSED_INLINE void store_line(const Float* x, Words& words, typename Format::Rest* rest,
                                 typename Format::Beside* beside) {
  Word word[kVectors], below[kVectors];
#ifdef ADAMFUSED_PAIRS
  if constexpr (same<Format, Split16>) {
    for (int j = 0; j < kVectors; ++j) word[j] = bits_of(x[j]);
    return store_split16<plain>(word, rest, beside);
  }
#endif
  for (int j = 0; j < kVectors; ++j) {
    const Word b = bits_of(x[j]);
    if constexpr (same<Format, F32>)
      word[j] = b;
    else if constexpr (is_joined<Format>)
      Format::part(b, word[j], below[j]);
    else if constexpr (at_random<Format>)
      word[j] = Format::narrow_at_random(b, words.of(j));
    else
      word[j] = Format::narrow(b);
  }
  if constexpr (at_random<Format>) words.next_line();
  store_words(word, rest);
  if constexpr (same<Format, Split16>)
    store_words(below, reinterpret_cast<uint16_t*>(beside));
  else if constexpr (same<Format, Split8>)
    store_words(below, reinterpret_cast<uint8_t*>(beside));
  else if constexpr (is_joined<Format>)
    store_words(below, beside);
}

// Of a block of floats.
template <class Format>
__attribute__((noinline)) float scale_of_block(const float* numbers, int n) {
  Word largest{}, special{};
  for (int i = 0; i < n; i += kWords) {
    Word b;
    __builtin_memcpy(&b, numbers + i, sizeof b);
    const Word magnitude = b & kMagnitude;
    largest = larger(largest, is_finite(magnitude) ? magnitude : 0u);
    special |= is_finite(magnitude) ? 0u : magnitude;
  }
  uint32_t any = 0;
  for (int i = 0; i < kWords; ++i) any |= special[i];
  return Format::scale_for(largest_of(largest), any == 0);
}

// A block of floats to codes. The floats lie in the order in which lines are in vectors.
template <class Format>
ADAMFUSED_INLINE void store_block(const float* from, int n, float scale, const Dither& dither,
                                  typename Format::Rest* rest) {
  for (int i = 0; i < n; i += kLine) {
    Word b[kVectors], code[kVectors];
    for (int j = 0; j < kVectors; ++j) __builtin_memcpy(b + j, from + i + j * kWords, sizeof *b);
    for (int j = 0; j < kVectors; ++j) code[j] = Format::encode(b[j], scale, dither.line(i)[j]);
    store_words(code, rest + i);
  }
}

// Where a part lies, and what its random words depend on.
struct Place {
  void* data;
  void* beside;
  uint32_t key, t, first;
  int slot;

  template <class Format>
  typename Format::Rest* rest(int64_t at) const {
    return static_cast<typename Format::Rest*>(data) + at;
  }
  template <class Format>
  typename Format::Beside* below(int64_t at) const {
    return static_cast<typename Format::Beside*>(beside) + (is_code<Format> ? at / kBlock : at);
  }
  Words words(int64_t at) const { return Words(key_of(key, t, slot), first + uint32_t(at)); }
  // Of the block that begins there.
  Dither dither(int64_t at) const { return Dither(key_of_dither(key, t), first + uint32_t(at)); }
};

// ---- any format, not known before the step ----

constexpr int kStretch = 256;  // numbers that are converted at once: whole blocks
static_assert(kTile % kStretch == 0 && kStretch % kBlock == 0 && kBlock % kLine == 0, "");

template <class Format>
void get_lines(const typename Format::Rest* rest, const typename Format::Beside* beside, int n, float* to) {
  for (int i = 0; i < n; i += kLine) {
    ask_for_line(rest + i);
    float scale = 0;
    if constexpr (is_code<Format>) scale = beside[i / kBlock];
    Float x[kVectors];
    load_line<Format>(rest + i, is_joined<Format> ? beside + i : beside, scale, x);
    Word word[kVectors];
    for (int j = 0; j < kVectors; ++j) word[j] = bits_of(x[j]);
    store_words(word, to + i);
  }
}

template <class Format>
void put_lines(const float* from, int n, const Place& place, int64_t at, typename Format::Rest* rest,
               typename Format::Beside* beside) {
  Words words = place.words(at);
  constexpr int each = is_code<Format> ? kBlock : kLine;
  for (int i = 0; i < n; i += each) {
    if constexpr (is_code<Format>) {
      const int some = n - i < kBlock ? n - i : kBlock;
      alignas(64) float kept[kBlock];
      for (int j = 0; j < some; j += kLine) {
        Word b[kVectors];
        load_words(from + i + j, b);
        for (int k = 0; k < kVectors; ++k) __builtin_memcpy(kept + j + k * kWords, b + k, sizeof *b);
      }
      const float scale = beside[i / kBlock] = scale_of_block<Format>(kept, some);
      store_block<Format>(kept, some, scale, place.dither(at + i), rest + i);
    } else {
      Float x[kVectors];
      Word word[kVectors];
      load_words(from + i, word);
      for (int j = 0; j < kVectors; ++j) x[j] = float_of(word[j]);
      store_line<Format>(x, words, rest + i, is_joined<Format> ? beside + i : beside);
    }
  }
}

// Runs `work` on whole lines: on a copy, with zeros behind, where n numbers are not.
template <class Format, class Work>
void on_lines(const Place& place, int64_t at, int n, bool back, Work work) {
  using Rest = typename Format::Rest;
  using Beside = typename Format::Beside;
  Rest* rest = place.rest<Format>(at);
  Beside* beside = place.below<Format>(at);
  if (n % kLine == 0) return work(rest, beside, n);
  const int lines = (n + kLine - 1) / kLine * kLine;
  Rest padded[kStretch] = {};
  __builtin_memcpy(padded, rest, size_t(n) * sizeof(Rest));
  if constexpr (is_joined<Format>) {
    Beside padded_beside[kStretch] = {};
    __builtin_memcpy(padded_beside, beside, size_t(n) * sizeof(Beside));
    work(padded, padded_beside, lines);
    if (back) __builtin_memcpy(beside, padded_beside, size_t(n) * sizeof(Beside));
  } else {
    work(padded, beside, lines);
  }
  if (back) __builtin_memcpy(rest, padded, size_t(n) * sizeof(Rest));
}

template <class Format>
__attribute__((noinline)) void get_floats(const Place& place, int64_t at, int n, float* to) {
  if constexpr (same<Format, F64>) {
    for (int i = 0; i < n; ++i) to[i] = float(place.rest<F64>(at)[i]);
  } else {
    on_lines<Format>(place, at, n, false,
                     [to](auto* rest, auto* beside, int lines) { get_lines<Format>(rest, beside, lines, to); });
  }
}

template <class Format>
__attribute__((noinline)) void put_floats(const Place& place, int64_t at, int n, const float* from) {
  if constexpr (same<Format, F64>) {
    for (int i = 0; i < n; ++i) place.rest<F64>(at)[i] = double(from[i]);
  } else {
    on_lines<Format>(place, at, n, true, [&](auto* rest, auto* beside, int lines) {
      put_lines<Format>(from, lines, place, at, rest, beside);
    });
  }
}

template <class T>
inline constexpr FormatId as_is = same<T, float> ? FormatId::F32 : FormatId::F64;

// Where the numbers of a part can be worked on: in place if they rest as T, else in `buffer`, which has room for whole
// lines.
template <class T>
T* get(FormatId format, const Place& place, int64_t at, int n, T* buffer) {
  if (format == as_is<T>) return static_cast<T*>(place.data) + at;
  alignas(64) float floats[kStretch];
  float* to = floats;
  if constexpr (same<T, float>) to = buffer;
  switch (format) {
#define ADAMFUSED_CASE(F, ...)       \
  case FormatId::F:                  \
    get_floats<F>(place, at, n, to); \
    break;
    ADAMFUSED_FORMATS(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
  }
  if constexpr (!same<T, float>)
    for (int i = 0; i < n; ++i) buffer[i] = T(floats[i]);
  return buffer;
}

template <class T>
void put(FormatId format, const Place& place, int64_t at, int n, const T* from) {
  if (format == as_is<T>) {
    T* to = static_cast<T*>(place.data) + at;
    if (to != from) __builtin_memcpy(to, from, size_t(n) * sizeof(T));
    return;
  }
  alignas(64) float floats[kStretch] = {};
  const float* numbers = floats;  // whole lines are read
  if constexpr (same<T, float>)
    if (n % kLine == 0) numbers = from;
  if (numbers == floats)
    for (int i = 0; i < n; ++i) floats[i] = float(from[i]);
  switch (format) {
#define ADAMFUSED_CASE(F, ...) \
  case FormatId::F:            \
    return put_floats<F>(place, at, n, numbers);
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

// The numbers of a part, written to a copy of it.
template <class T>
void copy_out(FormatId format, const Place& copy, int64_t at, int n, const T* from, bool past_caches) {
  const size_t size = size_of(format);
  char* to = static_cast<char*>(copy.data) + size_t(at) * size;
  if (!past_caches || reinterpret_cast<uintptr_t>(to) % 16 != 0) return put<T>(format, copy, at, n, from);
  alignas(64) char rest[kStretch * sizeof(double)];
  put<T>(format, {rest, nullptr, 0, 0, 0, 0}, 0, n, from);
  stream(to, rest, size_t(n) * size);
}

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused
