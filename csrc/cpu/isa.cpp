#define ADAMFUSED_TARGET host
#include "cpu/isa.h"

namespace adamfused {
namespace {

bool scalar_runs_here() { return true; }

#if defined(__x86_64__)
// These read cpuid and, through xgetbv, whether the operating system keeps the wide registers.
bool avx2_runs_here() { return __builtin_cpu_supports("avx2"); }
bool avx512_runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

#define ADAMFUSED_ROW(isa) {#isa, isa##_runs_here, isa##_table, isa##_sum},
const Isa kIsaTable[kIsas] = {ADAMFUSED_ISAS(ADAMFUSED_ROW)};
#undef ADAMFUSED_ROW

}  // namespace adamfused
