// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512.
#define ADAMFUSED_TARGET avx512
#define ADAMFUSED_VECTOR 64
#include "cpu/sums.h"

namespace adamfused {
using namespace avx512;
const Run avx512_table[kRules][2][2] = ADAMFUSED_TABLE;
const Sum avx512_sum = sum;
}  // namespace adamfused
