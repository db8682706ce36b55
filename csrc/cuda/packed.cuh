// A thread's numbers of a part, between memory and registers, in every format.
#pragma once

#include "job.h"

namespace adamfused {
namespace ADAMFUSED_TARGET {

// Whether numbers that lie by themselves, rounded to nearest: most jobs have no others.
template <class Format>
constexpr bool is_plain = !is_code<Format> && !is_joined<Format> && !at_random<Format>;

// Whether a kernel meets a format in a slot. `stored` are the kernels of every format, whose threads take E = 8 numbers
// at once, or 4 doubles, lest there be more numbers than registers. The threads of the others take as many of the
// narrowest that a job has as 16 bytes hold. Averages of weights have no codes.
template <class Rule, class T, int E, bool stored, int slot, class Format>
ADAMFUSED_HD constexpr bool meets() {
  using Rest = typename Format::Rest;
  if constexpr (slot == kParam && (sizeof(Rest) > 4) != (sizeof(T) > 4)) {
    return false;  // the arithmetic is that of the parameter
  } else if constexpr (is_code<Format>) {
    constexpr int state = slot - kState;
    if constexpr (state < 0 || state >= Rule::states - Rule::averages)
      return false;
    else
      return stored && Format::kSigned != (Rule::never_negative >> state & 1);
  } else if constexpr (is_joined<Format>) {
    return stored && slot == kParam;
  } else if constexpr (at_random<Format>) {
    return stored && slot != kGrad && slot != kCopy;
  } else {
    return stored || E * sizeof(Rest) >= 16;
  }
}
template <class Rule, class T, int E, bool stored, int slot, size_t size>
ADAMFUSED_HD constexpr bool meets_size() {
#define ADAMFUSED_OR(F, ...) || (sizeof(F::Rest) == size && meets<Rule, T, E, stored, slot, F>())
  return false ADAMFUSED_FORMATS(ADAMFUSED_OR);
#undef ADAMFUSED_OR
}

// The size of what lies beside a number; 0: nothing does.
ADAMFUSED_HD size_t size_beside(FormatId format) {
  switch (format) {
#define ADAMFUSED_CASE(F, ...) \
  case FormatId::F:            \
    return is_joined<F> ? sizeof(F::Beside) : 0;
    ADAMFUSED_FORMATS(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
  }
  return 0;
}

// Where a thread's E numbers lie in a tile. Those of a block of kBlock lie with as many threads as that takes: each has
// a row of them, or, where the tensor is not aligned or the block not whole, every so many-th, so that a warp's
// accesses lie together.
template <int E>
struct Places {
  static constexpr int kNeighbours = kBlock / E;
  int64_t tile;  // the index of its first number
  int n;         // numbers in the tile
  int first;
  bool in_a_row;

  // Of the thread whose row would begin with the i-th number.
  __device__ __forceinline__ Places(int64_t tile, int n, bool aligned, int i) : tile(tile), n(n) {
    const int block = i / kBlock * kBlock;
    in_a_row = aligned && block + kBlock <= n;
    first = in_a_row ? i : block + i % kBlock / E;
  }
  __device__ __forceinline__ int step() const { return in_a_row ? 1 : kNeighbours; }
  __device__ __forceinline__ bool has(int j) const { return first + j * step() < n; }
  __device__ __forceinline__ int64_t begin() const { return tile + first; }
  __device__ __forceinline__ uint32_t index(int j) const { return uint32_t(tile) + uint32_t(first + j * step()); }
  // The block that they lie in, and whether this thread has its first number.
  __device__ __forceinline__ int64_t block() const { return begin() / kBlock; }
  __device__ __forceinline__ bool leads() const { return first % kBlock == 0 && has(0); }
};

// N bytes between memory and registers, by the widest accesses that divide them.
template <int N>
ADAMFUSED_HD void load_bytes(const void* from, uint32_t* to) {
  static_assert(N == 4 || N == 8 || N % 16 == 0, "");
  if constexpr (N == 4) to[0] = *static_cast<const uint32_t*>(from);
  if constexpr (N == 8) {
    uint2 x = *static_cast<const uint2*>(from);
    to[0] = x.x, to[1] = x.y;
  }
  if constexpr (N >= 16) {
    ADAMFUSED_UNROLL
    for (int i = 0; i < N / 16; ++i) {
      uint4 x = static_cast<const uint4*>(from)[i];
      to[4 * i] = x.x, to[4 * i + 1] = x.y, to[4 * i + 2] = x.z, to[4 * i + 3] = x.w;
    }
  }
}

template <int N>
ADAMFUSED_HD void store_bytes(void* to, const uint32_t* from) {
  static_assert(N == 4 || N == 8 || N % 16 == 0, "");
  if constexpr (N == 4) *static_cast<uint32_t*>(to) = from[0];
  if constexpr (N == 8) *static_cast<uint2*>(to) = make_uint2(from[0], from[1]);
  if constexpr (N >= 16) {
    ADAMFUSED_UNROLL
    for (int i = 0; i < N / 16; ++i)
      static_cast<uint4*>(to)[i] = make_uint4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
  }
}

// E numbers as they rest. To load and to get are two passes over the parts, so that all loads are under way before the
// first is waited for. What is wider than T (a float64 gradient) is converted on the way.
//
// Formats are known at run time only, but are the same for a whole tile: branches that no warp splits on. They keep the
// number of kernels at rules, not rules x formats^parts.
template <class T, int E>
struct Packed {
  uint32_t word[E * sizeof(T) / 4];

  template <class Rest>
  __device__ __forceinline__ void set(const Rest (&rest)[E]) {
    __builtin_memcpy(word, rest, sizeof rest);
  }
  template <class Rest>
  __device__ __forceinline__ void tell(Rest (&rest)[E]) const {
    __builtin_memcpy(rest, word, sizeof rest);
  }

  // Past the end of a tensor are zeros.
  template <class Rest>
  __device__ __forceinline__ void load(const void* data, const Places<E>& at) {
    const Rest* from = static_cast<const Rest*>(data) + at.begin();
    if constexpr (sizeof(Rest) > sizeof(T)) {
      T x[E];
      ADAMFUSED_UNROLL
      for (int j = 0; j < E; ++j) x[j] = at.has(j) ? T(from[j * at.step()]) : T(0);
      set(x);
    } else if (at.in_a_row) {
      load_bytes<E * sizeof(Rest)>(from, word);
    } else {
      Rest rest[E];
      ADAMFUSED_UNROLL
      for (int j = 0; j < E; ++j) rest[j] = at.has(j) ? from[j * Places<E>::kNeighbours] : Rest(0);
      set(rest);
    }
  }
  template <class Rest>
  __device__ __forceinline__ void store(void* data, const Places<E>& at) const {
    Rest* to = static_cast<Rest*>(data) + at.begin();
    if constexpr (sizeof(Rest) > sizeof(T)) {
      T x[E];
      tell(x);
      ADAMFUSED_UNROLL
      for (int j = 0; j < E; ++j)
        if (at.has(j)) to[j * at.step()] = Rest(x[j]);
    } else if (at.in_a_row) {
      store_bytes<E * sizeof(Rest)>(to, word);
    } else {
      Rest rest[E];
      tell(rest);
      ADAMFUSED_UNROLL
      for (int j = 0; j < E; ++j)
        if (at.has(j)) to[j * Places<E>::kNeighbours] = rest[j];
    }
  }
};

// Runs `work` with a number of the size that rests, or that lies beside.
template <class Rule, class T, int E, bool stored, int slot, class Work>
__device__ __forceinline__ void as_rest(FormatId format, Work work) {
  const size_t size = size_of(format);
  if constexpr (meets_size<Rule, T, E, stored, slot, 1>())
    if (size == 1) return work(uint8_t());
  if constexpr (meets_size<Rule, T, E, stored, slot, 2>())
    if (size == 2) return work(uint16_t());
  if constexpr (meets_size<Rule, T, E, stored, slot, 4>())
    if (size == 4) return work(float());
  if constexpr (meets_size<Rule, T, E, stored, slot, 8>())
    if (size == 8) return work(double());
}
template <class Work>
__device__ __forceinline__ void as_beside(FormatId format, Work work) {
  const size_t size = size_beside(format);
  if (size == 1) return work(uint8_t());
  if (size == 2) return work(uint16_t());
  if (size == 4) return work(float());
}

// What the random words of a tensor come from.
struct Source {
  uint32_t key, t, first;
};

// The numbers of a part, with what lies beside them: words for each, or a scale for all.
template <class Format, class T, int E>
__device__ __forceinline__ void get(const Packed<T, E>& packed, const Packed<T, E>& packed_beside, float scale,
                                    T (&x)[E]) {
  using Rest = typename Format::Rest;
  if constexpr (sizeof(Rest) > sizeof(T)) {
    packed.tell(x);
  } else if constexpr (is_joined<Format>) {
    using Beside = typename Format::Beside;
    Rest rest[E];
    Beside beside[E];
    packed.tell(rest), packed_beside.tell(beside);
    ADAMFUSED_UNROLL
    for (int j = 0; j < E; ++j) {
      if constexpr (same<Beside, float>)
        x[j] = float_of(Format::join(uint32_t(rest[j]), bits_of(beside[j])));
      else
        x[j] = float_of(Format::join(uint32_t(rest[j]) << 16, uint32_t(beside[j])));
    }
  } else {
    Rest rest[E];
    packed.tell(rest);
    ADAMFUSED_UNROLL
    for (int j = 0; j < E; ++j) {
      if constexpr (is_code<Format>)
        x[j] = T(float_of(Format::decode(uint32_t(rest[j]), scale)));
      else
        x[j] = T(Format::get(rest[j]));
    }
  }
}

// The largest of all that the threads of a block of codes have. Every thread of a warp comes here.
template <int E>
__device__ __forceinline__ uint32_t largest_of_block(uint32_t mine) {
  ADAMFUSED_UNROLL
  for (int other = 1; other < Places<E>::kNeighbours; other *= 2)
    mine = larger(mine, __shfl_xor_sync(0xffffffffu, mine, other));
  return mine;
}

// The other way. Gives the scale of codes.
template <class Format, int slot, class T, int E>
__device__ __forceinline__ float put(const T (&x)[E], const Source& from, const Places<E>& at, Packed<T, E>& packed,
                                     Packed<T, E>& packed_beside) {
  using Rest = typename Format::Rest;
  Rest rest[E];
  if constexpr (sizeof(Rest) > sizeof(T)) {
    packed.set(x);
  } else if constexpr (is_code<Format>) {
    uint32_t largest = 0, special = 0;  // special: not finite
    ADAMFUSED_UNROLL
    for (int j = 0; j < E; ++j) {
      // Past the end, code zero may mean a number above zero, and a rule may make NaN of zeros.
      const uint32_t magnitude = at.has(j) ? bits_of(float(x[j])) & kMagnitude : 0;
      if (is_finite(magnitude))
        largest = larger(largest, magnitude);
      else
        special = 1;
    }
    const float scale = Format::scale_for(largest_of_block<E>(largest), largest_of_block<E>(special) == 0);
    const uint32_t key = key_of_dither(from.key, from.t);
    ADAMFUSED_UNROLL
    for (int j = 0; j < E; ++j) {
      const uint32_t word = dither_at(from.first + phase_of(at.index(j)), key);
      rest[j] = Rest(Format::encode(bits_of(float(x[j])), scale, word));
    }
    packed.set(rest);
    return scale;
  } else if constexpr (is_joined<Format>) {
    using Beside = typename Format::Beside;
    Beside beside[E];
    ADAMFUSED_UNROLL
    for (int j = 0; j < E; ++j) {
      uint32_t upper, lower;
      Format::part(bits_of(float(x[j])), upper, lower);
      rest[j] = Rest(upper);
      if constexpr (same<Beside, float>)
        beside[j] = float_of(lower);
      else
        beside[j] = Beside(lower);
    }
    packed.set(rest), packed_beside.set(beside);
  } else if constexpr (at_random<Format>) {
    const uint32_t key = key_of(from.key, from.t, slot);
    ADAMFUSED_UNROLL
    for (int j = 0; j < E; ++j) {
      const uint32_t word = word_of(counter_at(from.first + at.index(j), key));
      rest[j] = Rest(Format::narrow_at_random(bits_of(float(x[j])), word));
    }
    packed.set(rest);
  } else {
    ADAMFUSED_UNROLL
    for (int j = 0; j < E; ++j) rest[j] = Format::put(x[j]);
    packed.set(rest);
  }
  return 0;
}

// The same of a format that is known at run time. A number is read in one way, however it was rounded.
ADAMFUSED_HD FormatId as_read(FormatId format) {
  return format == FormatId::BF16AtRandom ? FormatId::BF16 : format == FormatId::F16AtRandom ? FormatId::F16 : format;
}
template <class Rule, bool stored, int slot, class T, int E>
__device__ __forceinline__ void get(FormatId format, const Packed<T, E>& packed, const Packed<T, E>& beside,
                                    float scale, T (&x)[E]) {
  switch (as_read(format)) {
#define ADAMFUSED_CASE(F, ...)                                                                                   \
  case FormatId::F:                                                                                              \
    if constexpr (meets<Rule, T, E, stored, slot, F>() && !at_random<F>) get<F, T, E>(packed, beside, scale, x); \
    return;
    ADAMFUSED_FORMATS(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
  }
}
template <class Rule, bool stored, int slot, class T, int E>
__device__ __forceinline__ float put(FormatId format, const T (&x)[E], const Source& from, const Places<E>& at,
                                     Packed<T, E>& packed, Packed<T, E>& beside) {
  switch (format) {
#define ADAMFUSED_CASE(F, ...)                                                                                  \
  case FormatId::F:                                                                                             \
    if constexpr (meets<Rule, T, E, stored, slot, F>()) return put<F, slot, T, E>(x, from, at, packed, beside); \
    return 0;
    ADAMFUSED_FORMATS(ADAMFUSED_CASE)
#undef ADAMFUSED_CASE
  }
  return 0;
}

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused
