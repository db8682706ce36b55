// The words of a line from memory and back, in as few instructions as each instruction set allows. Included by lines.h.
#pragma once

#include "formats.h"
#include "job.h"

#define ADAMFUSED_INLINE inline __attribute__((always_inline))

namespace adamfused {
namespace ADAMFUSED_TARGET {

using Word = Vector<uint32_t>;
using Float = Vector<float>;

#if (ADAMFUSED_VECTOR == 32 && defined(__AVX2__)) || (ADAMFUSED_VECTOR == 64 && defined(__AVX512BW__))
#define ADAMFUSED_PAIRS  // lines of two vectors, worked on as 16-bit numbers where that takes half of the instructions
#endif

// A line is what is loaded before anything is stored.
constexpr int kWords = ADAMFUSED_VECTOR / 4;
#ifdef ADAMFUSED_PAIRS
constexpr int kLine = 2 * kWords;
#else
constexpr int kLine = 16;
#endif
constexpr int kVectors = kLine / kWords;

// The words of a line, from the low ends of what rests. Of a pair, the first vector has the numbers 0-3, 8-11 and so
// on, the second the others, because to interleave and to pack within parts of 16 bytes is several times faster than
// across them.
#ifdef ADAMFUSED_PAIRS
constexpr uint32_t place_of(int i) { return uint32_t(i % 4 + i / 4 * 8); }
constexpr uint32_t kVectorStep = 4;

using Short = Vector<uint16_t>;  // all of a line
typedef int16_t SignedShort __attribute__((vector_size(ADAMFUSED_VECTOR)));
ADAMFUSED_INLINE Short smaller(Short a, Short b) { return a < b ? a : b; }
ADAMFUSED_INLINE Short larger(Short a, Short b) { return a > b ? a : b; }

#if ADAMFUSED_VECTOR == 32
using Bits = __m256i;
ADAMFUSED_INLINE Bits interleave_low(Bits a, Bits b) { return _mm256_unpacklo_epi16(a, b); }
ADAMFUSED_INLINE Bits interleave_high(Bits a, Bits b) { return _mm256_unpackhi_epi16(a, b); }
// Words to the numbers of a line; what does not fit becomes the nearest that does.
ADAMFUSED_INLINE Short pack(Word a, Word b) { return (Short)_mm256_packus_epi32((Bits)a, (Bits)b); }
// Their upper or lower halves.
ADAMFUSED_INLINE Short uppers(Word a, Word b) { return pack(a >> 16, b >> 16); }
ADAMFUSED_INLINE Short lowers(Word a, Word b) { return pack(a & 0xffffu, b & 0xffffu); }
// What is above all but three bits of a float's mantissa.
ADAMFUSED_INLINE Short tops(Word a, Word b) { return pack(a >> kShift, b >> kShift); }
// a - b, or 0 if that is less.
ADAMFUSED_INLINE Short above(Short a, Short b) { return (Short)_mm256_subs_epu16((Bits)a, (Bits)b); }
// Low bytes, the bits of a mask from a, the others from b.
ADAMFUSED_INLINE Short chosen(uint8_t mask, Short a, Short b) {
  return (a & uint16_t(mask)) | (b & uint16_t(uint8_t(~mask)));
}
ADAMFUSED_INLINE bool any_nan(Word a, Word b) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)) != 0;
}
ADAMFUSED_INLINE __m128i load_128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
ADAMFUSED_INLINE Short load_bytes(const uint8_t* from) { return (Short)_mm256_cvtepu8_epi16(load_128(from)); }
ADAMFUSED_INLINE Short load_bytes(const int8_t* from) { return (Short)_mm256_cvtepi8_epi16(load_128(from)); }
ADAMFUSED_INLINE void store_bytes(Short x, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packus_epi16(_mm256_castsi256_si128((Bits)x), _mm256_extracti128_si256((Bits)x, 1)));
}
ADAMFUSED_INLINE void load_words(const float* from, Word* word) {
  for (int j = 0; j < 2; ++j)
    word[j] =
        (Word)_mm256_inserti128_si256(_mm256_castsi128_si256(load_128(from + 4 * j)), load_128(from + 4 * j + 8), 1);
}
ADAMFUSED_INLINE void store_words(const Word* word, float* to) {
  for (int j = 0; j < 2; ++j) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * j), _mm256_castsi256_si128((Bits)word[j]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * j + 8), _mm256_extracti128_si256((Bits)word[j], 1));
  }
}
// 16 words that are in the order of memory.
ADAMFUSED_INLINE void store_in_order(const Word* word, uint16_t* to) {
  const Bits x = _mm256_permute4x64_epi64((Bits)pack(word[0], word[1]), 0xd8);
  __builtin_memcpy(to, &x, sizeof x);
}
#else
using Bits = __m512i;
ADAMFUSED_INLINE Bits interleave_low(Bits a, Bits b) { return _mm512_unpacklo_epi16(a, b); }
ADAMFUSED_INLINE Bits interleave_high(Bits a, Bits b) { return _mm512_unpackhi_epi16(a, b); }
ADAMFUSED_INLINE Short pack(Word a, Word b) { return (Short)_mm512_packus_epi32((Bits)a, (Bits)b); }
// The halves of two vectors in the order of a line, each being the even or the odd ones.
ADAMFUSED_INLINE Short halves(Word a, Word b, int odd) {
  int16_t place[32];
  for (int i = 0; i < 32; ++i) place[i] = int16_t(2 * (i % 4 + i / 8 * 4) + odd + i / 4 % 2 * 32);
  Bits places;
  __builtin_memcpy(&places, place, sizeof places);
  return (Short)_mm512_permutex2var_epi16((Bits)a, places, (Bits)b);
}
ADAMFUSED_INLINE Short uppers(Word a, Word b) { return halves(a, b, 1); }
ADAMFUSED_INLINE Short lowers(Word a, Word b) { return halves(a, b, 0); }
ADAMFUSED_INLINE Short tops(Word a, Word b) { return uppers(a, b) >> (kShift - 16); }
ADAMFUSED_INLINE Short above(Short a, Short b) { return (Short)_mm512_subs_epu16((Bits)a, (Bits)b); }
ADAMFUSED_INLINE Short chosen(uint8_t mask, Short a, Short b) {
  return (Short)_mm512_ternarylogic_epi32((Bits)(Short{} + mask), (Bits)a, (Bits)b, 0xca);
}
ADAMFUSED_INLINE bool any_nan(Word a, Word b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0; }
ADAMFUSED_INLINE __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
ADAMFUSED_INLINE Short load_bytes(const uint8_t* from) { return (Short)_mm512_cvtepu8_epi16(load_256(from)); }
ADAMFUSED_INLINE Short load_bytes(const int8_t* from) { return (Short)_mm512_cvtepi8_epi16(load_256(from)); }
ADAMFUSED_INLINE void store_bytes(Short x, uint8_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8((Bits)x));
}
ADAMFUSED_INLINE void load_words(const float* from, Word* word) {
  const Bits a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 16);
  word[0] = (Word)_mm512_shuffle_i32x4(a, b, 0x88), word[1] = (Word)_mm512_shuffle_i32x4(a, b, 0xdd);
}
ADAMFUSED_INLINE void store_words(const Word* word, float* to) {
  const Bits first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
             second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi64((Bits)word[0], first, (Bits)word[1]));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64((Bits)word[0], second, (Bits)word[1]));
}
ADAMFUSED_INLINE void store_in_order(const Word* word, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((Bits)word[0]));
}
#endif

