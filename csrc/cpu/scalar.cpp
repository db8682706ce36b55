// Compiled with the baseline of the architecture; what the compiler vectorises within that, it may.
#define ADAMFUSED_TARGET scalar
#define ADAMFUSED_VECTOR 16
#include "cpu/sums.h"

namespace adamfused {
using namespace scalar;
const Run scalar_table[kRules][2][2] = ADAMFUSED_TABLE;
const Sum scalar_sum = sum;
}  // namespace adamfused
