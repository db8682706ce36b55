// What the host knows of each rule without its type. Included by step.h.
#pragma once

#include <cstring>

#include "cpu/isa.h"

namespace adamfused {
namespace {

using namespace host;

struct RuleFacts {
  const char* name;
  int states;
  uint32_t never_negative;
  size_t hyper_count;
  size_t size[2];                                                       // of Rule<float>, Rule<double>
  void (*prepare[2])(const double* hyper, const Now& now, void* rule);  // likewise
  bool carries;
  double (*carry)(const double* hyper, double t, double before);
};

template <class Rule>
void prepare(const double* numbers, const Now& now, void* rule) {
  Rule made = Rule::prepare(hyper_of<typename Rule::Hyper>(numbers), now);
  std::memcpy(rule, &made, sizeof made);
}

template <class Hyper>
double carry(const double* numbers, double t, double before) {
  return Carried<Hyper>::after(hyper_of<Hyper>(numbers), t, before);
}

template <class OfFloat, class OfDouble>
constexpr RuleFacts facts_of(const char* name) {
  return {name,
          OfFloat::states,
          OfFloat::never_negative,
          sizeof(typename OfFloat::Hyper) / sizeof(double),
          {sizeof(OfFloat), sizeof(OfDouble)},
          {prepare<OfFloat>, prepare<OfDouble>},
          Carried<typename OfFloat::Hyper>::any,
          carry<typename OfFloat::Hyper>};
}

#define ADAMFUSED_ROW(R, name) \
  {facts_of<R<float>, R<double>>(name), facts_of<Averaged<R, float>, Averaged<R, double>>(name)},
const RuleFacts kRuleFacts[kRules][2] = {ADAMFUSED_RULES(ADAMFUSED_ROW)};  // [rule][averaged]
#undef ADAMFUSED_ROW

}  // namespace
}  // namespace adamfused