template <class Rest>
ADAMFUSED_INLINE Short load_short(const Rest* from) {
  Short x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}
ADAMFUSED_INLINE void store_short(Short x, void* to) { __builtin_memcpy(to, &x, sizeof x); }

// The numbers of a line to the low or the upper ends of words, with zeros elsewhere or with other numbers below.
ADAMFUSED_INLINE void spread(Short x, Word* word) {
  word[0] = (Word)interleave_low((Bits)x, Bits{}), word[1] = (Word)interleave_high((Bits)x, Bits{});
}
ADAMFUSED_INLINE void spread_signed(Short x, Word* word) {
  word[0] = (Word)interleave_low((Bits)x, (Bits)x), word[1] = (Word)interleave_high((Bits)x, (Bits)x);
  for (int j = 0; j < 2; ++j) word[j] = (Word)((Vector<int32_t>)word[j] >> 16);
}
ADAMFUSED_INLINE void spread_upper(Short x, Word* word, Short below = Short{}) {
  word[0] = (Word)interleave_low((Bits)below, (Bits)x), word[1] = (Word)interleave_high((Bits)below, (Bits)x);
}

ADAMFUSED_INLINE void load_words(const uint16_t* from, Word* word) { spread(load_short(from), word); }
ADAMFUSED_INLINE void load_words(const int16_t* from, Word* word) { spread_signed(load_short(from), word); }
ADAMFUSED_INLINE void load_words(const uint8_t* from, Word* word) { spread(load_bytes(from), word); }
ADAMFUSED_INLINE void load_words(const int8_t* from, Word* word) { spread_signed(load_bytes(from), word); }
ADAMFUSED_INLINE void load_upper_words(const uint16_t* from, Word* word) { spread_upper(load_short(from), word); }

