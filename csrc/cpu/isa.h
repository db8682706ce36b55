// The table of instruction sets, best last, and the one in use.
#pragma once

#include "sum.h"

namespace adamfused {

// Tiles [begin, end) of a job.
using Run = void (*)(const Job&, int64_t begin, int64_t end);

// The sums of chunks [begin, end) of a job.
using Sum = void (*)(const SumJob&, int64_t begin, int64_t end);

struct Isa {
  const char* name;
  bool (*runs_here)();       // asks the processor and the operating system
  const Run (*table)[2][2];  // [rule][averaged][in double]
  Sum sum;
};

#if defined(__x86_64__)
#define ADAMFUSED_ISAS(ISA) ISA(scalar) ISA(avx2) ISA(avx512)
#else
#define ADAMFUSED_ISAS(ISA) ISA(scalar)
#endif

#define ADAMFUSED_DECLARE(isa)                \
  extern const Run isa##_table[kRules][2][2]; \
  extern const Sum isa##_sum;
ADAMFUSED_ISAS(ADAMFUSED_DECLARE)
#undef ADAMFUSED_DECLARE

constexpr int kIsas = 0
#define ADAMFUSED_COUNT(isa) +1
    ADAMFUSED_ISAS(ADAMFUSED_COUNT);
#undef ADAMFUSED_COUNT

extern const Isa kIsaTable[kIsas];

}  // namespace adamfused
