// A CPU's way from numbers as they rest to vectors of floats and back. Included by drive.h.
#pragma once

#include "formats.h"
#include "job.h"

#define ADAMFUSED_INLINE inline __attribute__((always_inline))

namespace adamfused {
namespace ADAMFUSED_TARGET {

// What comes is asked for this many bytes ahead. The processor's own prefetching ends with each page of memory, and a
// rule has so many instructions that the next page is not in sight when it does.
constexpr int kAhead = 512;

inline void ask_for(const void* x) { __builtin_prefetch(static_cast<const char*>(x) + kAhead); }

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

// All of a line that is to come.
template <class Rest>
ADAMFUSED_INLINE void ask_for_line(const Rest* x) {
  for (size_t at = 0; at < kLine * sizeof(Rest); at += 64) ask_for(reinterpret_cast<const char*>(x) + at);
}

// The words of a line, from the low ends of what rests. Of a pair, the first vector has the numbers 0-3, 8-11 and so
// on, the second the others, because to interleave and to pack within parts of 16 bytes is several times faster than
// across them.
#ifdef ADAMFUSED_PAIRS
constexpr uint32_t place_of(int i) { return uint32_t(i % 4 + i / 4 * 8); }
constexpr uint32_t kVectorStep = 4;

using Short = Vector<uint16_t>;  // all of a line
typedef int16_t SignedShort __attribute__((vector_size(ADAMFUSED_VECTOR)));

#if ADAMFUSED_VECTOR == 32
using Bits = __m256i;
ADAMFUSED_INLINE Bits interleave_low(Bits a, Bits b) { return _mm256_unpacklo_epi16(a, b); }
ADAMFUSED_INLINE Bits interleave_high(Bits a, Bits b) { return _mm256_unpackhi_epi16(a, b); }
// Words to the numbers of a line; what does not fit becomes the nearest that does.
ADAMFUSED_INLINE Short pack(Word a, Word b) { return (Short)_mm256_packus_epi32((Bits)a, (Bits)b); }
ADAMFUSED_INLINE Short pack_signed(Word a, Word b) { return (Short)_mm256_packs_epi32((Bits)a, (Bits)b); }
// Their upper or lower halves.
ADAMFUSED_INLINE Short uppers(Word a, Word b) { return pack(a >> 16, b >> 16); }
ADAMFUSED_INLINE Short lowers(Word a, Word b) { return pack(a & 0xffffu, b & 0xffffu); }
ADAMFUSED_INLINE Short with_sign(Short x, Short sign) { return (Short)_mm256_sign_epi16((Bits)x, (Bits)sign); }
ADAMFUSED_INLINE Short smaller(Short a, Short b) { return (Short)_mm256_min_epu16((Bits)a, (Bits)b); }
ADAMFUSED_INLINE Short larger(Short a, Short b) { return (Short)_mm256_max_epu16((Bits)a, (Bits)b); }
ADAMFUSED_INLINE __m128i load_128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
ADAMFUSED_INLINE Short load_bytes(const uint8_t* from) { return (Short)_mm256_cvtepu8_epi16(load_128(from)); }
ADAMFUSED_INLINE Short load_bytes(const int8_t* from) { return (Short)_mm256_cvtepi8_epi16(load_128(from)); }
ADAMFUSED_INLINE void store_bytes(Short x, uint8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packus_epi16(_mm256_castsi256_si128((Bits)x), _mm256_extracti128_si256((Bits)x, 1)));
}
ADAMFUSED_INLINE void store_bytes(Short x, int8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packs_epi16(_mm256_castsi256_si128((Bits)x), _mm256_extracti128_si256((Bits)x, 1)));
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
ADAMFUSED_INLINE Short pack_signed(Word a, Word b) { return (Short)_mm512_packs_epi32((Bits)a, (Bits)b); }
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
ADAMFUSED_INLINE Short with_sign(Short x, Short sign) {
  return (Short)_mm512_mask_sub_epi16((Bits)x, _mm512_movepi16_mask((Bits)sign), _mm512_setzero_si512(), (Bits)x);
}
ADAMFUSED_INLINE Short smaller(Short a, Short b) { return (Short)_mm512_min_epu16((Bits)a, (Bits)b); }
ADAMFUSED_INLINE Short larger(Short a, Short b) { return (Short)_mm512_max_epu16((Bits)a, (Bits)b); }
ADAMFUSED_INLINE __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
ADAMFUSED_INLINE Short load_bytes(const uint8_t* from) { return (Short)_mm512_cvtepu8_epi16(load_256(from)); }
ADAMFUSED_INLINE Short load_bytes(const int8_t* from) { return (Short)_mm512_cvtepi8_epi16(load_256(from)); }
template <class Byte>
ADAMFUSED_INLINE void store_bytes(Short x, Byte* to) {
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
ADAMFUSED_INLINE void store_words(const Word* word, int8_t* to) { store_bytes(pack_signed(word[0], word[1]), to); }

// ---- formats in fewer instructions than theirs are, to the same bits ----

ADAMFUSED_INLINE void load_split16(const uint16_t* upper, const int16_t* lower, Word* word) {
  const Short below = load_short(lower);
  spread_upper(load_short(upper) + (Short)((SignedShort)below >> 15), word, below);
}
ADAMFUSED_INLINE void store_split16(const Word* word, uint16_t* upper, int16_t* lower) {
  Word b[2];
  for (int j = 0; j < 2; ++j) b[j] = is_nan(word[j]) ? Word{} + 0x7fc00000u : word[j];
  store_short(uppers(b[0] + 0x8000u, b[1] + 0x8000u), upper);
  store_short(lowers(b[0], b[1]), lower);
}

// Codes of finite numbers. All that they tell is in the upper half of a word.
template <class Format>
ADAMFUSED_INLINE void load_codes(const typename Format::Rest* rest, float scale, Float* x) {
  static_assert(Format::kShift >= 16 && Format::kBase % (1u << Format::kShift) == 0, "");
  const Short code = load_bytes(rest);
  const SignedShort value = (SignedShort)code;
  const Short magnitude = Format::kSigned ? (Short)(value < 0 ? -value : value) : code;
  Word word[2], sign[2];
  spread_upper((magnitude << (Format::kShift - 16)) + uint16_t(Format::kBase >> 16), word);
  spread_upper(code, sign);
  for (int j = 0; j < 2; ++j) {
    x[j] = (float_of(word[j]) - Format::kC) * scale;
    if constexpr (Format::kSigned) x[j] = float_of(bits_of(x[j]) | (sign[j] & 0x80000000u));
  }
}
template <class Format>
ADAMFUSED_INLINE void store_codes(const Word* b, float inverse, const Word* word, typename Format::Rest* rest) {
  constexpr int shift = Format::kShift;
  constexpr uint16_t base = Format::kBase >> shift, top = Format::kTop;
  constexpr uint32_t sign = 0x80000000u;
  Word magnitude[2], fine[2];
  for (int j = 0; j < 2; ++j) {
    magnitude[j] = b[j] & kMagnitude;
    if constexpr (Format::kSigned)
      fine[j] = bits_of(float_of(b[j]) * inverse + float_of((b[j] & sign) | (Word{} + bits_of(Format::kC))));
    else
      fine[j] = bits_of(float_of(magnitude[j]) * inverse + Format::kC);
    fine[j] = (fine[j] + (word[j] >> (32 - shift))) >> shift;
  }
  const Short code = pack(fine[0], fine[1]);  // a signed one's sign is in the bit below 32 - shift
  if constexpr (Format::kSigned) {
    const Short x = smaller((code & uint16_t((1u << (31 - shift)) - 1)) - base, Short{} + top);
    store_bytes(with_sign(x, code << (shift - 16)), rest);
  } else {
    const Short some = smaller(pack(magnitude[0], magnitude[1]), Short{} + uint16_t(1));
    store_bytes(larger(smaller(code - base, Short{} + top), some), rest);
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

// The random words of lines that follow one another.
class Words {
 public:
  Words() = default;
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

// The same for codes.
struct Dither {
  Words words;
  uint32_t t;
  int slot;

  Word of(int j) const { return dither(words.of(j), t, slot); }
  void next_line() { words.next_line(); }
};

// A line of floats from a part as it rests. `scale` is that of codes, which are known to be of finite numbers if so
// said.
template <class Format, bool finite = false>
ADAMFUSED_INLINE void load_line(const typename Format::Rest* rest, const typename Format::Beside* beside, float scale,
                                Float* x) {
  constexpr bool upper =
      same<Format, BF16> || same<Format, BF16AtRandom> || same<Format, Split16> || same<Format, Split8>;
  Word word[kVectors], below[kVectors];
#ifdef ADAMFUSED_PAIRS
  if constexpr (is_code<Format> && finite) return load_codes<Format>(rest, scale, x);
  if constexpr (same<Format, Split16>) {
    load_split16(rest, beside, word);
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
      x[j] = float_of(finite ? Format::decode_finite(word[j], scale) : Format::decode(word[j], scale));
    else if constexpr (is_joined<Format>)
      x[j] = float_of(Format::join(word[j], below[j]));
    else
      x[j] = float_of(Format::widen(word[j]));
  }
}

template <class Format>
ADAMFUSED_INLINE void store_line(const Float* x, Words& words, typename Format::Rest* rest,
                                 typename Format::Beside* beside) {
  Word word[kVectors], below[kVectors];
#ifdef ADAMFUSED_PAIRS
  if constexpr (same<Format, Split16>) {
    for (int j = 0; j < kVectors; ++j) word[j] = bits_of(x[j]);
    return store_split16(word, rest, beside);
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

// Whether all of a block's codes are of finite numbers.
template <class Format>
bool all_finite(const typename Format::Rest* rest, int n) {
  typedef typename Format::Rest Rests __attribute__((vector_size(kLine)));
  Rests special{};
  for (int i = 0; i < n; i += kLine) {
    Rests line;
    __builtin_memcpy(&line, rest + i, sizeof line);
    special |= (Rests)(line == typename Format::Rest(Format::kSpecial));
  }
  uint64_t parts[kLine / 8], any = 0;
  __builtin_memcpy(parts, &special, sizeof parts);
  for (uint64_t part : parts) any |= part;
  return any == 0;
}

// What a block's codes are made with.
struct Scaling {
  bool finite;     // all of its numbers are
  uint32_t power;  // of two: the bits of a float
};

// `top` has the largest magnitude of each lane, or one that is not finite.
template <class Format>
ADAMFUSED_INLINE Scaling scaling_of(const float* numbers, int n, Word top) {
  uint32_t most = 0;
  for (int i = 0; i < kWords; ++i) most = larger(most, top[i]);
  const bool finite = is_finite(most);
  if (!finite) {
    most = 0;
    for (int i = 0; i < n; ++i) most = larger(most, Format::counted(bits_of(numbers[i]) & kMagnitude));
  }
  return {finite, Format::power_above(most)};
}

template <class Format, class Encode>
ADAMFUSED_INLINE void encode_block(const float* from, int n, Dither words, typename Format::Rest* rest, Encode encode) {
  for (int i = 0; i < n; i += kLine) {
    Word b[kVectors], code[kVectors];
    for (int j = 0; j < kVectors; ++j) __builtin_memcpy(b + j, from + i + j * kWords, sizeof *b);
    for (int j = 0; j < kVectors; ++j) code[j] = encode(b[j], words.of(j));
    words.next_line();
    store_words(code, rest + i);
  }
}

// A block of floats to codes and their scale. The floats lie in the order in which lines are in vectors.
template <class Format>
ADAMFUSED_INLINE void store_block(const float* from, int n, const Scaling& scaling, Dither words,
                                  typename Format::Rest* rest, float* scale) {
  const float inverse = Format::inverse(scaling.power);
  if (scaling.finite)
    encode_block<Format>(from, n, words, rest,
                         [inverse](Word b, Word word) { return Format::encode_finite(b, inverse, word); });
  else
    encode_block<Format>(from, n, words, rest,
                         [inverse](Word b, Word word) { return Format::encode(b, inverse, word); });
  *scale = Format::scale(scaling.power);
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
  Dither dither(int64_t at) const { return {Words(key_of_dither(key, slot), first + uint32_t(at)), t, slot}; }
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
  Dither dither = place.dither(at);
  constexpr int each = is_code<Format> ? kBlock : kLine;
  for (int i = 0; i < n; i += each) {
    if constexpr (is_code<Format>) {
      const int some = n - i < kBlock ? n - i : kBlock;
      alignas(64) float kept[kBlock];
      Word top{}, b[kVectors];
      for (int j = 0; j < some; j += kLine) {
        load_words(from + i + j, b);
        for (int k = 0; k < kVectors; ++k) {
          top = larger(top, b[k] & kMagnitude);
          __builtin_memcpy(kept + j + k * kWords, b + k, sizeof *b);
        }
      }
      const Scaling scaling = scaling_of<Format>(kept, some, top);
      store_block<Format>(kept, some, scaling, dither, rest + i, beside + i / kBlock);
      for (int j = 0; j < some; j += kLine) dither.next_line();
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