// To the low ends; what does not fit is stored as another number.
ADAMFUSED_INLINE void store_words(const Word* word, uint16_t* to) { store_short(pack(word[0], word[1]), to); }
ADAMFUSED_INLINE void store_words(const Word* word, uint8_t* to) { store_bytes(pack(word[0], word[1]), to); }

// ---- formats in fewer instructions than theirs are, to the same bits ----

template <bool plain>
ADAMFUSED_INLINE void load_split16(const uint16_t* upper, const int16_t* lower, Word* word) {
  const Short below = load_short(lower), seen = load_short(upper);
  spread_upper(seen + (Short)((SignedShort)below >> 15), word, below);
  if (!plain && __builtin_expect(any_nan(word[0], word[1]), false)) {
    Word alone[2];
    spread_upper(seen, alone);
    for (int j = 0; j < 2; ++j) word[j] = is_nan(word[j]) ? alone[j] : word[j];
  }
}
template <bool plain>
ADAMFUSED_INLINE void store_split16(Word* word, uint16_t* upper, int16_t* lower) {
  if (!plain && __builtin_expect(any_nan(word[0], word[1]), false))
    for (int j = 0; j < 2; ++j) word[j] = is_nan(word[j]) ? Word{} + 0x7fc00000u : word[j];
  store_short(uppers(word[0] + 0x8000u, word[1] + 0x8000u), upper);
  store_short(lowers(word[0], word[1]), lower);
}

// Codes of finite numbers. All that they tell is in the upper half of a word.
template <class Format>
ADAMFUSED_INLINE void load_codes(const typename Format::Rest* rest, float scale, Float* x) {
  const uint32_t c = Format::c_of(scale);
  const uint16_t upper = uint16_t(c >> 16);  // below are zeros
  Word word[2];
  if constexpr (Format::kSigned) {
    // A byte with its sign in all bits above is where it should be but for some copies of the sign.
    const Short code = load_bytes(reinterpret_cast<const int8_t*>(rest)) << (kShift - 16);
    spread_upper((code & uint16_t(0x8000 | 0x7f << (kShift - 16))) + upper, word);
    for (int j = 0; j < 2; ++j) x[j] = float_of(word[j]) - float_of((word[j] & ~kMagnitude) | c);
  } else {
    spread_upper((load_bytes(rest) << (kShift - 16)) + upper, word);
    for (int j = 0; j < 2; ++j) x[j] = float_of(word[j]);
  }
}
// None of them is above the top.
template <class Format>
ADAMFUSED_INLINE void store_codes(const Float* x, float scale, const Word* dither, typename Format::Rest* rest) {
  const uint32_t c = Format::c_of(scale);
  const Short least = Short{} + uint16_t(c >> kShift);
  if constexpr (Format::kSigned) {
    Word fine[2];
    for (int j = 0; j < 2; ++j) fine[j] = bits_of(x[j] + float_of((bits_of(x[j]) & ~kMagnitude) | c)) + dither[j];
    const Short code = tops(fine[0], fine[1]) - least;  // a sign is still where that of a float was
    store_bytes(chosen(0x7f, code, code >> (31 - kShift - 7)), rest);
  } else {
    store_bytes(above(tops(bits_of(x[0]) + dither[0], bits_of(x[1]) + dither[1]), least), rest);
  }
}
#else
constexpr uint32_t place_of(int i) { return uint32_t(i); }
constexpr uint32_t kVectorStep = kWords;

template <class Rest>
ADAMFUSED_INLINE void load_words(const Rest* from, Word* word) {
  for (int j = 0; j < kVectors; ++j) {
    Word x{};
    if constexpr (sizeof(Rest) == 4)
      __builtin_memcpy(&x, from + j * kWords, sizeof x);
    else
      for (int i = 0; i < kWords; ++i) x[i] = uint32_t(from[j * kWords + i]);
    word[j] = x;
  }
}
ADAMFUSED_INLINE void load_upper_words(const uint16_t* from, Word* word) {
  load_words(from, word);
  for (int j = 0; j < kVectors; ++j) word[j] <<= 16;
}

// To the low ends; what does not fit is stored as another number.
template <class Rest>
ADAMFUSED_INLINE void store_words(const Word* word, Rest* to) {
  for (int j = 0; j < kVectors; ++j) {
    if constexpr (sizeof(Rest) == 4)
      __builtin_memcpy(to + j * kWords, word + j, sizeof *word);
    else
      for (int i = 0; i < kWords; ++i) to[j * kWords + i] = Rest(word[j][i]);
  }
}
ADAMFUSED_INLINE void store_in_order(const Word* word, uint16_t* to) { store_words(word, to); }
#endif

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused
