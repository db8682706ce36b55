// One tile through one rule: the same text on every target. The parts of the tile are numbers of type T by now;
// get and put have to do with how they rest in memory.
#pragma once

#include "job.h"

namespace adamfused {
namespace ADAMFUSED_TARGET {

template <class Rule, class T>
ADAMFUSED_HD void move_tile(const Rule& rule, int n, T* ADAMFUSED_RESTRICT p, const T* ADAMFUSED_RESTRICT g,
                            T* ADAMFUSED_RESTRICT a, T* ADAMFUSED_RESTRICT b, T* ADAMFUSED_RESTRICT c) {
  ADAMFUSED_UNROLL
  for (int i = 0; i < n; ++i) {
    if constexpr (Rule::states == 1) rule(p[i], g[i], a[i]);
    if constexpr (Rule::states == 2) rule(p[i], g[i], a[i], b[i]);
    if constexpr (Rule::states == 3) rule(p[i], g[i], a[i], b[i], c[i]);
  }
}

}  // namespace ADAMFUSED_TARGET
}  // namespace adamfused
