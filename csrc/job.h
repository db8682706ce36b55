// One launch as plain data: the border between the files that know torch and those that do not.
#pragma once

#include "formats.h"
#include "rules.h"

namespace adamfused {

// A tensor's parts: the parameter, its gradient, the states of the rule (the average of the weights is the last of
// them), a copy of the parameter; then what lies beside the parameter and beside each state.
constexpr int kParam = 0, kGrad = 1, kState = 2, kMaxStates = 4, kCopy = kState + kMaxStates, kParts = kCopy + 1;
constexpr int kMaster = kParts, kScale = kMaster + 1, kSlots = kScale + kMaxStates;
constexpr int kMaxHyper = 8;

#define ADAMFUSED_COUNT(...) +1
constexpr int kRules = 0 ADAMFUSED_RULES(ADAMFUSED_COUNT);
constexpr int kFormats = 0 ADAMFUSED_FORMATS(ADAMFUSED_COUNT);
#undef ADAMFUSED_COUNT

#define ADAMFUSED_ENUM(name, ...) name,
enum class RuleId : int { ADAMFUSED_RULES(ADAMFUSED_ENUM) };
enum class FormatId : uint8_t { ADAMFUSED_FORMATS(ADAMFUSED_ENUM) };
#undef ADAMFUSED_ENUM

#define ADAMFUSED_CASE(F, ...) \
  case FormatId::F:            \
    return sizeof(ADAMFUSED_TARGET::F::Rest);
namespace ADAMFUSED_TARGET {
ADAMFUSED_HD size_t size_of(FormatId format) {
  switch (format) { ADAMFUSED_FORMATS(ADAMFUSED_CASE) }
  return 0;
}
}  // namespace ADAMFUSED_TARGET
#undef ADAMFUSED_CASE

// One tensor. All its parts lie in memory in the same order, without holes.
struct Span {
  Span() {}            // else a list of them would be filled with zeros first
  void* data[kSlots];  // null where there is none
  FormatId format[kParts];
  bool aligned;    // every part begins at a multiple of 16 bytes
  uint32_t key;    // of random numbers: of the parameter
  uint32_t t;      // the step, where its count is on the host
  uint32_t first;  // the low bits of the first element's index in the whole parameter, of which this may be a shard
  int32_t recipe;  // index into Job::recipes where the rule is made on the device, else into Job::rules
  int64_t numel;   // real numbers; a complex element counts as two
  float* step;     // where the step count lies on the device, or null
  float* carried;  // likewise the number that the rule carries, if it does
};

// What a rule is made from on the device, where step, lr and the gradient's factor may be known only there.
struct Recipe {
  double hyper[kMaxHyper];
  double lr, t, ema_decay, carried;  // t and carried where the step count is on the host
  const void* lr_on_device;          // null: `lr` holds
  bool lr_is_double;
};

// All tensors of one device that move by one rule in one arithmetic.
struct Job {
  RuleId rule;
  bool averaged;
  bool in_double;
  const Span* spans;
  int64_t count;
  const void* rules;  // prepared Rule<T>, one per group and step count
  const Recipe* recipes;
  const double* factor;       // on the device, or null when `rules` have it; then all rules are made there
  const float* found_inf;     // on the device, or null: where it is not 0, nothing moves
  const int64_t* first_tile;  // CPU: the place of each span's first tile in the list of all tiles; count + 1 entries
};

// The CPU's unit of work: small enough that the parts of a tile in float stay in the first-level cache.
constexpr int kTile = 1024;

}  // namespace adamfused
