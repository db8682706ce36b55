// Compiled with -mavx2.
#define ADAMFUSED_TARGET avx2
#define ADAMFUSED_VECTOR 32
#include "cpu/sums.h"

namespace adamfused {
using namespace avx2;
const Run avx2_table[kRules][2][2] = ADAMFUSED_TABLE;
const Sum avx2_sum = sum;
}  // namespace adamfused
