// Compiled with -mavx2.
#define ADAMFUSED_TARGET avx2
#define ADAMFUSED_VECTOR 32
#include "cpu/drive.h"

namespace adamfused {
using namespace avx2;
const Run avx2_table[kRules][2] = ADAMFUSED_TABLE;
}  // namespace adamfused
